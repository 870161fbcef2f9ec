r"""Where a response states its answer.

Rules, in order:
1. Only the text after the last `</think>` counts. A `<think>` that is never closed has no answer; a response
   without any `<think>` is taken whole.
2. The answer is the last complete `\boxed{}`, `\fbox{}` or `<answer>…</answer>` there. A last one that is
   empty or unfinished means no answer: earlier boxes are not consulted.
3. Boxes joined by "or", "and" or a comma are one answer with several values: the whole stretch is returned,
   which equals no single value. They are not merged into a set.
4. Mode "any" also knows the closing line "The final answer is $73$", which counts as a box does: the last of
   both is the answer. Only without box, tag and closing line it falls back: to the last explicit final-answer
   phrase; to the whole response if that is nothing but an expression or a word; to the last formula between
   math delimiters or the expression around the last number, whichever comes later. Formulas joined by "or",
   "and" or a comma are one answer. Mode "boxed" has no fallback.

Every pass is linear in the length of the response.
"""

import re
from dataclasses import dataclass
from typing import Literal

from .exact import parse_number
from .latex import TEXT_COMMAND
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
    found: str | None = None
    closing: str | None = None
    if mode == "any" and not unfinished:
        after = marks[-1].end if marks else 0
        closing = _json_answer(text, after)
        if closing is None and marks:
            closing = _closing_line(text, after)
    if closing is not None:
        found = closing
    elif marks or unfinished:
        found = _last_mark(text, marks, unfinished)
    elif mode == "any":
        found = _after_phrase(text)
        if found is None:
            found = _without_marks(text) if _is_bare(text) else _last_mathematics(text)
    return _LABEL.sub("", found or "").strip() or None


def gold_answer(gold: str) -> str:
    r"""The bare answer of a gold, which may be boxed or a whole worked solution.

    A gold does not hedge: an unfinished box, and the phrase "answer is", are taken at their word.
    """
    marks, unfinished = _scan(gold)
    if marks and not unfinished:
        return _last_mark(gold, marks, []) or gold
    if unfinished:
        return gold[gold.index("{", unfinished[-1]) + 1 :] if gold[unfinished[-1]] == "\\" else gold
    return _after_phrase(gold) or gold


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
_GLUE = re.compile(r"(?:\s|\$|\\[()\[\],;! ]|\\q?quad|[,;/|&+])*")
_DENIED = re.compile(r"(?:\bnot|\bnever|n't|\\neq?|\\not\s*=|≠)(?: be| equal(?: to)?)?[\s$*]*(?:\\[(\[])?\s*$")
_MINUS = re.compile(r"(?:[=$]|\\[(\[])\s*[-\u2212]\s*$")
_LABEL = re.compile(
    r"^\s*(?:\\text(?:bf)?\s*\{\s*(?:the )?(?:final |correct )?answer(?: is)?\s*:?\s*\}"
    r"|(?:the )?(?:final |correct )?answer(?: is\b|\s*:))\s*:?",
    re.IGNORECASE,
)
_NEXT_NAME = re.compile(r"[A-Za-z](?:_\{?[0-9a-z]\}?)?(?:\([a-z]\))?\s*=\s*$")  # and y = \boxed{..}
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
        before = text[max(0, last.start - _MAX_GAP) : last.start]
        if not last.is_tag and _DENIED.search(before):
            return None
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
            if _MINUS.search(before):  # $-\\boxed{73}$
                found = f"-{found}" if found.strip().isdigit() else f"-({found})"
            break
    if found and last.is_tag and _PROSE.search(found):
        found = _after_phrase(found) or found
    return found


def _outermost(marks: list[_Mark]) -> list[_Mark]:
    kept: list[_Mark] = []
    for mark in marks:
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def _joined(gap: str) -> bool:
    """Do two boxes with this text between them offer two values, as in `\\boxed{1} or \\boxed{2}`?"""
    gap = _NEXT_NAME.sub("", gap)
    if len(gap) > _MAX_GAP or re.search(r"[.!?:=]", gap):
        return False
    if _CONNECTOR.search(gap):
        return True
    return _GLUE.fullmatch(gap) is not None and ("\n" not in gap or any(c in gap for c in ",;/|&+"))


def box_contents(text: str) -> list[str]:
    """What the boxes hold in a text that begins and ends with one; [] for other texts, such as `72 + \\boxed{73}`."""
    text = text.strip(" $")
    boxes = _outermost(_scan(text)[0])
    if not boxes or boxes[0].start > 0 or boxes[-1].end < len(text):
        return []
    return [text[box.inner : box.inner_end] for box in boxes]


# -- prose -----------------------------------------------------------------------------------------

_PHRASE = re.compile(
    r"\banswer\b[\s*_]*(?:(?:is|are|equals)\b[\s*_]*:?|[:=\uff1a]|[-\u2013\u2014](?=\s))[\s*_]*(?:```[a-z]*\s*)?"
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


# The last line that few-shot prompts of Minerva's kind ask for.
_CLOSING_LINE = re.compile(
    r"\bfinal answer is:?\s*(?:\$(?P<dollar>[^$\n]{1,300})\$|\\\((?P<round>[^\n]{1,300}?)\\\))", re.IGNORECASE
)


# {"reasoning": "...", "answer": "\\frac{1}{2}"}, as the whole response or at its end, with or without a fence.
_JSON_ANSWER = re.compile(
    r'"(?:final[_ ])?answer"\s*:\s*(?:"(?P<text>(?:[^"\\]|\\.){0,2000})"|(?P<list>\[[^\[\]]{0,500}\])'
    r"|(?P<number>-?[0-9.eE+-]{1,60}))\s*(?=[,}])",
    re.IGNORECASE,
)


def _json_answer(text: str, after: int) -> str | None:
    """The value of the last "answer" key in text[after:], unless an answer is stated once more behind it."""
    found = list(_JSON_ANSWER.finditer(text, after))
    if not found or _PHRASE.search(text, found[-1].end()):
        return None
    last = found[-1]
    if last["list"] and '"' in last["list"]:  # ["B", "F"]
        return last["list"][1:-1].replace('"', "")
    value = last["text"] if last["text"] is not None else last["list"] or last["number"]
    return value.replace("\\\\", "\\")


def _closing_line(text: str, after: int) -> str | None:
    """The formula in the last "final answer is $...$" that stands after the last box."""
    found = list(_CLOSING_LINE.finditer(text, after))
    return (found[-1]["dollar"] or found[-1]["round"]) if found else None


# What has no words but those of mathematics. \text{} may hold any.
_COMMANDS = re.compile(TEXT_COMMAND + r"[^{}]*\}|\\(?:begin|end)\{[a-z]+\}(?:\{[clr|]+\})?|\\[A-Za-z]+")
_KNOWN = re.compile(
    r"(?<![A-Za-z])(?:sqrt|a?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|pi|and|abs|binom|floor|ceil|max|min|gcd|lcm|mod)"
    r"(?![a-z])|(?<=[0-9)}\]])or(?![a-z])"
)
_LONG_WORD = re.compile(r"[^\W\d_]{3,}")
_ONE_WORD = re.compile(r"[^\W\d_]{1,20}")
_MAX_BARE = 300


def _is_bare(text: str) -> bool:
    """Is the response nothing but one expression, list or word?"""
    text = text.strip()
    if not text or len(text) > _MAX_BARE or "$" in text[1:-1].strip("$") or "\\(" in text[2:] or "\\[" in text[2:]:
        return False
    if "\n" in text and not (text.startswith(r"\begin{") and text.count(r"\begin{") == 1):
        return False
    return bool(_ONE_WORD.fullmatch(text)) or not _LONG_WORD.search(_KNOWN.sub(" ", _COMMANDS.sub(" ", text)))


# A formula in text does not span lines: marks that stand on lines of their own are no pair.
_FORMULA = re.compile(
    r"\$\$(?P<display>[^$]{1,2000})\$\$|(?<!\\)\$(?P<inline>[^$\n]{1,1000})\$"
    r"|\\\[(?P<square>.{1,2000}?)\\\]|\\\((?P<round>[^\n]{1,1000}?)\\\)"
    r"|(?P<split>\$[ \t]{0,9}\n[^$]{1,300}\n[ \t]{0,9}\$|\\\([ \t]{0,9}\n.{1,300}?\n[ \t]{0,9}\\\))",
    re.DOTALL,
)


def _without_marks(text: str) -> str:
    """A text that is one formula between delimiters, without them."""
    formula = _FORMULA.fullmatch(text.strip())
    return formula[formula.lastgroup or 0] if formula else text


_TAIL = 4_000  # of a response without any other mark, where its last formula is looked for


def _last_mathematics(text: str) -> str | None:
    """The last formula between delimiters, or the expression around the last number if that comes later."""
    formulas = list(_FORMULA.finditer(text, max(0, len(text) - _TAIL)))
    last_digit = max(text.rfind(digit) for digit in "0123456789")
    if not formulas or last_digit >= formulas[-1].end():
        return _last_expression(text)
    first = len(formulas) - 1
    while first and _joined(text[formulas[first - 1].end() : formulas[first].start()]):
        first -= 1
    if first < len(formulas) - 1:
        return text[formulas[first].start() : formulas[-1].end()]
    if _DENIED.search(text[max(0, formulas[-1].start() - _MAX_GAP) : formulas[-1].start()]):
        return None
    return None if formulas[-1]["split"] else formulas[-1][formulas[-1].lastgroup or 0]


def _after_phrase(text: str) -> str | None:
    """What follows the last "answer is", "Answer:", "####" in its sentence; None without such a phrase."""
    ends = [phrase.end() for phrase in _PHRASE.finditer(text)]
    if not ends:
        return None
    sentence = _SENTENCE.match(text, ends[-1])
    found = sentence[0] if sentence else ""
    if sentence and text[sentence.end() : sentence.end() + 1] == "?":
        return None
    if re.match("not ", found):
        return found
    if _PROSE.search(found) and parse_number(found) is None:
        return _last_mathematics(found) or found
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
    if _DENIED.search(window[max(0, run.start() - _MAX_GAP) : run.start()]):
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
