"""Tidying of LaTeX and prose around a final answer. Text in, text out; every pass is linear."""

import re

# Full-width digits, letters and signs, as Chinese keyboards write them; the minus sign is among them.
FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\ufe63": "-",
        "\u00a0": " ", "\u2007": " ", "\u2009": " ", "\u202f": " ",
        "\ufeff": None, "\u200b": None, "\u2060": None,
        "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u2044": "/",
        "\u00b0": r"^\circ", "\u3002": ".",
    }
    | FULL_WIDTH
)  # fmt: skip
_TEXT = r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname)"
TEXT_COMMAND = _TEXT + r"\s*\{"

# 11,\! 111 and 14{,}916: the blanks belong to the separator.
_THIN_GROUP = re.compile(r",\\!\s*|\s?\{\s?,\s?\}\s?")
_SIZING = re.compile(r"\\(?:left|right|displaystyle|textstyle|limits)(?![A-Za-z])|\\!|\\noindent\b")
_SPACE = re.compile(r"\\(?:thinspace|enspace)(?![A-Za-z])|\\[,;:> ]|~")
_WIDE_SPACE = re.compile(r"\\q?quad(?![A-Za-z])")
# Fonts, sizes and colours: of the text after them, or of their argument.
FONTS = re.compile(
    r"(?<!\\)\\(?:(?:bf|rm|it|sf|bfseries|tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])"
    r"|(?:text)?color\s*\{[A-Za-z]{1,20}\})\s*"
)
_MATH_MARK = re.compile(r"\\?\$|\\[()\[\]]")
_TEXT_GROUP = re.compile(TEXT_COMMAND + r"([^{}]*)\}")
_FRACTION_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")
# A blank between two letters or digits separates them: "1 2" is not 12.
_FREE_BLANK = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")

_WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")
GOES_ON = re.compile(r"(?:,|\.[0-9]+) ?\.\.\.?$")
_HALF_DAY = re.compile(r"(?<=[0-9])\s*([ap])\.?\s?m\.?$")
_BLANKS = re.compile(r"\s+")

_MAX_WRAPPERS = 8


def tidy(text: str) -> str:
    """Undo typography that carries no value: unicode signs, math delimiters, sizing, trailing dots.

    `$` marks (delimiter or currency) and quads become two blanks, so that `$1$ $000$` does not read as the
    grouped number `1 000`.
    """
    text = _THIN_GROUP.sub(",", text.translate(_UNICODE))
    text = _SPACE.sub(" ", _WIDE_SPACE.sub("  ", _MATH_MARK.sub("  ", FONTS.sub("", text))))
    text = _FRACTION_STYLE.sub(r"\\frac", _SIZING.sub("", text))
    text = text.strip(' \t\r\n*`"\u201c\u201d')
    if GOES_ON.search(text):  # 3.14... is not 3.14
        return text
    return text.rstrip(" \t\r\n*`.,;:\\")


def unwrap(text: str) -> str:
    r"""Remove braces, parentheses or a `\text{}` that enclose the whole of a tidied text."""
    for _ in range(_MAX_WRAPPERS):
        group = _TEXT_GROUP.fullmatch(text)
        if group:
            inner = group[1]
        elif text[:1] in ("{", "(") and _closing(text) == len(text) - 1:
            inner = text[1:-1]
        else:
            return text
        text = inner.strip()
    return text


def normalise(text: str) -> str:
    r"""The form in which answers that are not numbers are compared as strings."""
    text = tidy(text)
    group = _TEXT_GROUP.fullmatch(text)
    text = _TEXT_GROUP.sub(r"\1", text)
    if group or re.fullmatch(r"\([A-Za-z]\)", text):  # (C) and C name the same choice
        text = unwrap(text)
    text = _HALF_DAY.sub(r" \1m", text.strip())
    return _FREE_BLANK.sub("", _BLANKS.sub(" ", text.strip()))


def same_words(left: str, right: str) -> bool:
    r"""Are two answers the same word or words, but for capitals? `AB` and `ab` are products, not words."""
    a, b = normalise(left), normalise(right)
    if a.casefold() != b.casefold() or not _WORDS.fullmatch(a):
        return False
    in_text = any(_TEXT_GROUP.fullmatch(tidy(side)) for side in (left, right))
    return len(a) > 1 and in_text or len(a) > 2 and a.capitalize() == b.capitalize() != a.upper()


def _closing(text: str) -> int:
    """Index of the bracket that closes text[0], or -1."""
    opening, depth = text[0], 0
    closing = {"{": "}", "(": ")"}[opening]
    for index, char in enumerate(text):
        depth += (char == opening) - (char == closing)
        if depth == 0:
            return index
    return -1
