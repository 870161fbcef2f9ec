"""From the text of an answer to a value: lists, relations, sets and brackets; `expression` reads what they hold."""

import sympy

from .cursor import closes, opens, split
from .expression import GREEK, MAX_DEPTH, Expression, interval_ends
from .operations import scalar
from .tokens import Token, Unreadable, tokenize
from .units import changes_value
from .values import Braces, Bracketed, Listing, Ratio, Region, Relation, Residue, Text, Value

RELATIONS = frozenset(["=", "<", ">", "le", "ge", "ne", "approx", "in", "equiv"])
_SET_OPERATORS = ("cup", "cap", "setminus")
_DEFINED = ("sum", "prod", "int", "lim")
_NAMES = GREEK | {"angle", "triangle"}
MAX_ITEMS = 300
MAX_NAME = 40


def parse_answer(text: str, *, grouped: bool = True) -> Value:
    """The value of an answer. Raises Unreadable if it is none of the kinds in `values`.

    grouped: read `1,234` as one number.
    """
    return _values(tokenize(text, grouped=grouped), 0)


def _values(tokens: list[Token], depth: int) -> Value:
    """One value or several, as they stand at top level or inside brackets."""
    if depth > MAX_DEPTH:
        raise Unreadable("too deep")
    if (
        len(tokens) > 1
        and opens(tokens[0])
        and closes(tokens[-1])
        and tokens[0].kind != "begin"
        and _one_bracket(tokens)
    ):
        return _bracket(tokens, depth)
    groups = split(tokens, ";")
    if len(groups) > 1:
        return Listing(tuple(_as_tuple(_commas(group, depth)) for group in groups if group))
    return _commas(tokens, depth)


def _as_tuple(value: Value) -> Value:
    """`p=5, q=2` between semicolons is one solution."""
    return Bracketed(value.items, "(", ")") if isinstance(value, Listing) else value


def _commas(tokens: list[Token], depth: int) -> Value:
    parts = [part for part in split(tokens, ",", "and", "or") if part]
    if len(parts) > MAX_ITEMS or not parts:
        raise Unreadable("nothing, or too much")
    if len(parts) == 1:
        return _item(parts[0], depth)
    words = [token.text for token in tokens if token.kind == "command" and token.text in ("and", "or")]
    items: list[Value] = []
    for part in parts:
        value = _item(part, depth)
        items += value.items if isinstance(value, Listing) else [value]
    return Listing(tuple(items), "or" if "or" in words else "and" if words else ",")


def _one_bracket(tokens: list[Token]) -> bool:
    depth = 0
    for index, token in enumerate(tokens):
        depth += opens(token) - closes(token)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _bracket(tokens: list[Token], depth: int) -> Value:
    opening, inside, closing = tokens[0].text, tokens[1:-1], tokens[-1].text
    if opening in ("lfloor", "lceil"):
        return Expression(list(tokens), _values, depth).parse()
    if opening == "{set":
        return _braces(inside, depth)
    if not inside:
        raise Unreadable("an empty bracket")
    value = _values(inside, depth + 1)
    if opening == "{" and closing == "}":
        return value
    items = value.items if isinstance(value, Listing) else (value,)
    if len(split(inside, ",", ";")) == 1 and (opening, closing) != ("langle", "rangle"):
        if (opening, closing) not in (("(", ")"), ("[", "]")):
            raise Unreadable("brackets do not match")
        return value
    return Bracketed(items, opening, closing)


def _braces(tokens: list[Token], depth: int) -> Value:
    r"""`\{1, 2\}`, or `\{x : x > 1\}`, which is what its condition is."""
    if not tokens:
        return Region(sympy.EmptySet)
    condition = split(tokens, ":", "|")
    if len(condition) == 2 and all(condition):
        value = _values(condition[1], depth + 1)
        if isinstance(value, Relation | Listing):
            return value
    value = _values(tokens, depth + 1)
    return Braces(value.items if isinstance(value, Listing) else (value,))


def _item(tokens: list[Token], depth: int) -> Value:
    """One value: prose, ± (two values), a relation, or a side of one."""
    # "No such number" is not N times o with a unit. A lone variable may have one: n cm.
    kinds = [token.kind for token in tokens]
    if "text" in kinds and {"text", "letter"}.issuperset(kinds) and kinds[:2] != ["letter", "text"]:
        return Text(" ".join(token.text for token in tokens).casefold())
    if any(token.kind == "command" and token.text in ("pm", "mp") for token in tokens):
        upper, lower = _item(_signed(tokens, "+", "-"), depth), _item(_signed(tokens, "-", "+"), depth)
        return Listing((upper, lower))
    tokens = _without_units(tokens)
    sides, operators = _sides(tokens)
    if not operators:
        return _side(tokens, depth)
    residue = _residue(sides[-1], depth)
    if residue is not None and operators[-1] == "equiv":
        return residue
    names = tuple(_name(side) for side in sides)
    plain = tuple(_plain(side) for side in sides)
    values = tuple(_side_or_name(side, name, depth) for side, name in zip(sides, names, strict=True))
    return Relation(values, tuple(operators), names, plain)


def _signed(tokens: list[Token], plus_minus: str, minus_plus: str) -> list[Token]:
    signs = {"pm": plus_minus, "mp": minus_plus}
    return [
        Token("symbol", signs[token.text], token.spaced) if token.kind == "command" and token.text in signs else token
        for token in tokens
    ]


def _without_units(tokens: list[Token]) -> list[Token]:
    """Prose after a value is its unit, unless it changes the value ("million") or takes it back ("or less")."""
    end = len(tokens)
    while end and (tokens[end - 1].kind == "text" or _unit_power(tokens, end)):
        end -= 1 if tokens[end - 1].kind == "text" else 2
    trailing = [token.text for token in tokens[end:] if token.kind == "text"]
    if not end or not trailing or any(token.text in ("^", "_", "/") for token in tokens[end - 1 : end]):
        return tokens
    if any(changes_value(words) for words in trailing):
        raise Unreadable("words that change the value")
    return tokens[:end]


def _unit_power(tokens: list[Token], end: int) -> bool:
    return (
        end > 2
        and tokens[end - 1].text in ("2", "3")
        and tokens[end - 2].text == "^"
        and tokens[end - 3].kind == "text"
    )


def _sides(tokens: list[Token]) -> tuple[list[list[Token]], list[str]]:
    sides: list[list[Token]] = [[]]
    operators: list[str] = []
    depth = 0
    for token in tokens:
        depth += opens(token) - closes(token)
        if depth == 0 and token.kind in ("symbol", "command") and token.text in RELATIONS:
            operators.append(token.text)
            sides.append([])
        else:
            sides[-1].append(token)
    if operators and not all(sides):
        raise Unreadable("a relation without a side")
    return sides, operators


def _name(tokens: list[Token]) -> str | None:
    """The name that a side is (`x`, `a_1`, `AB`, `W(n)`, `(p, q)`, `m + n`), without the arguments of a function.

    None for a side with numbers or powers, which has to be computed.
    """
    if len(tokens) > MAX_NAME or not tokens:
        return None
    if tokens[0].text in _DEFINED:
        return " ".join(token.text for token in tokens)
    kept: list[str] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token.text == "_":
            end = _closing(tokens, at + 1)
            kept.append("_" + "".join(part.text for part in tokens[at + 1 : end] if part.text not in "{}"))
            at = end
        elif token.text == "(" and kept:  # arguments
            at = _closing(tokens, at)
        elif _may_name(token):
            kept += [token.text] if token.text not in ("{", "}") else []
            at += 1
        else:
            return None
    named = any(token.kind in ("letter", "text") or token.text in _NAMES for token in tokens)
    return " ".join(kept) if named else None


def _plain(tokens: list[Token]) -> bool:
    """Is the side one number as written, with nothing to compute?"""
    return sum(token.kind == "number" for token in tokens) == 1 and all(
        token.kind == "number" or token.text in ("+", "-", "%", "degree", "^", "{", "}") for token in tokens
    )


def _closing(tokens: list[Token], start: int) -> int:
    """The index after the bracket, or the single token, that begins at start."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += opens(tokens[index]) - closes(tokens[index])
        if depth <= 0:
            return index + 1
    return len(tokens)


def _may_name(token: Token) -> bool:
    if token.kind == "command":
        return token.text in _NAMES or token.text in ("angle", "triangle", "frac", "det")
    return token.kind in ("letter", "text") or token.kind == "symbol" and token.text in "(){}'|:+-,"


def _side_or_name(tokens: list[Token], name: str | None, depth: int) -> Value | None:
    try:
        return _side(tokens, depth)
    except Unreadable:
        if name is None and not _only_unknown(tokens):
            raise
        return None


def _only_unknown(tokens: list[Token]) -> bool:
    """A lone command that we do not know is a name."""
    return len(tokens) == 1 and tokens[0].kind == "command"


def _side(tokens: list[Token], depth: int) -> Value:
    tokens = _without_units(tokens)
    residue = _residue(tokens, depth)
    if residue is not None:
        return residue
    ratio = split(tokens, ":")
    if len(ratio) > 1:
        parts = tuple(scalar(_side(part, depth)) for part in ratio if part)
        if len(parts) != len(ratio):
            raise Unreadable("an empty part of a ratio")
        return Ratio(parts, "".join(token.text for token in tokens))
    for operator in _SET_OPERATORS:
        parts_of_set = split(tokens, operator)
        if len(parts_of_set) > 1:
            return _combined(operator, [as_region(_side(part, depth)) for part in parts_of_set if part])
    if len(tokens) > 1 and opens(tokens[0]) and tokens[0].kind != "begin" and _one_bracket(tokens):
        return _bracket(tokens, depth)
    return Expression(list(tokens), _values, depth).parse()


def _combined(operator: str, regions: list[sympy.Set | None]) -> Region:
    sets = [region for region in regions if region is not None]
    if len(sets) < 2 or len(sets) < len(regions):
        raise Unreadable("not sets")
    if operator == "cup":
        return Region(sympy.Union(*sets))
    if operator == "cap":
        return Region(sympy.Intersection(*sets))
    return Region(sympy.Complement(sets[0], sympy.Union(*sets[1:])))


def _residue(tokens: list[Token], depth: int) -> Residue | None:
    """`3 \\pmod{5}` or `3 (mod 5)`."""
    for index, token in enumerate(tokens):
        if token.kind == "command" and token.text == "pmod" and index:
            return Residue(scalar(_side(tokens[:index], depth)), scalar(_side(tokens[index + 1 :], depth)))
        if token.text == "(" and index and [t.text for t in tokens[index + 1 : index + 2]] == ["mod"]:
            if tokens[-1].text == ")":
                return Residue(scalar(_side(tokens[:index], depth)), scalar(_side(tokens[index + 2 : -1], depth)))
    return None


def as_region(value: Value | None) -> sympy.Set | None:
    """The set of real numbers that a value is, or None. A scalar is not a set."""
    if isinstance(value, Region):
        return value.numbers
    if isinstance(value, Braces):
        items = [
            item for braced in value.items for item in (braced.items if isinstance(braced, Listing) else (braced,))
        ]
        return sympy.FiniteSet(*items) if all(isinstance(item, sympy.Expr) for item in items) else None
    if isinstance(value, Bracketed):
        ends = interval_ends(value)
        if ends and all(end.is_extended_real for end in ends):
            return sympy.Interval(*ends, value.opening == "(", value.closing == ")")
    return None
