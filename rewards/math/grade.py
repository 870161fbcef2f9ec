"""Is the answer of a response equal to the gold answer? Pure functions, callable from any thread."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .exact import exactly_equal
from .extract import Mode, extract_answer
from .latex import normalise

Verdict = Literal["correct", "wrong", "unparsed", "timeout"]


@dataclass(frozen=True, slots=True)
class Grade:
    """`unparsed`: the response states no answer. `extracted` is the answer as the response writes it."""

    correct: bool
    verdict: Verdict
    extracted: str | None


def grade(response: str, gold: str, *, mode: Mode = "any", timeout_s: float = 5.0) -> Grade:
    r"""Compare the final answer of `response` with `gold` (which may itself be a `\boxed{}`).

    Two numbers are compared exactly. A number never equals something that is not one. Two answers that
    are not numbers are equal if their normalised strings are. Nothing is evaluated and no text makes it
    raise; ValueError for an unknown mode. `timeout_s` bounds comparisons that can be slow; these cannot.
    """
    extracted = extract_answer(response, mode=mode)
    if extracted is None:
        return Grade(False, "unparsed", None)
    boxed_gold = extract_answer(gold, mode="boxed")
    correct = answers_equal(extracted, gold if boxed_gold is None else boxed_gold)
    return Grade(correct, "correct" if correct else "wrong", extracted)


def grade_many(
    pairs: Iterable[tuple[str, str]],
    *,
    mode: Mode = "any",
    timeout_s: float = 5.0,
    workers: int | None = None,
) -> list[Grade]:
    """`grade` for (response, gold) pairs, in order. `workers` is for slow comparisons; these need none."""
    return [grade(response, gold, mode=mode, timeout_s=timeout_s) for response, gold in pairs]


def answers_equal(answer: str, gold: str) -> bool:
    """Equality of two bare answers: exact numbers first, normalised strings otherwise."""
    exact = exactly_equal(answer, gold)
    if exact is not None:
        return exact
    normalised = normalise(answer)
    return normalised != "" and normalised == normalise(gold)
