r"""Gold answers as canonical integers.

Typesetting and units around a number go: `16\\ \noindent`, `$12$`, `\boxed{5}`, `073`, `27.0`, `10{,}000`,
`\$1,\!657`, `20\text{ miles}`, `50^\circ`. A percent sign is a unit: 17\% is 17, as the verifier reads it.
Nothing is computed. `3^{4}`, `100!`, `\frac{6}{3}` and `x = 4` are no integers here: what is asked for may be the
form itself, and a gold must be what its source says.
"""

import re
from dataclasses import replace

from data.answers import canonical_integer, clean_answer, last_boxed
from data.curation.problem import Problem, Rejected

AIME_RANGE = range(1000)

_SPACING = re.compile(r"\\[ ;:]|~|\\q?quad(?![a-zA-Z])|\\indent(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}")
_TIGHT = re.compile(r"\\[!,]")
_WRAPPED = (
    re.compile(r"\$+([^$]*[^$\\])\$+"),
    re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]"),
    re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|hbox)\s*\{([^{}]*)\}"),
    re.compile(r"\{([^{}]*)\}"),
)
_CURRENCY = re.compile(r"([-+\u2212]?)\s*(?:\\\$|[$\u20ac\u00a3])\s*(?=[\d.])")
_PROSE_UNIT = re.compile(r"(?<=\d)\s*\\(?:text|textrm|mathrm|mbox|hbox)\s*\{([A-Za-z .]*)\}(?:\^\{?[23]\}?)?")
_PLAIN_UNIT = re.compile(
    r"(?<=\d)\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|\u00b0"
    r"|\{?(?:mm|cm|km|ft|in|mph|kg|lb|cents|dollars|units|degrees|inches|feet|miles|minutes|hours|days|years)\}?\.?"
    r"(?:\^\{?[23]\}?)?)"
)
# Words that change the number or ask for another reading of it.
_NOT_UNITS = frozenset(
    {"hundred", "thousand", "million", "billion", "trillion", "dozen", "or", "and", "to", "more", "less", "base",
     "a.m.", "p.m.", "am", "pm", "times"}
)  # fmt: skip


def read_integer(text: str) -> str | None:
    """The canonical integer (`"-12"`) that a gold answer stands for; None if it is anything else."""
    boxed = last_boxed(text)
    text = clean_answer(boxed if boxed is not None else text)
    before = None
    while before != text:
        before = text
        text = _TIGHT.sub("", _SPACING.sub(" ", text)).strip().rstrip(".,;").strip()
        for wrapper in _WRAPPED:
            match = wrapper.fullmatch(text)
            if match:
                text = next(part for part in match.groups() if part is not None).strip()
        text = _CURRENCY.sub(r"\1", text, count=1)
        text = _without_unit(text)
    return canonical_integer(text)


def _without_unit(text: str) -> str:
    prose = _PROSE_UNIT.search(text)
    if prose is not None and prose.end() == len(text):
        words = prose[1].lower().split()
        return text if _NOT_UNITS & set(words) or words[0:1] and len(words[0]) < 2 else text[: prose.start()]
    plain = _PLAIN_UNIT.search(text)
    return text[: plain.start()] if plain is not None and plain.end() == len(text) else text


def to_integer(problem: Problem) -> Problem | Rejected:
    """The problem with its answer as a canonical integer; code problems pass."""
    if problem.kind == "code":
        return problem
    integer = read_integer(problem.answer)
    if integer is None:
        return Rejected("the answer is no integer", problem.answer)
    return replace(problem, answer=integer, kind="integer")


def in_range(problem: Problem) -> Problem | Rejected:
    """AIME answers lie in 0..999: any other gold is wrong, or the problem is from elsewhere."""
    integer = read_integer(problem.answer) if problem.aime else None
    if not problem.aime or (integer is not None and len(integer) <= 3 and int(integer) in AIME_RANGE):
        return problem
    return Rejected("an AIME answer must lie in 0..999", problem.answer)
