r"""Where a response states its answer.

Rules, in order:
1. Only the text after the last `</think>` counts. A `<think>` that is never closed has no answer; a response
   without any `<think>` is taken whole.
2. The answer is the last complete `\boxed{}`, `\fbox{}` or `<answer>…</answer>` there. A last one that is
   empty or unfinished means no answer: earlier boxes are not consulted.
3. Boxes joined by "or", "and" or a comma are one answer with several values: the whole stretch is returned,
   which equals no single value. They are not merged into a set.
4. Mode "any" falls back, only if there is no box and no tag at all, to the last explicit final-answer
   phrase, then to the mathematical expression around the last number. Mode "boxed" does not.

Every pass is linear in the length of the response.
"""

import re
from dataclasses import dataclass
from typing import Literal

from .exact import parse_number
from .units import VALUE_WORDS

Mode = Literal["any", "boxed"]


def extract_answer(response: str, *, mode: Mode = "any") -> str | None:
    """The answer stated by `response`, as written there, or None. Raises ValueError for an unknown mode."""
    if mode not in ("any", "boxed"):
        raise ValueError(f"mode must be 'any' or 'boxed', not {mode!r}")
    text = answer_text(response)
    if text is None:
        return None
    marks, unfinished = _scan(text)
    if marks or unfinished:
        found = _last_mark(text, marks, unfinished)
    elif mode == "any":
        found = _after_phrase(text)
        if found is None:
            found = _last_expression(text)
    else:
        found = None
    return (found or "").strip() or None


def answer_text(response: str) -> str | None:
    """The part of a response that may hold the answer; None if the thinking never ends."""
    closed = response.rfind("</think>")
    if response.rfind("<think>") > closed:
        return None
    return response[closed + len("</think>") :] if closed >= 0 else response


# -- boxes and answer tags -------------------------------------------------------------------------

_TOKEN = re.compile(
    r"(?P<box>\\{1,4}(?:boxed|fbox)\s*\{)"
    r"|(?P<bare>\\boxed[ \t]+(?P<word>[^\s{}$\\]+))"
    r"|\\[\\{}]|(?P<open>\{)|(?P<close>\})|(?P<tag></?answer>)"
)
_MAX_NESTING = 8
_MAX_GAP = 40
_GLUE = re.compile(r"(?:\s|\$|\\[()\[\],;! ]|\\q?quad|[,;/|&])*")
_CONNECTOR = re.compile(r"\b(?:or|and|alternatively|maybe|possibly)\b|[或和]")


@dataclass(frozen=True, slots=True)
class _Mark:
    """A complete box or answer tag: text[start:end] with its content text[inner:inner_end]."""

    start: int
    inner: int
    inner_end: int
    end: int
    is_tag: bool


def _scan(text: str) -> tuple[list[_Mark], list[int]]:
    """All complete marks, sorted by start, and the starts of those that are never closed."""
    marks: list[_Mark] = []
    braces: list[tuple[int, int] | None] = []  # (start, inner) of a box, None for any other group
    tag: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        start, end = token.span()
        if token["box"]:
            braces.append((start, end))
        elif token["bare"]:
            marks.append(_Mark(start, token.start("word"), end, end, False))
        elif token["open"]:
            braces.append(None)
        elif token["close"]:
            opened = braces.pop() if braces else None
            if opened:
                marks.append(_Mark(*opened, start, end, False))
        elif token["tag"] == "<answer>":
            tag = (start, end)
        elif token["tag"] and tag:
            marks.append(_Mark(*tag, start, end, True))
            tag = None
    unfinished = [opened[0] for opened in (*braces, tag) if opened]
    return sorted(marks, key=lambda mark: mark.start), unfinished


def _last_mark(text: str, marks: list[_Mark], unfinished: list[int]) -> str | None:
    """The content of the last mark, of its inner box where it holds one, or the stretch of joined marks."""
    found: str | None = None
    inside = marks
    for _ in range(_MAX_NESTING):
        siblings = _outermost(inside)
        if not siblings:
            break
        last = siblings[-1]
        found = text[last.inner : last.inner_end]
        if not found.strip() or any(start > last.start for start in unfinished):
            return None
        first = len(siblings) - 1
        while first and _joined(text[siblings[first - 1].end : siblings[first].start]):
            first -= 1
        if first < len(siblings) - 1:
            return text[siblings[first].start : last.end]
        inside = [mark for mark in marks if mark.start >= last.inner and mark.end <= last.inner_end]
        # A tag may hold prose around its box; a box counts as wrapping another only if it holds nothing else.
        if not last.is_tag and not any(found.strip() == text[mark.start : mark.end] for mark in inside[:1]):
            break
    return found


def _outermost(marks: list[_Mark]) -> list[_Mark]:
    kept: list[_Mark] = []
    for mark in marks:
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def _joined(gap: str) -> bool:
    """Do two boxes with this text between them offer two values, as in `\\boxed{1} or \\boxed{2}`?"""
    if len(gap) > _MAX_GAP or re.search(r"[.!?:=]", gap):
        return False
    if _CONNECTOR.search(gap):
        return True
    return _GLUE.fullmatch(gap) is not None and ("\n" not in gap or any(c in gap for c in ",;/|&"))


def box_contents(text: str) -> list[str]:
    """What the complete boxes of a text hold, outermost ones only."""
    marks, _ = _scan(text)
    return [text[mark.inner : mark.inner_end] for mark in _outermost(marks) if not mark.is_tag]


# -- prose -----------------------------------------------------------------------------------------

_PHRASE = re.compile(
    r"\banswer\b[\s*_]*(?:(?:is|are|equals)\b[\s*_]*:?|[:=\uff1a])[\s*_]*"
    r"|####\s*:?\s*|答案(?:是|为|[:\uff1a])\s*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r".*?(?=[.!?](?:\s|$)|$)", re.MULTILINE)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")
_WINDOW = 600
_WORDS = "|".join(sorted(VALUE_WORDS, key=len, reverse=True))
_EXPRESSION = re.compile(
    rf"""(?:
        \\(?!text|mathrm|mathbf|mbox|begin|end)[A-Za-z]+ | \\[,;:!%{{}}|&\\ ]
      | (?<!\\)[()\[\]] | [0-9^_=<>+\-*/{{}}|!%&,'~ √∛π×·⋅÷±∓−²³⁴∞≤≥≠≈∑∏∫∪∩∈°€£¥]
      | [.:](?!\s|$)
      | (?<![A-Za-z])(?:{_WORDS})(?![A-Za-z])
      | (?<=[0-9)}}\]^_*/+=-])[A-Za-z]+(?![A-Za-z']) | (?<![A-Za-z'])[A-Za-z]+(?=[0-9({{\[^_*/+=-])
    )+""",
    re.VERBOSE | re.IGNORECASE,
)

# Remains of the sentence at either end of a run: blanks, commas, emphasis, closing brackets, conjunctions.
_LEFTOVER = re.compile(r"^(?:[\s,*_)}\]~]|\\[,;: ]|(?:and|or|to)\b)+|[\s,*_({\[~]+$")


def _after_phrase(text: str) -> str | None:
    """What follows the last "answer is", "Answer:", "####" in its sentence; None without such a phrase."""
    ends = [phrase.end() for phrase in _PHRASE.finditer(text)]
    if not ends:
        return None
    sentence = _SENTENCE.match(text, ends[-1])
    found = sentence[0] if sentence else ""
    if _PROSE.search(found) and parse_number(found) is None:
        return _last_expression(found) or found
    return found


def _last_expression(text: str) -> str | None:
    r"""The expression around the last number, so that `$4\sqrt{2}$` is not read as 2.

    Of `5 + 5 = 10` it is the last side, unless another side is a number too.
    """
    position = max(text.rfind(digit) for digit in "0123456789")
    if position < 0:
        return None
    low = max(text.rfind("\n", 0, position) + 1, position - _WINDOW)
    line_end = text.find("\n", position)
    high = min(line_end if line_end >= 0 else len(text), position + _WINDOW)
    window = text[low:high]
    for run in _EXPRESSION.finditer(window):
        if run.start() <= position - low < run.end():
            break
    else:
        return None
    if run.start() == 0 and low and text[low - 1] != "\n":
        return None  # cut by the window: an expression this long is no answer
    found = _LEFTOVER.sub("", run[0])
    if ")" not in found and "]" not in found:
        found = found.lstrip("([")
    elif "(" not in found and "[" not in found:
        found = found.rstrip(")]")
    *left, last = found.split("=")
    return found if any(parse_number(side) is not None for side in left) else last
