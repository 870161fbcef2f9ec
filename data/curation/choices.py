r"""Multiple-choice options: recognised in a statement, removed, and the letter answer turned into its option's value.

Options are a run of labels A, B, C, ... in one of these forms, typically at the end of the statement:

    (A) 10 (B) 13 (C) 27          $\textbf{(A)}\ 10 \qquad \textbf{(B)}\ 13$      \text{A)}\ & 84 & \text{B)}\ & 73
    A. 10  /  A) 10  on lines     \text A. 10 \qquad \text B. 13                  \begin{enumerate}[(A)] \item 10

A run of labels is only taken for options if the answer is a letter, or equals one of the values: "conditions (A) ...,
(B) ... and (C) ..." is part of its statement. A problem that makes no sense without its options ("which of the
following", "is closest to") is rejected, and so is a letter without an option.
"""

import re
from dataclasses import dataclass, replace

from data.answers import clean_answer
from data.curation.integers import read_integer
from data.curation.problem import Problem, Rejected
from data.curation.statements import tokens

_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
# "\textbf" decoded once too often is a tab and "extbf": files have it.
_FONT = r"(?:(?:\\t|\t)ext(?:bf|rm|sf|it|up|normal)?|\\(?:math(?:rm|bf|sf)|mbox|hbox|rm|bf|bold|boldsymbol))\s*\{?\s*"
_LABEL = (
    r"(?:"
    rf"(?:{_FONT})+(?:\(\s*(?P<font>[@])\s*\)|(?P<open>[@])\s*[).:])"
    r"|\\item\s*\[\s*(?:\\textbf\{)?\(?(?P<item>[@])[).]?\}?\s*\]"
    r"|(?<![A-Za-z0-9_\\{^)])\(\s*(?P<bracket>[@])\s*\)"
    r"|(?:^|(?<=[\s&~\\\]]))(?P<close>[@])\)\.?(?=[\s\\$&~])"
    r"|(?:^[ \t]*|\\q?quad\s*|&\s*|\$\$\s*|\\\[\s*)(?:\$\\bullet\$|\\bullet|\\item|[-*])?[ \t]*"
    r"(?P<dot>[@])[.:](?=[\s\\$])"
    r")(?:[\s~}]|\\[ ,;:!])*"
)
_UPPER = re.compile(_LABEL.replace("@", "A-J"), re.MULTILINE)
_ANY_CASE = re.compile(_LABEL.replace("@", "A-Ja-j"), re.MULTILINE)

_LETTER = re.compile(rf"\(?(?:{_FONT})*\(?\s*([A-Ja-j])\s*\)?\}}?\)?\s*[.,]?")
_SEVERAL_LETTERS = re.compile(rf"(?:{_FONT})*\(?[A-J]\)?(?:\s*(?:,|and|&)\s*\(?[A-J]\)?)+\}}?")
_ENUMERATE = re.compile(r"\\begin\{enumerate\}(\[[^\]]*\]+)?(.*?)\\end\{enumerate\}", re.DOTALL)

_LAYOUT = re.compile(
    r"(?:\s|&|~|\\\\|\\[ ,;:!]|\\(?:noindent|indent|q?quad|item|bullet|par|newline)(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}"
    r"|\\\Z|\$\\bullet\$|(?:^|(?<=\s))(?:Options|Choices|Answer choices)\s*:?)+\Z",
    re.IGNORECASE,
)
_LEADING_LAYOUT = re.compile(r"(?:\s|&|~|\\\\|\\[ ,;:!]|\\(?:noindent|indent|q?quad)(?![a-zA-Z])|[.):])+")
_CLOSERS = re.compile(r"(?:\s|&|\\\\|\\end\{[a-z]+\*?\}|\$+|\\\]|\\\)|\}|\\q?quad(?![a-zA-Z]))+")
_OPENERS = re.compile(r"(?:\$\$|\$|\\\[|\\\(|\\begin\{([a-z]+\*?)\}(?:\{[^{}]*\}|\[[^\]]*\])*|\{)\Z")

# Sentences about the letters of options.
_INSTRUCTION = re.compile(
    r"\(?\b(?:Enter|Type|Give|Write|Choose|Select|Express|Indicate|Your answer should be)\b[^.\n]*"
    r"(?:\bletters?\b|\boptions?\b|\bas A, B\b|\$?A\$?, \$?B\$?,)[^.\n]*\.?\)?"
)
# Questions that only their options make definite.
_ASKS_FOR_ONE = re.compile(
    r"\bwhich\s+(?:ones?\s+)?of\s+(?:the\s+)?(?:\w+\s+)?(?:following|these|below|options|choices|answers|statements)\b"
    r"|\bwhich\s+(?:\w+\s+){0,3}(?:below|following)\b|\bwhich\s+one\b|\b(?-i:Which)\s+(?:is|are)\b"
    r"|\b(?:one|all|any|none)\s+of\s+the\s+following\b"
    r"|\bfollowing\s+(?:could|can|must|might|is|are|values?|numbers?|options?|choices?|answers?|statements?|intervals?)\b"
    r"|\bwhich\s+(?:expression|equation|function|statement|answer|choice|option|graph|interval)\b",
    re.IGNORECASE,
)
_LOST_OPTIONS = re.compile(r"\bwhich\s+(?:ones?\s+)?of\s+the\s+following\b", re.IGNORECASE)
_ASKS_FOR_SOME = re.compile(
    r"\b(?:closest|nearest)\s+(?:in\s+value\s+)?to\b|\bis\s+approximately\b(?!\s*[$\d])|\bwhat\s+(?:could|can|might|may)\b"
    r"|\bcould\s+(?:be|equal|represent)\b|\b(?:a|one)\s+possible\b",
    re.IGNORECASE,
)
_MEANS_OPTIONS = re.compile(
    r"\bletter\s+of\s+the\s+correct\b|\bthe\s+correct\s+(?:option|letter)\b",
    re.IGNORECASE,
)
_NONE_OF_THESE = re.compile(r"\b(?:none|all|both|neither)\b.*\b(?:these|those|above|them|options)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Choices:
    """A statement without its options, and the options by their letter."""

    statement: str
    options: dict[str, str]


def letter_of(answer: str) -> str | None:
    r"""The letter that a gold consists of (`D\\`, `$A$`, `\text{(E)}`, `(B)`), in upper case."""
    match = _LETTER.fullmatch(clean_answer(answer).strip("$ "))
    return match[1].upper() if match else None


def find_choices(statement: str, *, lower_case: bool = False) -> Choices | None:
    """The options of a statement; None if it has none. `lower_case`: labels such as (a) count as well."""
    statement = _label_items(statement)
    # Figures are full of letters in brackets: they are blanked, so that places stay what they are.
    visible = _FIGURE.sub(lambda figure: " " * len(figure[0]), statement)
    run = _longest_run([*(_ANY_CASE if lower_case else _UPPER).finditer(visible)])
    if len(run) < 2:
        return None
    end = _end_of_last(statement, visible, run)
    starts = [*(label.start() for label in run[1:]), end]
    values = [_tidy(statement[label.end() : stop]) for label, stop in zip(run, starts, strict=True)]
    if not all(re.search(r"\w", value) for value in values):
        return None
    stem = _without_openers(statement[: run[0].start()])
    after = _CLOSERS.sub("", statement[end:], count=1) if _CLOSERS.match(statement[end:]) else statement[end:]
    text = "\n".join(part for part in (stem, after.strip()) if part)
    text = _INSTRUCTION.sub("", text).strip()
    return Choices(text, {chr(ord("A") + i): value for i, value in enumerate(values)}) if text else None


def resolve_choices(problem: Problem) -> Problem | Rejected:
    """The problem without its options, a letter answer replaced by its option's value; code problems pass."""
    if problem.kind == "code":
        return problem
    if _SEVERAL_LETTERS.fullmatch(clean_answer(problem.raw_answer).strip("$ ")):
        return Rejected("the answer is several letters", problem.answer)
    letter = letter_of(problem.raw_answer)
    choices = find_choices(problem.statement, lower_case=letter is not None)
    if choices is None or (letter is None and len(choices.options) < 3):
        return _without_options(problem, letter)
    value = problem.answer
    if letter is not None:
        if letter not in choices.options:
            return Rejected("a letter answer without an option of that letter", f"{letter}: {choices.options}")
        value = choices.options[letter]
        if _NONE_OF_THESE.search(value):
            return Rejected("the right option refers to the others", f"({letter}) {value}")
    elif not any(_same(value, option) for option in choices.options.values()):
        numeric = sum(read_integer(option) is not None for option in choices.options.values())
        if 2 * numeric <= len(choices.options):
            return _without_options(problem, letter)  # a list of conditions or cases, part of the statement
        return Rejected("the answer is none of the options", f"{value}: {choices.options}")
    asks = _ASKS_FOR_ONE.search(choices.statement) or _ASKS_FOR_SOME.search(choices.statement)
    if asks is not None:
        return Rejected("the question makes no sense without its options", asks[0])
    return replace(problem, statement=choices.statement, answer=value)


def _without_options(problem: Problem, letter: str | None) -> Problem | Rejected:
    if letter is not None and letter in problem.raw_answer:  # a small one may be the name of a quantity
        return Rejected("a letter answer, and no options in the statement", problem.answer)
    asks = _LOST_OPTIONS.search(problem.statement)
    if asks is not None and re.search(r"[:\n]|\[asy\]|,.*,", problem.statement[asks.end() :]):
        asks = None  # something is listed after the phrase
    asks = asks or _MEANS_OPTIONS.search(problem.statement)
    if asks is not None:
        return Rejected("the question asks for one of options that are not there", asks[0])
    return problem


def _label_items(statement: str) -> str:
    r"""`\begin{enumerate}[(A)] \item 10 \item 20` with its labels written out."""

    def label(environment: re.Match[str]) -> str:
        header, body = environment[1] or "", environment[2]
        bare = re.findall(r"\\item(?!\s*\[)", body)
        if not re.search(r"Alph|\(?A\s*[).]", header) or not 2 <= len(bare) <= 10:
            return environment[0]
        letters = iter("ABCDEFGHIJ")
        labelled = re.sub(r"\\item(?!\s*\[)", lambda _: rf"\item[({next(letters)})]", body)
        return rf"\begin{{enumerate}}{labelled}\end{{enumerate}}"

    return _ENUMERATE.sub(label, statement)


def _longest_run(labels: list[re.Match[str]]) -> list[re.Match[str]]:
    """The longest run A, B, C, ... of labels of one form; of equally long ones the last."""
    best: list[re.Match[str]] = []
    for i, first in enumerate(labels):
        if _letter(first) != "A":
            continue
        run = [first]
        for label in labels[i + 1 :]:
            if label.lastgroup == first.lastgroup and ord(_letter(label)) == ord(_letter(run[-1])) + 1:
                run.append(label)
        if len(run) >= len(best):
            best = run
    return best


def _letter(label: re.Match[str]) -> str:
    return str(label[str(label.lastgroup)]).upper()


def _end_of_last(statement: str, visible: str, run: list[re.Match[str]]) -> int:
    r"""Where the last option's value ends: with its environment, else with its line or before a figure."""
    start = run[-1].end()
    environment = re.compile(r"\\end\{").search(statement, start)
    begun = statement.rfind("\\begin{", 0, run[0].start())
    if environment is not None and begun >= 0 and "\\end{" not in statement[begun : run[0].start()]:
        return environment.start()
    first = re.compile(r"\S").search(statement, start)
    if first is None:
        return len(statement)
    ends = [m.start() for m in (re.compile(p).search(statement, first.start()) for p in (r"\n", r"\[asy\]")) if m]
    return min(ends, default=len(statement))


def _tidy(value: str) -> str:
    """An option's value without the layout around it and without halves of brackets and dollar signs."""
    before = None
    while before != value:
        before = value
        value = _LEADING_LAYOUT.sub("", value, count=1) if _LEADING_LAYOUT.match(value) else value
        value = _LAYOUT.sub("", value).rstrip(".,;")
        value = re.sub(r"\\(?:text|mathrm|textbf)\s*\{\s*\Z", "", value)
        if value.count("{") - value.count("\\{") < value.count("}") - value.count("\\}") and value.endswith("}"):
            value = value[:-1]
        for mark in ("$$", "$"):
            if _dollars(value) % 2:
                value = value.removesuffix(mark) if value.endswith(mark) else value.removeprefix(mark)
        for opener, closer in (("\\(", "\\)"), ("\\[", "\\]")):
            if value.count(opener) < value.count(closer):
                value = value.removesuffix(closer)
    return value.strip()


def _without_openers(stem: str) -> str:
    """The statement before its options, without the layout at its end and what is opened there for them."""
    while True:
        shorter = _LAYOUT.sub("", stem).rstrip()
        opener = _OPENERS.search(shorter)
        if opener is not None and _unclosed(shorter, opener):
            shorter = shorter[: opener.start()]
        if shorter == stem:
            return stem
        stem = shorter


def _unclosed(text: str, opener: re.Match[str]) -> bool:
    mark = opener[0]
    if mark.startswith("$"):
        return _dollars(text) % 2 == 1 or (mark == "$$" and text.count("$$") % 2 == 1)
    if mark == "{":
        return text.count("{") > text.count("}")
    if opener[1] is not None:
        return text.count(f"\\begin{{{opener[1]}}}") > text.count(f"\\end{{{opener[1]}}}")
    return text.count(mark) > text.count(mark.replace("(", ")").replace("[", "]"))


def _dollars(text: str) -> int:
    return len(re.findall(r"(?<!\\)\$", text))


def _same(answer: str, option: str) -> bool:
    ours, theirs = read_integer(answer), read_integer(option)
    return ours == theirs if ours is not None or theirs is not None else tokens(answer) == tokens(option)
