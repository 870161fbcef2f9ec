r"""Exact rational values of answers: integers, decimals, fractions, scientific notation.

Numbers are compared as `fractions.Fraction`, never as floats and never with a tolerance: 73.00000001 is not
73. Only a long decimal may stand for the value it is rounded from (`rounds_to`),
and a percent sign is a unit (28\% equals 28, not 0.28).
Nothing is evaluated: `2^{10}`, `\sqrt{4}` or `3+4` are not numbers here. Sizes are bounded, so that
`10^999999999` is refused instead of built.
"""

import math
import re
from fractions import Fraction

from .latex import tidy, unwrap
from .units import CURRENCY, only_units

MAX_CHARS = 10_000
MAX_DIGITS = 4_000  # below CPython's 4,300-digit limit of int(str)
MAX_EXPONENT = 4_000
MIN_PLACES = 6  # of a decimal that may be a rounded value
FLOAT_DIGITS = 12  # of a decimal that may stand for an exact gold

# Digits in groups of three split by commas or by blanks, or ungrouped; then an optional fraction part.
_UNSIGNED = (
    r"(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])|[0-9]+)?"
    r"(?:\.[0-9]*)?"
)
_SIGNED = rf"[-+]?\s*{_UNSIGNED}"
_SIGN = re.compile(rf"\s*(?P<sign>[-+]?)\s*[{CURRENCY}]?\s*")
_LATEX_FRACTION = re.compile(
    rf"(?P<whole>[0-9]*)\s*\\frac\s*(?:\{{\s*(?P<n>{_SIGNED})\s*\}}|(?P<n1>[0-9]))"
    rf"\s*(?:\{{\s*(?P<d>{_SIGNED})\s*\}}|(?P<d1>[0-9]))"
)
# A whole part is only read before a numerator of one or two digits: "1 234/567" is 1234/567.
_SLASH_FRACTION = re.compile(rf"(?:(?P<whole>[0-9]+) +(?=[1-9][0-9]?\s*/))?(?P<n>{_UNSIGNED})\s*/\s*(?P<d>{_UNSIGNED})")
_SCIENTIFIC = re.compile(
    rf"(?:(?P<m>{_UNSIGNED})\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*"
    r"(?:\{\s*(?P<e>[-+]?[0-9]+)\s*\}|(?P<e1>[-+]?[0-9]+))"
)
_E_NOTATION = re.compile(rf"(?P<m>{_UNSIGNED})[eE](?P<e>[-+]?[0-9]+)(?![0-9])")
_PLAIN = re.compile(_UNSIGNED)
_DECIMAL = re.compile(r"\.([0-9]+)[^0-9.]*$")

# The left side of `m+n = 73`: a name or a sum of names, without coefficients.
_NAME = re.compile(
    r"(?:\\(?:text|mathrm|operatorname)\{[A-Za-z ]*\}"
    r"|\\(?:angle|overline|triangle|alpha|beta|theta|max|min|gcd|det)(?![A-Za-z])|\\#|\[[A-Z]+\]|\^\{-1\}(?=\()"
    r"|[A-Z]{2}\^(?:2|\{2\})|[A-Za-z]|_(?:[0-9A-Za-z]|\{[0-9A-Za-z]+\})|\([A-Za-z0-9, ]*\)|[|+' {}-])+"
)
_MAX_NAME = 64
_DECIMAL_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9])")


def parse_number(text: str, *, decimal_comma: bool = False) -> Fraction | None:
    r"""The exact value of `text`, or None where it is not one plain number.

    Accepts signs, leading zeros, thousands separators (`10,000`, `10{,}000`, `10\,000`), `a/b`,
    `\frac{a}{b}`, mixed numbers, `1.5\times10^{3}`, `1.5e3`, units, and `name = number`. A chain such as
    `74 = 73` has a value only if its sides agree. Several values (`73 or 74`, `1, 2`) have none.

    decimal_comma: read `1,22` as 1.22.
    """
    if len(text) > MAX_CHARS:
        return None
    *left, last = unwrap(tidy(text)).split("=")
    value = _value(last, decimal_comma)
    if value is None or not all(_is_name(side) or _value(side, decimal_comma) == value for side in left):
        return None
    return value


def exactly_equal(answer: str, gold: str) -> bool | None:
    """Comparison of two numbers; None unless both sides are numbers, so that another comparison must decide."""
    a, g = parse_number(answer), parse_number(gold)
    if a is None and g is not None:
        a = _continental(answer, g)
    elif g is None and a is not None:
        g = _continental(gold, a)
    if a is None or g is None:
        return None
    return a == g or rounds_to(answer, a, gold, g)


def rounds_to(answer: str, a: Fraction, gold: str, g: Fraction) -> bool:
    """Is one of two fractional values the other, correctly rounded to the many places that it is written with?

    A decimal gold with MIN_PLACES places and significant digits is itself a rounded value: an answer that
    rounds to it, or is it rounded to as many, is right. An exact gold (1/12) takes only what a calculator
    prints: FLOAT_DIGITS significant digits. Integers and shorter decimals are exact, and no rounding ends
    in an integer.
    """
    if a.denominator == 1 or g.denominator == 1:
        return False
    gold_places, answer_places = _decimal_places(gold), _decimal_places(answer)
    if gold_places >= MIN_PLACES and _significant(g, gold_places) >= MIN_PLACES:
        if _rounded(a, gold_places) == g:
            return True
        digits = MIN_PLACES
    else:
        digits = FLOAT_DIGITS
    return answer_places >= MIN_PLACES and _significant(a, answer_places) >= digits and _rounded(g, answer_places) == a


def _decimal_places(text: str) -> int:
    """Digits after the point, without trailing zeros, of an answer that is one decimal; 0 otherwise."""
    match = _DECIMAL.search(tidy(text))
    return len(match[1].rstrip("0")) if match else 0


def _significant(value: Fraction, places: int) -> int:
    return len(str(abs(int(value * 10**places))))


def _rounded(value: Fraction, places: int) -> Fraction:
    scale: int = 10**places
    return Fraction(math.floor(abs(value) * scale + Fraction(1, 2)) * (1 if value >= 0 else -1), scale)


def _continental(text: str, other: Fraction) -> Fraction | None:
    """The value with a decimal comma. Refused against integers: `73,0` may be a list that hedges."""
    return None if other.denominator == 1 else parse_number(text, decimal_comma=True)


def _is_name(side: str) -> bool:
    side = side.strip()
    return len(side) <= _MAX_NAME and any(c.isalpha() for c in side) and _NAME.fullmatch(side) is not None


def _value(text: str, decimal_comma: bool) -> Fraction | None:
    text = unwrap(text.strip())
    if decimal_comma and text.count(",") == 1 and "." not in text:
        text = _DECIMAL_COMMA.sub(".", text)
    prefix = _SIGN.match(text)
    start = prefix.end() if prefix else 0
    for pattern, build in _FORMS:
        match = pattern.match(text, start)
        if match:
            if not only_units(text[match.end() :]):
                return None
            value = build(match)
            return -value if value is not None and prefix and prefix["sign"] == "-" else value
    return None


def _decimal(text: str) -> Fraction | None:
    sign = -1 if text.startswith("-") else 1
    whole, _, part = re.sub(r"[-+,\s]", "", text).partition(".")
    if len(whole) + len(part) > MAX_DIGITS:
        return None
    return sign * Fraction(int(whole + part or "0"), 10 ** len(part))


def _fraction(match: re.Match[str]) -> Fraction | None:
    groups = match.groupdict()
    numerator = _decimal(groups["n"] or groups.get("n1") or "")
    denominator = _decimal(groups["d"] or groups.get("d1") or "")
    if numerator is None or not denominator:
        return None
    value = numerator / denominator
    if not groups["whole"]:
        return value
    whole = _decimal(groups["whole"])
    # 2\frac{1}{2} is a mixed number; 2\frac{7}{2} would be a product, which is not a plain number.
    return whole + value if whole is not None and 0 < value < 1 else None


def _power_of_ten(match: re.Match[str]) -> Fraction | None:
    groups = match.groupdict()
    exponent = groups["e"] or groups.get("e1") or ""
    mantissa = _decimal(groups["m"] or "1")
    if mantissa is None or len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    return mantissa * Fraction(10) ** int(exponent)


_FORMS = (
    (_LATEX_FRACTION, _fraction),
    (_SLASH_FRACTION, _fraction),
    (_SCIENTIFIC, _power_of_ten),
    (_E_NOTATION, _power_of_ten),
    (_PLAIN, lambda match: _decimal(match[0])),
)
