r"""One form for all the ways to typeset a statement, as tokens; the coarser word form of decontamination.

`tokens` goes further than `normalise_statement` (which splits depend on, and which must never change): `\frac12`
and `\dfrac{1}{2}`, `\leq` and `\u2264`, `x^{2}` and `x^2`, `\mathrm{cm}` and `cm` give the same tokens. Digits, signs
and operators stay.
"""

import re
from collections.abc import Sequence

from data.split import normalise_statement

_SPELLINGS = (
    (re.compile(r"[_^]\s*\{\s*\}"), ""),  # a trick to move the baseline
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:cdot|times|ast)(?![a-zA-Z])|[\u00d7\u00b7\u22c5]"), "*"),
    (re.compile(r"\\leq?(?:slant)?(?![a-zA-Z])|\u2264"), r" \\le "),
    (re.compile(r"\\geq?(?:slant)?(?![a-zA-Z])|\u2265"), r" \\ge "),
    (re.compile(r"\\neq?(?![a-zA-Z])|\u2260"), r" \\ne "),
    (re.compile(r"\\(?:[lc]?dots[cbmio]?|hdots)(?![a-zA-Z])|\u2026|\.\.\.+"), r" \\dots "),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\[bp]?mod(?![a-zA-Z])"), r" \\mod "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0"), r" \\circ "),
    (re.compile("\u03c0"), r" \\pi "),
    (re.compile("\u221a"), r" \\sqrt "),
    (re.compile("\u2220"), r" \\angle "),
    # Fonts and sizes.
    (re.compile(r"\\(?:text|math)(?:bf|rm|it|sf|up|tt|normal)?(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:mbox|hbox|emph|operatorname|big|Big|bigg|Bigg|displaystyle|limits)[lr]?(?![a-zA-Z])\*?"), " "),
)  # fmt: skip
_LEFT_RIGHT = re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?")
_TOKEN = re.compile(r"\\?[a-z]+|\d+(?:[.,:]\d+)*|[^\W_]+|[-+*/=<>^_()\[\]|!%&#']")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million half twice "
    "thrice double triple first second third fourth fifth".split()
)
_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_CAPITALS = re.compile(r"(?<![\\A-Za-z])[A-Z]{2,}(?![A-Za-z])")


def tokens(statement: str) -> tuple[str, ...]:
    """Words, numbers, LaTeX commands (without the backslash) and operators; braces and typesetting are gone."""
    text = _LEFT_RIGHT.sub(" ", statement)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    found = _TOKEN.findall(normalise_statement(text))
    return tuple(_THOUSANDS.sub("", token.removeprefix("\\")) for token in found)


def words(of: Sequence[str]) -> tuple[str, ...]:
    """The tokens that are words or numbers."""
    return tuple(token for token in of if token[0].isalnum())


def marks(statement: str) -> tuple[str, ...]:
    """What tells two versions of a problem apart, sorted: its numbers, in digits and in words, and words in capitals
    (the word whose letters are arranged, the names of points)."""
    numbers = [token for token in tokens(statement) if token[0].isdigit() or token in _NUMBER_WORDS]
    return tuple(sorted([*numbers, *_CAPITALS.findall(_FIGURE.sub("", statement))]))
