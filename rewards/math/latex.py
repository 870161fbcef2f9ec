"""Tidying of LaTeX and prose around a final answer. Text in, text out; every pass is linear."""

import re

_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-",
        "\u00a0": " ", "\u2007": " ", "\u2009": " ", "\u202f": " ",
        "\ufeff": None, "\u200b": None, "\u2060": None,
        "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u2044": "/",
        "\u00b0": r"^\circ", "\uff0c": ",", "\u3002": ".", "\uff1d": "=",
    }
)  # fmt: skip
_TEXT = r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname)"
TEXT_COMMAND = _TEXT + r"\s*\{"

# 11,\! 111 and 14{,}916: the blanks belong to the separator.
_THIN_GROUP = re.compile(r",\\!\s*|\s?\{\s?,\s?\}\s?")
_SIZING = re.compile(r"\\(?:left|right|displaystyle|textstyle|limits)(?![A-Za-z])|\\!|\\noindent\b")
_SPACE = re.compile(r"\\(?:quad|qquad|thinspace|enspace)(?![A-Za-z])|\\[,;:> ]|~")
_MATH_MARK = re.compile(r"\\?\$|\\[()\[\]]")
_TEXT_GROUP = re.compile(TEXT_COMMAND + r"([^{}]*)\}")
_FRACTION_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")
# A blank between two letters or digits separates them: "1 2" is not 12.
_FREE_BLANK = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")

_MAX_WRAPPERS = 8


def tidy(text: str) -> str:
    """Undo typography that carries no value: unicode signs, math delimiters, sizing, trailing dots.

    `$` marks (delimiter or currency) become two blanks, so that `$1$ $000$` does not read as the
    grouped number `1 000`.
    """
    text = _THIN_GROUP.sub(",", text.translate(_UNICODE))
    text = _SPACE.sub(" ", _MATH_MARK.sub("  ", text))
    text = _FRACTION_STYLE.sub(r"\\frac", _SIZING.sub("", text))
    return text.strip(" \t\r\n*`").rstrip(" \t\r\n*`.,;:\\")


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
    return _FREE_BLANK.sub("", text.strip())


def _closing(text: str) -> int:
    """Index of the bracket that closes text[0], or -1."""
    opening, depth = text[0], 0
    closing = {"{": "}", "(": ")"}[opening]
    for index, char in enumerate(text):
        depth += (char == opening) - (char == closing)
        if depth == 0:
            return index
    return -1
