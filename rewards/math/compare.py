r"""Equality of two answers by kind. The rules are in docs/verifier.md; see `symbolic` for the entry point."""

import itertools
import re
from collections.abc import Sequence

import sympy

from .exact import parse_number
from .extract import box_contents
from .identity import equal_scalars
from .latex import tidy
from .parse import parse_answer
from .regions import INEQUALITIES, equal_regions, region_of
from .tokens import Unreadable
from .values import Braces, Bracketed, Listing, Ratio, Region, Relation, Residue, Text, Value

# A letter A to J, alone, or in brackets or with a point and then a value. One that is multiplied is a variable.
_CHOICE = re.compile(
    r"[\s$]*(?:\\(?:text|mathrm|textbf|mathbf|textrm)\s*\{\s*(?:\(([A-J])\)|([A-J])[.:)])\s*\}|\(([A-J])\)|([A-J])[.:)](?=\s))"
    r"(?:[\s$~]|\\[ ,;:]|\\q?quad)*(?![-+*/^_=<>!])(.*)",
    re.DOTALL,
)
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")


def equal_answers(answer: str, gold: str) -> bool:
    """Are two bare answers equal? Never raises for odd text."""
    chosen = _equal_choices(answer, gold)
    if chosen is not None:
        return chosen
    for grouped in (True, False):
        if not grouped and not _may_list_digits(answer, gold):
            break
        try:
            if equal_values(_parse(answer, grouped), _parse(gold, grouped)):
                return True
        except (
            Unreadable,
            ValueError,
            ArithmeticError,
            TypeError,
            AttributeError,
            NotImplementedError,
            RecursionError,
        ):
            continue  # sympy raises these on odd expressions: not shown to be equal
    return False


def _may_list_digits(answer: str, gold: str) -> bool:
    """May `1,234` on either side be two values? Not for a number like 1,000,000, which is no set of 0 and 1."""
    if not (_groups_digits(answer) or _groups_digits(gold)):
        return False
    if parse_number(answer) is None and parse_number(gold) is None:
        return True
    return re.sub(r"[\s$]", "", answer) == re.sub(r"[\s$]", "", gold)


def _groups_digits(text: str) -> bool:
    return re.search(r"[0-9],[0-9]{3}(?![0-9])", text) is not None


def _parse(text: str, grouped: bool) -> Value:
    r"""The value of a text; boxes that stand side by side are a list, whatever stands between them."""
    boxes = box_contents(text)
    if not boxes:
        return parse_answer(text, grouped=grouped)
    if len(boxes) == 1:
        return parse_answer(boxes[0], grouped=grouped)
    return Listing(tuple(parse_answer(box, grouped=grouped) for box in boxes))


def _equal_choices(answer: str, gold: str) -> bool | None:
    r"""`\textbf{(C)}\ 73` equals C and equals 73; None if neither side is a choice."""
    a, g = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(gold)
    if a is None and g is None:
        return None
    (letter, rest), (gold_letter, gold_rest) = _choice(a, answer), _choice(g, gold)
    if _LETTER.search(rest) or _LETTER.search(gold_rest):
        return None  # several choices
    if letter and gold_letter and letter != gold_letter:
        return False
    if rest and gold_rest:
        return rest == gold_rest or equal_answers(rest, gold_rest)
    return letter is not None and letter == gold_letter or None


def _choice(match: re.Match[str] | None, text: str) -> tuple[str | None, str]:
    """The letter and the value of an answer; a bare letter has no value, a bare value no letter."""
    if match is None:
        text = tidy(text).strip("() ")
        return (text, "") if _LETTER.fullmatch(text) else (None, text)
    return match[1] or match[2] or match[3] or match[4], tidy(match[5])


def equal_values(answer: Value | None, gold: Value | None) -> bool:
    """Equality of two parsed answers."""
    if answer is None or gold is None:
        return False
    if isinstance(answer, Relation) or isinstance(gold, Relation):
        return _equal_relations(answer, gold)
    if isinstance(answer, Listing | Braces) or isinstance(gold, Listing | Braces):
        return _equal_lists(answer, gold)
    if isinstance(answer, Bracketed) and isinstance(gold, Bracketed):
        return _same_brackets(answer, gold) and _equal_sequences(answer.items, gold.items)
    if isinstance(answer, sympy.MatrixBase) or isinstance(gold, sympy.MatrixBase):
        return _equal_matrices(answer, gold)
    if isinstance(answer, Region) or isinstance(gold, Region):
        return _equal_as_regions(answer, gold)
    if isinstance(answer, Text) or isinstance(gold, Text):
        return answer == gold
    if isinstance(answer, Ratio) or isinstance(gold, Ratio):
        return _equal_ratios(answer, gold)
    if isinstance(answer, Residue) or isinstance(gold, Residue):
        return _equal_residues(answer, gold)
    return isinstance(answer, sympy.Expr) and isinstance(gold, sympy.Expr) and equal_scalars(answer, gold)


# -- several values --------------------------------------------------------------------------------


def _equal_sequences(answer: Sequence[Value], gold: Sequence[Value]) -> bool:
    return len(answer) == len(gold) and all(map(equal_values, answer, gold))


def _same_brackets(answer: Bracketed, gold: Bracketed) -> bool:
    """(1, 2) is a point or an open interval, [1, 2] a closed one; three values are never an interval."""
    shapes = {(bracketed.opening, bracketed.closing) for bracketed in (answer, gold)}
    if len(answer.items) != 2:
        shapes -= {("[", "]"), ("langle", "rangle")}
        return len(shapes - {("(", ")")}) == 0
    return len(shapes) == 1 or shapes == {("(", ")"), ("langle", "rangle")}


def _equal_lists(answer: Value, gold: Value) -> bool:
    """Lists and braces are unordered; a list against a tuple is ordered, and one value is not several."""
    if any(isinstance(item, Relation) for item in (*_flat(answer), *_flat(gold))) and _equal_as_regions(answer, gold):
        return True
    if isinstance(answer, Region) or isinstance(gold, Region):
        return _equal_as_regions(answer, gold)
    for one, other in ((answer, gold), (gold, answer)):
        if isinstance(one, Bracketed):
            if not isinstance(other, Listing) or one.opening not in ("(", "langle"):
                return False
            items = _in_order(other)
            return items is not None and _equal_sequences(_valued(one.items), _valued(items))
        if not isinstance(one, Listing | Braces):
            items = _flat(other)
            return isinstance(other, Braces) and len(items) == 1 and equal_values(one, items[0])
    return _equal_sets(_flat(answer), _flat(gold))


def _flat(value: Value) -> list[Value]:
    if isinstance(value, Listing | Braces):
        return [item for inner in value.items for item in (_flat(inner) if isinstance(inner, Listing) else [inner])]
    return [value]


def _in_order(listing: Listing) -> list[Value] | None:
    """The items as the entries of a tuple: y = 1, x = 2 is the point (2, 1). None for what is no point."""
    names = [item.names[0] if isinstance(item, Relation) else None for item in listing.items]
    if not any(names):
        return list(listing.items)
    if listing.joiner == "or" or len(set(names)) < len(names):
        return None
    if not any({*names} <= {*axes} for axes in ("xyz", "abcd")):
        return list(listing.items)
    return [item for _, item in sorted(zip(names, listing.items, strict=True), key=lambda pair: str(pair[0]))]


def _valued(items: Sequence[Value]) -> list[Value]:
    """`x = 2` as 2; what is no assignment stays."""
    return [value if (value := value_of(item, trusted=True)) is not None else item for item in items]


def _equal_sets(answer: list[Value], gold: list[Value]) -> bool:
    by_name, gold_by_name = _by_name(answer), _by_name(gold)
    if by_name is not None and gold_by_name is not None and by_name.keys() == gold_by_name.keys():
        return all(equal_values(by_name[name], gold_by_name[name]) for name in gold_by_name)
    values, golds = _valued(answer), _valued(gold)
    if all(isinstance(value, sympy.Expr) and value.is_number for value in (*values, *golds)):
        return _equal_sequences(_sorted_numbers(values), _sorted_numbers(golds))
    return _covers(values, golds) and _covers(golds, values)


def _by_name(items: list[Value]) -> dict[str, Value] | None:
    """The values by their names, if each has a name of its own."""
    named: dict[str, Value] = {}
    for item in items:
        value = value_of(item, trusted=True)
        if not isinstance(item, Relation) or value is None or item.names[0] is None:
            return None
        named[item.names[0]] = value
    return named if len(named) == len(items) else None


def _sorted_numbers(values: list[sympy.Expr]) -> list[sympy.Expr]:
    """In numerical order, equal neighbours once. Compared pairwise afterwards, exactly."""
    keyed = sorted((sympy.re(n), sympy.im(n), index) for index, n in enumerate(sympy.N(v, 40) for v in values))
    ordered = [values[index] for _, _, index in keyed]
    return [value for at, value in enumerate(ordered) if not at or not equal_values(value, ordered[at - 1])]


def _covers(values: list[Value], others: list[Value]) -> bool:
    return all(any(equal_values(value, other) for other in others) for value in values)


# -- relations -------------------------------------------------------------------------------------


def value_of(value: Value | None, *, trusted: bool) -> Value | None:
    """What an assignment such as `x = 5` or `f(x) = 70 + 3 = 73` says; None if it says nothing or contradicts itself.

    The last side before any "≈" is the value. The sides before it must be names or equal to it, except that
    behind a leading name there may be working: a computed side that is wrong, as long as no other number is
    stated. A trusted relation (a gold) says what follows its last name.
    """
    if not isinstance(value, Relation):
        return value
    sides, names, plain, operators = list(value.sides), list(value.names), list(value.plain), list(value.operators)
    if "approx" in operators:
        end = operators.index("approx") + 1
        if any(plain[end - 1 :]) and plain[end - 1] and _other_integer(sides[end - 1], sides[-1]):
            return None  # 73 ≈ 74 offers two values
        exact = [side for side, name in zip(sides[:end], names[:end], strict=True) if name is None]
        if exact:
            sides, names, plain, operators = sides[:end], names[:end], plain[:end], operators[: end - 1]
    if not {"=", "approx", "in", "equiv"}.issuperset(operators):
        return None
    if len(sides) == 2 and names[0] is None and names[1] is not None and plain[0]:  # 5 = x
        sides, names, plain = sides[::-1], names[::-1], plain[::-1]
    if trusted:
        start = max((at for at, name in enumerate(names[:-1]) if name is not None), default=0)
        sides, names, plain = sides[start:], names[start:], plain[start:]
    last = sides[-1]
    before = list(zip(sides, names, plain, strict=True))[:-1]
    computed = [(equal_values(side, last), stated) for side, name, stated in before if name is None]
    if all(agrees for agrees, _ in computed):
        return last
    supported = any(agrees for agrees, _ in computed)
    contradicted = any(stated and not agrees for agrees, stated in computed)
    return last if names[0] is not None and (supported or not contradicted) else None


def _other_integer(exact: Value | None, rounded: Value | None) -> bool:
    return isinstance(exact, sympy.Integer) and isinstance(rounded, sympy.Number) and exact != rounded


def _equal_relations(answer: Value, gold: Value) -> bool:
    if isinstance(answer, Relation) and isinstance(gold, Relation):
        if _equivalent(answer, gold):
            return True
        if not _assigns(answer) or not _assigns(gold):
            return _equal_as_regions(answer, gold)
    value, gold_value = value_of(answer, trusted=False), value_of(gold, trusted=True)
    if value is not None and gold_value is not None and (value, gold_value) != (answer, gold):
        return equal_values(value, gold_value)
    return _equal_as_regions(answer, gold)


def _assigns(relation: Relation) -> bool:
    return INEQUALITIES.isdisjoint(relation.operators)


def _equivalent(answer: Relation, gold: Relation) -> bool:
    """Do two relations, or chains of them, differ only by factors and by what stands on which side?"""
    left, right = _differences(answer), _differences(gold)
    if left is None or right is None or len(left) != len(right):
        return False
    if len(left) > 1 and "=" in (*answer.operators, *gold.operators):
        return False
    return any(
        all(a[0] == b[0] and _proportional(a[1], b[1], a[0]) for a, b in zip(left, order, strict=True))
        for order in itertools.islice(itertools.permutations(right), 24)
    )


def _differences(relation: Relation) -> list[tuple[str, sympy.Expr]] | None:
    """Each link of the chain as (kind, difference), which is equal, unequal, positive or not negative."""
    links = []
    for left, operator, right in zip(relation.sides, relation.operators, relation.sides[1:], strict=False):
        if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
            return None
        if operator in ("in", "approx", "equiv"):
            return None
        kind = {"<": "positive", ">": "positive", "le": "not negative", "ge": "not negative"}.get(operator, operator)
        links.append((kind, right - left if operator in ("<", "le") else left - right))
    return links


def _proportional(left: sympy.Expr, right: sympy.Expr, kind: str) -> bool:
    """Is the quotient a constant, and a positive one where the sign matters?"""
    if left == right:
        return True
    if left.is_zero or right.is_zero or not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    at = {name: sympy.Rational(11 + 3 * number, 7) for number, name in enumerate(sorted(left.free_symbols, key=str))}
    factor = left.xreplace(at) / right.xreplace(at)
    if not factor.is_number or factor.is_zero or factor.has(sympy.zoo, sympy.nan, sympy.oo):
        return False
    if kind not in ("=", "ne") and not factor.is_positive:
        return False
    return equal_scalars(left, factor * right)


def _equal_as_regions(answer: Value, gold: Value) -> bool:
    region, gold_region = _as_set(answer), _as_set(gold)
    return region is not None and gold_region is not None and equal_regions(region, gold_region)


def _as_set(value: Value) -> sympy.Set | None:
    assigned = value_of(value, trusted=True)
    return region_of(value if assigned is None else assigned)


# -- other kinds -----------------------------------------------------------------------------------


def _equal_matrices(answer: Value, gold: Value) -> bool:
    if isinstance(answer, sympy.MatrixBase) and isinstance(gold, sympy.MatrixBase):
        return answer.shape == gold.shape and all(map(equal_scalars, answer.flat(), gold.flat()))
    for matrix, other in ((answer, gold), (gold, answer)):
        if isinstance(matrix, sympy.MatrixBase) and matrix.shape == (1, 1) and isinstance(other, sympy.Expr):
            return equal_values(matrix[0, 0], other)
        if isinstance(matrix, sympy.MatrixBase) and isinstance(other, Bracketed) and 1 in matrix.shape:
            return other.opening in ("(", "langle") and _equal_sequences(matrix.flat(), other.items)
    return False


def _equal_ratios(answer: Value, gold: Value) -> bool:
    """a:b is the same ratio as 2a:2b and as a/b; a time of day (with leading zeros) is only itself."""
    if isinstance(answer, Ratio) and isinstance(gold, Ratio):
        if answer.written == gold.written:
            return True
        if len(answer.items) != len(gold.items) or _is_time(answer) or _is_time(gold):
            return False
        pairs = list(zip(answer.items, gold.items, strict=True))
        return all(equal_scalars(a * pairs[0][1], g * pairs[0][0]) for a, g in pairs[1:])
    ratio, other = (answer, gold) if isinstance(answer, Ratio) else (gold, answer)
    if not isinstance(ratio, Ratio) or _is_time(ratio) or len(ratio.items) != 2 or not isinstance(other, sympy.Expr):
        return False
    return equal_scalars(ratio.items[0], other * ratio.items[1])


def _is_time(ratio: Ratio) -> bool:
    return re.search(r":0", ratio.written) is not None or any(item.is_zero for item in ratio.items)


def _equal_residues(answer: Value, gold: Value) -> bool:
    if isinstance(answer, Residue) and isinstance(gold, Residue):
        same = equal_scalars(answer.modulus, gold.modulus)
        distance = (answer.value - gold.value) / gold.modulus if gold.modulus.is_nonzero else None
        return same and distance is not None and bool(distance.is_integer)
    value, gold_value = (side.value if isinstance(side, Residue) else side for side in (answer, gold))
    return equal_values(value, gold_value)
