"""Are two expressions the same function of their variables?

1. Refutation: computed to 160 bits at points where both are real, a difference that is not small refutes.
   What is small refutes and proves nothing.
2. Proof: logarithms are split over primes, circular and hyperbolic functions become exponentials, and whatever
   is transcendental (pi, e^x, log 2, f(n)) becomes a variable of its own. What remains is a radical expression
   in variables. It is zero if it is exactly zero (see `algebraic`) at random rational points, each with
   coordinates out of some million: an identity test of Schwartz and Zippel, with exact arithmetic.

What is neither refuted nor proven counts as different.
"""

import random
from collections.abc import Iterator

import sympy

from .algebraic import NotNumeric, Point, clearly_nonzero, is_zero, numeric
from .operations import DEGREE
from .tokens import Unreadable

MAX_SIZE = 1_500  # nodes of an expression
POINTS = 5
_TRIES = 24
_CIRCULAR = (sympy.sin, sympy.cos, sympy.tan, sympy.cot, sympy.sec, sympy.csc)
_HYPERBOLIC = (sympy.sinh, sympy.cosh, sympy.tanh, sympy.coth)
_NUMERIC_FUNCTIONS = (
    *_CIRCULAR, *_HYPERBOLIC, sympy.asin, sympy.acos, sympy.atan, sympy.acot, sympy.asec, sympy.acsc, sympy.asinh,
    sympy.acosh, sympy.atanh, sympy.log, sympy.Abs, sympy.exp,
)  # fmt: skip


def equal_scalars(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Are they equal wherever both are defined over the reals? Degrees count as plain numbers, or as pi/180."""
    if left == right:
        return True
    if left.has(DEGREE) != right.has(DEGREE) and not (left.is_Rational or right.is_Rational):
        return _same(left.subs(DEGREE, sympy.pi / 180), right.subs(DEGREE, sympy.pi / 180))
    return _same(left.subs(DEGREE, 1), right.subs(DEGREE, 1))


def _same(left: sympy.Expr, right: sympy.Expr) -> bool:
    if left.has(sympy.oo, -sympy.oo) or right.has(sympy.oo, -sympy.oo):
        return bool(left == right)
    difference = left - right
    if difference == 0:
        return True
    if _size(difference) > MAX_SIZE:
        raise Unreadable("too large to compare")
    difference = _without_opaque(difference)
    points = _points(difference)
    if any(_refuted(difference, point) for point in points):
        return False
    kernels = _algebraic(difference)
    names = sorted(kernels.free_symbols, key=str)
    if names == sorted(difference.free_symbols, key=str):
        tests = points
    else:
        tests = _points(kernels)
    return bool(tests) and all(is_zero(kernels.xreplace(point)) is True for point in tests)


def _size(value: sympy.Expr) -> int:
    return sum(1 for _ in sympy.preorder_traversal(value))


# -- points ----------------------------------------------------------------------------------------


def _points(value: sympy.Expr) -> list[Point]:
    """Points where the value is defined over the reals, of all signs and sizes; any points if there are few."""
    names = sorted(value.free_symbols, key=str)
    if not names:
        return [{}]
    real, others = [], []
    for point in _random_points(names):
        defined = _defined(value, point)
        if defined:
            real.append(point)
        elif defined is False:
            others.append(point)
        if len(real) == POINTS:
            break
    return real if len(real) > 1 else (real + others)[:POINTS]


def _random_points(names: list[sympy.Symbol]) -> Iterator[Point]:
    """The same points each time: verdicts do not depend on chance."""
    source = random.Random(20_240_607)
    for attempt in range(_TRIES):
        scale = (3, 1, 40)[attempt % 3]
        signs = (1, -1, 0)[attempt // 3 % 3]
        point = {}
        for name in names:
            sign = signs or source.choice((1, -1))
            point[name] = sympy.Rational(sign * scale * source.randrange(1_000, 1_000_000), 1_000_003)
        yield point


def _defined(value: sympy.Expr, point: Point) -> bool | None:
    """Are all roots and logarithms taken of positive numbers there? None where there is no value at all."""
    try:
        for part in sympy.preorder_traversal(value):
            if not part.free_symbols:
                continue
            if part.is_Pow and not part.exp.is_Integer and part.base.free_symbols or part.func is sympy.log:
                argument = numeric(part.args[0], 80, point)
                if argument.real <= 0 or abs(argument.imag) > 1e-12:
                    return False
        result = numeric(value, 80, point)
    except NotNumeric:
        return None
    return bool(abs(result.imag) < 1e-12) or value.has(sympy.I)


def _refuted(value: sympy.Expr, point: Point) -> bool:
    try:
        return clearly_nonzero(value, point)
    except NotNumeric:
        return False


# -- from transcendental to algebraic --------------------------------------------------------------


def _without_opaque(value: sympy.Expr) -> sympy.Expr:
    """Sums, integrals, factorials of variables and unknown functions become variables, one for each."""
    if value.has(sympy.factorial, sympy.binomial):
        value = sympy.combsimp(value)
    parts = {
        part
        for part in sympy.preorder_traversal(value)
        if isinstance(part, sympy.Function)
        and not isinstance(part, _NUMERIC_FUNCTIONS)
        or isinstance(part, sympy.Max | sympy.Min)
    }
    ordered = sorted(parts, key=lambda part: (-_size(part), str(part)))
    for number, part in enumerate(ordered):
        value = value.xreplace({part: sympy.Symbol(f"opaque{number}", positive=True)})
    return value


def _algebraic(value: sympy.Expr) -> sympy.Expr:
    """The value with a variable for each transcendental part."""
    value = value.replace(lambda part: part.func is sympy.log, _split_logarithm)
    if value.free_symbols or value.has(*_HYPERBOLIC) or not _turns_only(value):
        value = value.replace(lambda part: part.func in (*_CIRCULAR, *_HYPERBOLIC), _as_exponentials)
    value = value.replace(lambda part: part.is_Pow and not part.exp.is_Rational, _over_primes)
    value = _exponentials_to_variables(value)
    turns = {part: sympy.Dummy() for part in value.atoms(*_CIRCULAR) if _stays(part)}
    value = value.xreplace(turns)  # sin(pi/7) is algebraic, although pi is not
    kernels = {part for part in value.atoms(sympy.log, sympy.NumberSymbol)}
    kernels |= {part for part in value.atoms(sympy.Function) if part.func in _NUMERIC_FUNCTIONS and not _stays(part)}
    for number, part in enumerate(sorted(kernels, key=lambda part: (-_size(part), str(part)))):
        value = value.xreplace({part: sympy.Symbol(f"kernel{number}", positive=True)})
    return value.xreplace({stand_in: turn for turn, stand_in in turns.items()})


def _turns_only(value: sympy.Expr) -> bool:
    return all((part.args[0] / sympy.pi).is_Rational for part in value.atoms(*_CIRCULAR))


def _stays(part: sympy.Expr) -> bool:
    return part.func is sympy.Abs or part.func in _CIRCULAR and bool((part.args[0] / sympy.pi).is_Rational)


def _split_logarithm(part: sympy.Expr) -> sympy.Expr:
    """log of a product, quotient or power as a sum; of a rational number, over its primes."""
    argument = sympy.factor_terms(part.args[0])
    total = sympy.Integer(0)
    for factor in sympy.Mul.make_args(argument):
        base, exponent = factor.as_base_exp()
        if base.is_Rational and base > 0:
            if max(int(base.p), int(base.q)) > 10**12:
                total += exponent * sympy.log(base)
            else:
                total += exponent * sum(k * sympy.log(p) for p, k in sympy.factorrat(base).items())
        elif base is sympy.E:
            total += exponent
        elif base.is_negative:
            return part
        else:
            total += exponent * sympy.log(base)
    return total


def _as_exponentials(part: sympy.Expr) -> sympy.Expr:
    turn = part.args[0] / sympy.pi
    return part if turn.is_Rational and part.func in _CIRCULAR else part.rewrite(sympy.exp)


def _over_primes(part: sympy.Expr) -> sympy.Expr:
    """6**n as 2**n * 3**n, so that 4**n and 2**(2n) are powers of one number."""
    base, exponent = part.base, sympy.expand(part.exp)
    if base.is_Rational and 0 < base != 1 and max(int(base.p), int(base.q)) < 10**12:
        return sympy.Mul(*(sympy.Pow(p, sympy.expand(k * exponent)) for p, k in sympy.factorrat(base).items()))
    return sympy.Pow(base, exponent)


def _exponentials_to_variables(value: sympy.Expr) -> sympy.Expr:
    """b**(c m + ...), with rational c and the same b and m, as a product of powers of one variable for each (b, m)."""
    powers: dict[sympy.Expr, list[tuple[sympy.Expr, sympy.Rational, sympy.Expr]]] = {}
    scales: dict[tuple[sympy.Expr, sympy.Expr], int] = {}
    for part in value.atoms(sympy.Pow, sympy.exp):
        base, exponent = part.as_base_exp()
        if exponent.is_Rational and base is not sympy.E:
            continue
        powers[part] = []
        for term in sympy.Add.make_args(sympy.expand(exponent)):
            coefficient, monomial = term.as_coeff_Mul()
            if not coefficient.is_Rational:
                coefficient, monomial = sympy.Integer(1), term
            powers[part].append((base, coefficient, monomial))
            scales[base, monomial] = sympy.ilcm(scales.get((base, monomial), 1), coefficient.q)
    if value.has(sympy.E):
        scales.setdefault((sympy.E, sympy.Integer(1)), 1)
    variables = {
        key: sympy.Symbol(f"power{number}", positive=True) for number, key in enumerate(sorted(scales, key=str))
    }

    def rewritten(base: sympy.Expr, coefficient: sympy.Rational, monomial: sympy.Expr) -> sympy.Expr:
        if monomial == 1 and base is not sympy.E:
            return base**coefficient
        if base is sympy.E and (monomial / (sympy.I * sympy.pi)).is_Rational:
            turn = coefficient * monomial / sympy.I
            return sympy.cos(turn) + sympy.I * sympy.sin(turn)
        return variables[base, monomial] ** (coefficient * scales[base, monomial])

    replaced = {part: sympy.Mul(*(rewritten(*factor) for factor in factors)) for part, factors in powers.items()}
    if value.has(sympy.E):
        replaced[sympy.E] = rewritten(sympy.E, sympy.Integer(1), sympy.Integer(1))
    return value.xreplace(replaced)
