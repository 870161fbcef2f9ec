r"""Is a constant zero? Exact for algebraic numbers, by a separation bound instead of a tolerance.

Every algebraic number that is built from integers with + - * / and roots is U/L with algebraic integers U and L.
Rules on the expression give bounds u >= |every conjugate of U| and l >= |every conjugate of L|; the product of
the degrees of its roots bounds the degree D of U. The norm of a nonzero U is at least 1, hence

    value != 0  implies  |value| >= 1 / (u**(D - 1) * l).

So a value that is computed with enough digits and found smaller than that is zero: no number is too small to
be told from zero. (The bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt, ESA 2001.)
"""

import math

import mpmath
import sympy

MAX_PRECISION = 60_000  # bits
MAX_DEGREE = 1_000
_START = 160

_MP = {
    sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan, sympy.cot: mpmath.cot, sympy.sec: mpmath.sec,
    sympy.csc: mpmath.csc, sympy.asin: mpmath.asin, sympy.acos: mpmath.acos, sympy.atan: mpmath.atan,
    sympy.acot: mpmath.acot, sympy.asec: mpmath.asec, sympy.acsc: mpmath.acsc, sympy.sinh: mpmath.sinh,
    sympy.cosh: mpmath.cosh, sympy.tanh: mpmath.tanh, sympy.coth: mpmath.coth, sympy.asinh: mpmath.asinh,
    sympy.acosh: mpmath.acosh, sympy.atanh: mpmath.atanh, sympy.log: mpmath.log, sympy.Abs: abs,
    sympy.exp: mpmath.exp,
}  # fmt: skip


class NotNumeric(ValueError):
    """The expression has a part that has no numerical value here."""


Point = dict[sympy.Symbol, sympy.Rational]


def numeric(value: sympy.Expr, bits: int, at: Point | None = None) -> mpmath.mpc:
    """The value at a point, computed with `bits` bits throughout. Raises NotNumeric for what has none."""
    with mpmath.workprec(bits):
        try:
            return mpmath.mpc(_evaluate(value, at or {}))
        except (ZeroDivisionError, OverflowError, mpmath.libmp.NoConvergence) as error:
            raise NotNumeric(str(error)) from None


def _evaluate(value: sympy.Expr, at: Point) -> mpmath.mpc:
    value = at.get(value, value)
    if value.is_Rational:
        return mpmath.mpf(int(value.p)) / int(value.q)
    if value is sympy.pi:
        return +mpmath.pi
    if value is sympy.E:
        return +mpmath.e
    if value is sympy.I:
        return mpmath.mpc(0, 1)
    if value.is_Add:
        return mpmath.fsum(_evaluate(term, at) for term in value.args)
    if value.is_Mul:
        return mpmath.fprod(_evaluate(factor, at) for factor in value.args)
    if value.is_Pow:
        base, exponent = _evaluate(value.base, at), value.exp
        power = int(exponent) if exponent.is_Integer else _evaluate(exponent, at)
        if abs(power) > 1e8:
            raise NotNumeric("a large power")
        return base**power
    function = _MP.get(value.func)
    if function is None:
        raise NotNumeric(str(value.func))
    arguments = [_evaluate(argument, at) for argument in value.args]
    if any(abs(argument) > 1e8 for argument in arguments):
        raise NotNumeric("a large argument")
    return function(*arguments)


def is_zero(value: sympy.Expr) -> bool | None:
    """True or False where that is proven; None for a constant that cannot be decided."""
    if value.is_Rational:
        return bool(value == 0)
    try:
        if clearly_nonzero(value):
            return False
        bound = _Bound()
        upper, lower = bound.of(value)
        precision = math.ceil(upper * (bound.degree - 1) + lower) + 2
        if bound.degree > MAX_DEGREE or precision > MAX_PRECISION:
            return None
        working = precision + _START + math.ceil(upper + lower) + 2 * _size(value)
        return bool(abs(numeric(value, working)) < mpmath.ldexp(1, -precision))
    except NotNumeric:
        return None


def clearly_nonzero(value: sympy.Expr, at: Point | None = None) -> bool:
    """Is the value at a point further from zero than rounding could take it? Raises NotNumeric."""
    return bool(abs(numeric(value, _START, at)) > _rounding_error(value, _START, at or {}))


def _size(value: sympy.Expr) -> int:
    return sum(1 for _ in sympy.preorder_traversal(value))


def _rounding_error(value: sympy.Expr, bits: int, at: Point) -> mpmath.mpf:
    """More than the error of a computation with `bits` bits: half of them is left to cancellation."""
    with mpmath.workprec(bits):
        terms = [abs(_evaluate(term, at)) for term in sympy.Add.make_args(value)]
        return mpmath.fsum(terms) * mpmath.ldexp(1, -bits // 2)


class _Bound:
    """Logarithms (base 2) of u and l for an expression, and the degree collected on the way."""

    def __init__(self) -> None:
        self.degree = 1
        self._seen: set[object] = set()

    def of(self, value: sympy.Expr) -> tuple[float, float]:
        if value.is_Rational:
            return math.log2(max(1, abs(int(value.p)))) + 1e-9, math.log2(int(value.q)) + 1e-9
        if value is sympy.I:
            self._extend(("i",), 2)
            return 0.0, 0.0
        if value.is_Add:
            return self._sum(value.args)
        if value.is_Mul:
            parts = [self.of(factor) for factor in value.args]
            return sum(part[0] for part in parts), sum(part[1] for part in parts)
        if value.is_Pow and value.exp.is_Rational:
            return self._power(value.base, value.exp)
        if value.func is sympy.Abs:  # the square root of value times its conjugate
            upper, lower = self.of(value.args[0])
            self._extend(("abs", value.args[0]), 2 * max(1, self.degree))
            return upper, lower
        if value.func in (sympy.sin, sympy.cos, sympy.tan, sympy.cot, sympy.sec, sympy.csc):
            turn = value.args[0] / sympy.pi
            if turn.is_Rational:  # 2 sin and 2 cos of it are sums of two roots of unity
                self._extend(("turn", int(turn.q)), 2 * int(turn.q))
                return 1.0, 1.0
        raise NotNumeric(f"{value.func} is not algebraic")

    def _sum(self, terms: tuple[sympy.Expr, ...]) -> tuple[float, float]:
        upper, lower = self.of(terms[0])
        for term in terms[1:]:
            u, l = self.of(term)  # noqa: E741
            a, b = upper + l, u + lower
            upper, lower = max(a, b) + math.log2(1 + 2.0 ** -min(abs(a - b), 1000)) + 1e-9, lower + l
        return upper, lower

    def _power(self, base: sympy.Expr, exponent: sympy.Rational) -> tuple[float, float]:
        upper, lower = self.of(base)
        root, times = int(exponent.q), int(exponent.p)
        if root > 1:
            self._extend((base, root), root)
            upper = (upper + (root - 1) * lower) / root
        if times < 0:
            upper, lower = lower, upper
        return upper * abs(times), lower * abs(times)

    def _extend(self, key: object, degree: int) -> None:
        if key not in self._seen:
            self._seen.add(key)
            self.degree *= degree
