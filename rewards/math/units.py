"""What may stand after a number without changing its value: units, percent, degrees, currency."""

import re

from .latex import TEXT_COMMAND

CURRENCY = "€£¥₹"
_POWER = r"(?:\^\s*(?:[23]|\{\s*[23]\s*\})|[²³])?"
# Unit symbols that need no blank before them; single letters are left out, they may be variables.
_SYMBOL = r"(?:[kcdm]m/[hs]|[kcdm]m|[km]g|m[lL]|ft|in|oz|lbs?|mph|km/h|hrs?|min|secs?|cents)"
_PIECE = re.compile(
    rf"""\s*(?:
        \\?% | [{CURRENCY}] | m[²³]
      | \^\s*(?:\\circ|\{{\s*\\circ\s*\}}) | \\degree(?![A-Za-z])
      | \\frac\s*\{{\s*{TEXT_COMMAND}[A-Za-z\s.]*\}}\s*\}}\s*\{{\s*{TEXT_COMMAND}[A-Za-z\s.]*\}}{_POWER}\s*\}}
      | /?\s*{TEXT_COMMAND}(?P<text>[A-Za-z\s./,()-]*)\}}{_POWER}
      | {_SYMBOL}(?![A-Za-z]){_POWER}
      )
      | \s+(?P<word>[A-Za-z]{{3,}}|of|in|on|at|by|sq|sq\.|pm|am){_POWER}(?![A-Za-z0-9])""",
    re.VERBOSE,
)
_MAX_PIECES = 16

# Words that make another value of a number ("5 million") or offer a second one ("72 or 73") ...
VALUE_WORDS = frozenset(
    """
    or and to versus minus plus times over mod modulo base point
    squared cubed factorial choose power root sqrt frac sin cos tan sec csc cot log ln exp pi inf infinity
    zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty
    sixty seventy eighty ninety
    hundred thousand million billion trillion hundreds thousands millions billions trillions
    dozen dozens score half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths
    seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths
    """.split()
)
# ... and words that take it back or go on about it: after any of these a number is not plain.
_DOUBT_WORDS = frozenset(
    """
    not no nor but than if is are was wrong incorrect except either else unless through until
    approximately about around between least most k maybe perhaps possibly probably under above below
    """.split()
)
_NOT_UNITS = VALUE_WORDS | _DOUBT_WORDS


def changes_value(words: str) -> bool:
    """Do these words after a number make it another number, offer a second one, or take it back?"""
    found = re.findall(r"[a-z]+", words.lower())
    if found[-1:] in (["times"], ["point"]):  # 3 times; but "3 times five" goes on
        found.pop()
    kept = [word for word, after in zip(found, [*found[1:], "to"], strict=False) if word != "to" or after in _NOT_UNITS]
    return not _NOT_UNITS.isdisjoint(kept)  # "3 to 4", but "3 ways to choose"


def only_units(rest: str) -> bool:
    """True if `rest`, the tidied text after a number, leaves the number's value unchanged."""
    position = 0
    for _ in range(_MAX_PIECES):
        piece = _PIECE.match(rest, position)
        if piece is None:
            break
        if changes_value(piece["text"] or piece["word"] or ""):
            return False
        position = piece.end()
    return not rest[position:].strip()
