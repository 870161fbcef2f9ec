r"""What tells two answers apart although their values agree: other units (5 m, 5 cm), other unknowns (x = 5, y = 5)."""

import re

from .latex import normalise

_WORD = re.compile(r"(?<![A-Za-z\\])([A-Za-z.]+)(?:\^(?:[23]|\{[23]\})|[²³])?$")
_UNITS = {
    spelling: spellings.split()[0]
    for spellings in (
        "m meter meters metre metres", "cm centimeter centimeters centimetre centimetres",
        "mm millimeter millimeters millimetre millimetres", "km kilometer kilometers kilometre kilometres",
        "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "g gram grams", "kg kilogram kilograms",
        "mg milligram milligrams", "s sec secs second seconds", "min mins minute minutes", "h hr hrs hour hours",
        "day days", "week weeks", "dollars dollar", "cents cent", "degrees degree", "rad radian radians",
        "am a.m. a.m", "pm p.m. p.m",
    )
    for spelling in spellings.split()
}  # fmt: skip
_ASSIGNED = re.compile(
    r"(?P<name>[a-z](?:_(?:[0-9a-z]|\{[0-9a-z]+\}))?|\([a-z](?:,[a-z])+\))(?:\([a-z]\))?"
    r"(?P<sign>=|<|>|≤|≥|∈|\\(?:leq?|geq?|in)(?![a-z]))(?P<rest>.*)",
    re.DOTALL,
)
_LENGTH = 300
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_SEVERAL = re.compile(r",|;|\\text|\b(?:and|or)\b|\\q?quad")
_FUNCTION_NAMES = frozenset("fghy")


def conflicting(answer: str, gold: str) -> bool:
    """Do both sides say in what unit, or of what variable, they give a value, and differ in that?

    Other units are refused as they stand: nothing is converted. Capital letters are not told apart, because
    an area may be called A or S, and neither are y = and f(x) =.
    """
    left, right = normalise(answer[-_LENGTH:]), normalise(gold[-_LENGTH:])
    units = _unit(left), _unit(right)
    if all(units) and units[0] != units[1]:
        return True
    one, other = _ASSIGNED.fullmatch(left), _ASSIGNED.fullmatch(right)
    if one is None or other is None:
        return False
    names = [re.sub("[{}]", "", side["name"]) for side in (one, other)]
    if names[0] == names[1] or _FUNCTION_NAMES.issuperset(names) and "y" in names:
        return False
    if names[0].startswith("(") or names[1].startswith("("):
        return names[0][0] == names[1][0]
    if _SEVERAL.search(one["rest"]) or _SEVERAL.search(other["rest"]):
        return False
    return names[0] not in other["rest"] and names[1] not in one["rest"]  # y = 2x may be written x = y/2


def _unit(text: str) -> str | None:
    found = _WORD.search(text)
    before = text[: found.start()] if found else ""
    if found is None or not any(char.isdigit() for char in before):
        return None
    if len(found[1]) == 1 and (not before.endswith(" ") or _VARIABLE.search(before)):
        return None  # 3 s + 5 m is a sum of products
    return _UNITS.get(found[1])
