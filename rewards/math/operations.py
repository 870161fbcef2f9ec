"""Operations on parsed values: arithmetic of scalars and matrices, named functions, numbers with a base."""

import sympy

from . import bounded
from .tokens import Unreadable
from .values import Value

DEGREE = sympy.Symbol("degree", positive=True)  # a unit: 90° is compared with 90 and, inside sin, is pi/2

_SIMPLE = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "asin": sympy.asin, "acos": sympy.acos, "atan": sympy.atan, "acot": sympy.acot, "asec": sympy.asec,
    "acsc": sympy.acsc, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "coth": sympy.coth,
    "arcsinh": sympy.asinh, "arccosh": sympy.acosh, "arctanh": sympy.atanh, "floor": sympy.floor,
    "ceil": sympy.ceiling, "ceiling": sympy.ceiling, "abs": sympy.Abs,
}  # fmt: skip
_CIRCULAR = frozenset(["sin", "cos", "tan", "cot", "sec", "csc"])
INVERSES = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan, "cot": sympy.acot, "sec": sympy.asec,
             "csc": sympy.acsc}  # fmt: skip
_SEVERAL = {"gcd": sympy.gcd, "lcm": sympy.lcm, "max": sympy.Max, "min": sympy.Min}


def scalar(value: Value) -> sympy.Expr:
    """The value as a number or an expression; a bracket of one item is the item."""
    if isinstance(value, sympy.MatrixBase) and value.shape == (1, 1):
        return value[0, 0]
    if not isinstance(value, sympy.Expr) or isinstance(value, sympy.MatrixBase):
        raise Unreadable("not a scalar")
    return value


def add(left: Value, right: Value, negative: bool) -> Value:
    """left + right, or left - right, of two scalars or two matrices."""
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        if left.shape != right.shape:
            raise Unreadable("shapes differ")
        return left - right if negative else left + right
    a, b = scalar(left), scalar(right)
    return bounded.finite(a - b if negative else a + b)


def multiply(left: Value, right: Value) -> Value:
    """The product of scalars and matrices."""
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        if left.shape[1] != right.shape[0]:
            raise Unreadable("shapes differ")
        return left * right
    if isinstance(left, sympy.MatrixBase):
        return left * scalar(right)
    if isinstance(right, sympy.MatrixBase):
        return scalar(left) * right
    return bounded.product(scalar(left), scalar(right))


def several(value: Value) -> list[Value]:
    items = getattr(value, "items", None)
    return list(items) if isinstance(items, tuple) else [value]


def only(values: list[Value]) -> sympy.Expr:
    if len(values) != 1:
        raise Unreadable("one argument expected")
    return scalar(values[0])


def apply(name: str, values: list[Value], base: sympy.Expr | None) -> sympy.Expr:
    if any(isinstance(value, sympy.Expr) and bounded.nesting(value) >= bounded.MAX_NESTING for value in values):
        raise Unreadable("functions nested too deep")
    if name in ("ln", "log", "lg"):
        argument = only(values)
        if argument.is_zero:
            raise Unreadable("log 0")
        result = sympy.log(argument)
        base = sympy.Integer(10) if name == "lg" else base
        return result if base is None else bounded.quotient(result, sympy.log(base))
    if name in _SEVERAL:
        return _SEVERAL[name](*(scalar(value) for value in values))
    if name == "exp":
        return bounded.power(sympy.E, only(values))
    if name == "det" and len(values) == 1 and isinstance(values[0], sympy.MatrixBase):
        return determinant(values[0])
    if name == "factorial":
        return bounded.factorial(only(values))
    if name == "binom":
        return bounded.binomial(scalar(values[0]), scalar(values[1])) if len(values) == 2 else refuse("binom")
    if name not in _SIMPLE:
        raise Unreadable(f"{name} cannot be computed")
    argument = only(values)
    if name in _CIRCULAR:
        argument = argument.subs(DEGREE, sympy.pi / 180)
    return bounded.finite(_SIMPLE[name](argument))


def determinant(matrix: sympy.MatrixBase) -> sympy.Expr:
    if matrix.shape[0] != matrix.shape[1] or matrix.shape[0] > bounded.MAX_DETERMINANT:
        raise Unreadable("a determinant too large")
    return matrix.det()


def matrix_power(matrix: sympy.MatrixBase, exponent: sympy.Expr) -> sympy.MatrixBase:
    name = str(exponent)
    if name == "T":
        return matrix.T
    if not (exponent.is_Integer and 0 <= exponent <= 10) or matrix.shape[0] != matrix.shape[1]:
        raise Unreadable("a matrix power")
    return matrix**exponent


_NUMERALS = "two three four five six seven eight nine ten eleven twelve".split()
BASES = {name: sympy.Integer(number) for number, name in enumerate(_NUMERALS, 2)}
BASES["sixteen"] = sympy.Integer(16)


def based(digits: str, base: sympy.Expr) -> sympy.Expr:
    """1011_2: equal only to numbers in the same base, so that repeating a conversion's question does not pay."""
    if not base.is_Integer or not 2 <= base <= 36 or not digits.isdigit():
        raise Unreadable("an unknown base")
    try:
        value = sympy.Integer(int(digits, int(base)))
    except ValueError:
        raise Unreadable("a digit beyond the base") from None
    return value if base == 10 else sympy.Function(f"base{base}")(value)


def refuse(reason: str) -> sympy.Expr:
    raise Unreadable(reason)
