"""Inequalities and sets of real numbers: `1 < x <= 3` is (1, 3], and pieces of sets are compared exactly."""

import sympy
from sympy.core.function import AppliedUndef

from .identity import equal_scalars
from .parse import as_region
from .values import Listing, Relation, Value

INEQUALITIES = frozenset(["<", ">", "le", "ge", "ne"])
MAX_OPERATIONS = 40
MAX_DEGREE = 6


def region_of(value: Value | None) -> sympy.Set | None:
    """The set that a value describes: an interval, a union, braces, an inequality in one unknown; or None."""
    if isinstance(value, Relation):
        return _solved(value)
    if isinstance(value, Listing):
        if not all(isinstance(item, Relation) and INEQUALITIES.issuperset(item.operators) for item in value.items):
            return None
        if len({_unknown(item) for item in value.items}) > 1:  # type: ignore[arg-type]
            return None
        regions = [region_of(item) for item in value.items]
        sets = [region for region in regions if region is not None]
        if len(sets) < len(regions):
            return None
        excluded = all(isinstance(item, Relation) and item.operators == ("ne",) for item in value.items)
        return (sympy.Union if value.joiner == "or" and not excluded else sympy.Intersection)(*sets)
    return as_region(value)


def equal_regions(left: sympy.Set, right: sympy.Set) -> bool:
    """Are two sets equal, piece by piece?"""
    if left == right:
        return True
    pieces, others = _pieces(left), _pieces(right)
    if pieces is None or others is None or len(pieces) != len(others):
        return False
    return all(
        a[2:] == b[2:] and equal_scalars(a[0], b[0]) and equal_scalars(a[1], b[1])
        for a, b in zip(pieces, others, strict=True)
    )


Piece = tuple[sympy.Expr, sympy.Expr, bool, bool]


def _pieces(region: sympy.Set) -> list[Piece] | None:
    """Intervals and points in order; None for other sets."""
    pieces: list[Piece] = []
    for part in region.args if isinstance(region, sympy.Union) else (region,):
        if isinstance(part, sympy.FiniteSet):
            pieces += [(item, item, False, False) for item in part]
        elif part is sympy.S.Reals:
            pieces.append((-sympy.oo, sympy.oo, True, True))
        elif isinstance(part, sympy.Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif part is not sympy.S.EmptySet:
            return None
    if not all(end.is_number for piece in pieces for end in piece[:2]):
        return pieces if len(pieces) == 1 else None
    return sorted(pieces, key=lambda piece: (sympy.N(piece[0], 30), sympy.N(piece[1], 30)))


def _unknown(relation: Relation) -> sympy.Expr | None:
    """What the inequality restricts: its only variable, or a name such as f(x)."""
    for side, name in zip(relation.sides, relation.names, strict=True):
        if name is not None and isinstance(side, sympy.Symbol | AppliedUndef):
            return side
    names = {free for side in relation.sides if isinstance(side, sympy.Expr) for free in side.free_symbols}
    return names.pop() if len(names) == 1 else None


def _solved(relation: Relation) -> sympy.Set | None:
    if not INEQUALITIES.issuperset(relation.operators):
        return None
    expressions = [side for side in relation.sides if isinstance(side, sympy.Expr)]
    if len(expressions) < len(relation.sides):
        return None
    unknown = _unknown(relation)
    if unknown is None:
        return None
    variable = sympy.Symbol("unknown", real=True)
    sides = [side.xreplace({unknown: variable}) for side in expressions]
    regions = [
        _solve(left, operator, right, variable)
        for left, operator, right in zip(sides, relation.operators, sides[1:], strict=False)
    ]
    sets = [region for region in regions if region is not None]
    return sympy.Intersection(*sets) if len(sets) == len(regions) else None


def _solve(left: sympy.Expr, operator: str, right: sympy.Expr, variable: sympy.Symbol) -> sympy.Set | None:
    """The real solutions of one inequality; None if there are other variables, or it is no short one."""
    if (left.free_symbols | right.free_symbols) != {variable}:
        return None
    for side, bound, direct in ((left, right, operator), (right, left, _MIRRORED[operator])):
        if side == variable and not bound.free_symbols:
            return _half_line(direct, bound)
    difference = left - right
    if difference.count_ops() > MAX_OPERATIONS or difference.has(sympy.Function) and not _only_absolute(difference):
        return None
    numerator, denominator = sympy.together(difference).as_numer_denom()
    for part in (numerator, denominator):
        if part.is_polynomial(variable) and sympy.degree(part, variable) > MAX_DEGREE:
            return None
    condition = _CONDITIONS[operator](difference, 0)
    try:
        return sympy.solve_univariate_inequality(condition, variable, relational=False)
    except NotImplementedError:
        return None


def _only_absolute(value: sympy.Expr) -> bool:
    return all(part.func is sympy.Abs for part in value.atoms(sympy.Function))


def _half_line(operator: str, bound: sympy.Expr) -> sympy.Set | None:
    if not bound.is_extended_real:
        return None
    if operator == "ne":
        return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(bound))
    if operator in ("<", "le"):
        return sympy.Interval(-sympy.oo, bound, True, operator == "<")
    return sympy.Interval(bound, sympy.oo, operator == ">", True)


_MIRRORED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}
_CONDITIONS = {"<": sympy.Lt, ">": sympy.Gt, "le": sympy.Le, "ge": sympy.Ge, "ne": sympy.Ne}
