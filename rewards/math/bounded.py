"""Building sympy numbers without computing large ones: what exceeds a limit raises Unreadable instead."""

import sympy

from .tokens import Unreadable

MAX_BITS = 40_000  # of any integer that is computed
MAX_ROOT = 64
MAX_NESTING = 6  # of roots and functions
MAX_CONSTANT_EXPONENT = 40  # of a constant that is no rational number
MAX_POLYNOMIAL_DEGREE = 400  # of a power of a sum, which comparison will evaluate
MAX_SYMBOL_EXPONENT = 10**4
MAX_FACTORIAL = 3_000
MAX_SMALL_CHOICE = 20
MAX_SUM_TERMS = 100
MAX_DETERMINANT = 6


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """base ** exponent."""
    if exponent.is_number:
        if base.is_number and not (base.is_infinite or exponent.is_infinite):
            _check_numeric_power(base, exponent)
        elif base.is_Add and exponent.is_Integer and degree(base) * abs(exponent) > MAX_POLYNOMIAL_DEGREE:
            raise Unreadable("a sum to a large power")
        elif exponent.is_comparable and abs(exponent) > MAX_SYMBOL_EXPONENT:
            raise Unreadable("a large exponent")
    if base.is_zero and exponent.is_zero:
        raise Unreadable("0^0")
    return finite(base**exponent)


def _check_numeric_power(base: sympy.Expr, exponent: sympy.Expr) -> None:
    if not exponent.is_comparable:
        if exponent.is_Number or base.is_zero:
            raise Unreadable("an undefined power")
        return
    size = abs(float(sympy.N(exponent, 15, maxn=50)))
    if base.is_Rational:
        bits = max(int(base.p).bit_length(), int(base.q).bit_length())
        if size > MAX_BITS or bits * size > MAX_BITS and abs(base) != 1:
            raise Unreadable("a large power")
    elif size > MAX_CONSTANT_EXPONENT * (100 if base.is_Atom else 1):
        raise Unreadable("a large power")
    if exponent.is_Rational and (exponent.q > MAX_ROOT or nesting(base) >= MAX_NESTING):
        raise Unreadable("a root of high degree")


def degree(value: sympy.Expr) -> int:
    """About the degree of a polynomial, however it is bracketed."""
    if value.is_Pow and value.exp.is_Integer:
        return abs(int(value.exp)) * degree(value.base)
    parts = [degree(part) for part in value.args]
    return (sum(parts) if value.is_Mul else max(parts, default=0)) if parts else int(not value.is_Number)


def nesting(value: sympy.Expr) -> int:
    """How deep roots and functions are nested."""
    inside = max((nesting(part) for part in value.args), default=0)
    root = value.is_Pow and not value.exp.is_Integer
    return inside + int(root or isinstance(value, sympy.Function))


def factorial(value: sympy.Expr) -> sympy.Expr:
    """value!"""
    if value.is_number and not (value.is_Integer and 0 <= value <= MAX_FACTORIAL):
        raise Unreadable("a large factorial")
    return sympy.factorial(value)


def double_factorial(value: sympy.Expr) -> sympy.Expr:
    """value!!"""
    if value.is_number and not (value.is_Integer and 0 <= value <= MAX_FACTORIAL):
        raise Unreadable("a large factorial")
    return sympy.factorial2(value)


def binomial(n: sympy.Expr, k: sympy.Expr) -> sympy.Expr:
    """n choose k."""
    small = k.is_Integer and 0 <= k <= MAX_SMALL_CHOICE
    if n.is_number and k.is_number and not small and not (n.is_Integer and 0 <= n <= MAX_FACTORIAL):
        raise Unreadable("a large binomial")
    if small and not n.is_number:
        return sympy.ff(n, k) / sympy.factorial(k)
    return sympy.binomial(n, k)


def product(*factors: sympy.Expr) -> sympy.Expr:
    """The product; refuses 0 times infinity."""
    return finite(sympy.Mul(*factors))


def quotient(numerator: sympy.Expr, denominator: sympy.Expr) -> sympy.Expr:
    """numerator / denominator; refuses division by zero."""
    if denominator.is_zero:
        raise Unreadable("division by zero")
    return finite(numerator / denominator)


def finite(value: sympy.Expr) -> sympy.Expr:
    """The value itself, unless it is undefined."""
    if value.has(sympy.nan, sympy.zoo):
        raise Unreadable("undefined")
    return value
