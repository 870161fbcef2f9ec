"""Accuracy rewards: is the final answer right? (DeepSeek-R1, arXiv 2501.12948, section 2.2.1)

    r = `correct` (1.0) if the final answer equals the gold answer, else `wrong` (0.0)

`math` compares as `rewards.math.grade` does; `integer` accepts only exact integers and needs no worker process.
A comparison that exceeded its limits (verdict "timeout") is paid like a wrong answer, but counted apart.
None: the sample has no gold answer of this kind (missing or blank; for `integer`, not an integer), so a
mixture of kinds can be scored by several rewards.
"""

from collections.abc import Sequence

from .math.exact import parse_number
from .math.extract import Mode
from .math.grade import Verdict, final_answer, grade_many
from .messages import Completion, completion_text


class JudgedScore(float):
    """A reward that remembers the verdict behind it, so that a run can count verdicts without regrading."""

    verdict: Verdict

    def __new__(cls, value: float, verdict: Verdict) -> "JudgedScore":
        score = super().__new__(cls, value)
        score.verdict = verdict
        return score

    def __getnewargs__(self) -> tuple[float, Verdict]:  # type: ignore[override]
        """What copy and pickle pass to __new__."""
        return float(self), self.verdict


def verdicts(
    completions: Sequence[Completion],
    answer: Sequence[object],
    *,
    mode: Mode = "any",
    prefill: str = "",
) -> list[Verdict | None]:
    """One verdict per completion; None where `answer` is missing or blank."""
    responses = [prefill + completion_text(completion) for completion in completions]
    golds = [_gold(value) for value in answer]
    asked = [(response, gold) for response, gold in zip(responses, golds, strict=True) if gold]
    found = iter(grade_many(asked, mode=mode))
    return [next(found).verdict if gold else None for gold in golds]


def math_reward(
    completions: Sequence[Completion],
    answer: Sequence[object],
    *,
    mode: Mode = "any",
    correct: float = 1.0,
    wrong: float = 0.0,
    prefill: str = "",
) -> list[float | None]:
    r"""`correct` or `wrong` (also for a timeout) per completion; mode "boxed" wants `\boxed{}` or `<answer>`."""
    judged = verdicts(completions, answer, mode=mode, prefill=prefill)
    return _scores(judged, correct, wrong)


def integer_reward(
    completions: Sequence[Completion],
    answer: Sequence[object],
    *,
    mode: Mode = "any",
    correct: float = 1.0,
    wrong: float = 0.0,
    prefill: str = "",
) -> list[float | None]:
    """As `math_reward`, for integers only: a final answer that is not a number counts as unparsed."""
    judged = [
        _integer_verdict(prefill + completion_text(completion), _gold(value), mode)
        for completion, value in zip(completions, answer, strict=True)
    ]
    return _scores(judged, correct, wrong)


def _gold(value: object) -> str:
    return "" if value is None else str(value).strip()


def _integer_verdict(response: str, gold: str, mode: Mode) -> Verdict | None:
    expected = parse_number(gold)
    if expected is None or expected.denominator != 1:
        return None
    answer = final_answer(response, mode=mode)
    stated = None if answer is None else parse_number(answer)
    if stated is None:
        return "unparsed"
    return "correct" if stated == expected else "wrong"


def _scores(judged: Sequence[Verdict | None], correct: float, wrong: float) -> list[float | None]:
    return [
        None if verdict is None else JudgedScore(correct if verdict == "correct" else wrong, verdict)
        for verdict in judged
    ]
