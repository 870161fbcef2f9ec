"""Is the answer of a response equal to the gold answer? Callable from any thread.

In order: extraction, exact numbers, equal strings, and only then symbolic comparison in a worker process
(see `pool`). Two numbers, and so every pair of integers, never leave this process.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .conflicts import conflicting
from .exact import exactly_equal, parse_number
from .extract import Mode, answer_text, extract_answer, gold_answer
from .latex import normalise, same_words

Verdict = Literal["correct", "wrong", "unparsed", "timeout"]

# Of a longer response only the end is read; models put their answer there.
MAX_RESPONSE = 200_000
_LONGEST_LINE = 2_000  # how far to look for a line's start after the cut
# Longer answers are compared as numbers and as strings, not symbolically.
MAX_SYMBOLIC = 2_000
# One comparison computes no longer than this, so that a hostile answer does not starve the others.
COMPUTE_LIMIT_S = 2.0
# Of `timeout_s`; the rest is for ending the worker.
WAITING_SHARE = 0.9

_INTEGER = re.compile(r"-?[0-9]{1,100}")
# Words, such as "none of these", have no value that a number could equal.
_WORDS = re.compile(r"[A-Za-z\s.,;:!?'\"-]*")


@dataclass(frozen=True, slots=True)
class Grade:
    """`unparsed`: the response states no answer. `extracted` is the answer as the response writes it."""

    correct: bool
    verdict: Verdict
    extracted: str | None


def grade(response: str, gold: str, *, mode: Mode = "any", timeout_s: float = 5.0) -> Grade:
    r"""Compare the final answer of `response` with `gold` (which may itself be a `\boxed{}`).

    Two numbers are compared exactly, other answers by normalised strings, then symbolically by kind. Of a
    response longer than MAX_RESPONSE characters only the end is read (after the last `</think>`); an answer
    longer than MAX_SYMBOLIC is not compared symbolically.

    timeout_s: bounds the whole call, with waiting for a worker and its start. The verdict is "timeout" if a
        symbolic comparison does not end in that time or within COMPUTE_LIMIT_S, or exceeds the memory limit.
    No text makes it raise. ValueError for an unknown mode; WorkerStartError if no worker can start at all.
    """
    deadline = time.monotonic() + WAITING_SHARE * timeout_s
    answer = final_answer(response, mode=mode)
    if answer is None:
        return Grade(False, "unparsed", None)
    bare = _bare_gold(gold)
    correct = decide(answer, bare)
    if correct is None:
        correct = _compare_symbolically(answer, bare, timeout_s, deadline)
    return _graded(answer, correct)


def grade_many(
    pairs: Iterable[tuple[str, str]],
    *,
    mode: Mode = "any",
    timeout_s: float = 5.0,
    workers: int | None = None,
) -> list[Grade]:
    """`grade` for (response, gold) pairs, in order. What is asked twice is compared once.

    timeout_s: per pair, from when a worker starts on it: a long batch does not time out for its length.
        COMPUTE_LIMIT_S holds as well.
    workers: symbolic comparisons at a time; at most, and by default, as many as the pool has workers.
    """
    asked = [(final_answer(response, mode=mode), _bare_gold(gold)) for response, gold in pairs]
    verdicts: dict[tuple[str, str], bool | None] = {}
    undecided: list[tuple[str, str]] = []
    for answer, gold in asked:
        if answer is not None and (answer, gold) not in verdicts:
            verdicts[answer, gold] = decide(answer, gold)
            if verdicts[answer, gold] is None:
                undecided.append((answer, gold))
    if undecided:
        verdicts.update(zip(undecided, _compare_concurrently(undecided, timeout_s, workers), strict=True))
    return [
        Grade(False, "unparsed", None) if answer is None else _graded(answer, verdicts[answer, gold])
        for answer, gold in asked
    ]


def final_answer(response: str, *, mode: Mode = "any") -> str | None:
    """`extract_answer`, of a response cut to a bounded length, at the start of a line if there is one near."""
    response = response.rstrip()
    if len(response) > MAX_RESPONSE:
        text = answer_text(response)
        if text is None:
            return None
        start = max(0, len(text) - MAX_RESPONSE)
        line = text.find("\n", start, start + _LONGEST_LINE) + 1 if start else 0
        response = text[line or start :]
    return extract_answer(response, mode=mode)


def decide(answer: str, gold: str) -> bool | None:
    """Equality of two bare answers as far as it can be told at once; None if symbolic comparison must tell."""
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):  # the usual case, told fast
        return int(answer) == int(gold)
    exact = exactly_equal(answer, gold)
    if exact is not False and conflicting(answer, gold):
        return False
    if exact:
        return True
    numbers = 0 if exact is None else sum(parse_number(side) is not None for side in (answer, gold))
    if numbers == 2:
        return False
    normalised = normalise(answer), normalise(gold)
    if not all(normalised):
        return False
    if normalised[0] == normalised[1] or same_words(answer, gold):
        return True
    if max(len(answer), len(gold)) > MAX_SYMBOLIC:
        return False
    # One number: 2^{10} or \sqrt{5329} may equal it, words cannot.
    if numbers == 1 and any(_WORDS.fullmatch(side) for side in normalised):
        return False
    return None


def _bare_gold(gold: str) -> str:
    return gold if len(gold) > MAX_RESPONSE or _INTEGER.fullmatch(gold) else gold_answer(gold)


def _graded(answer: str, correct: bool | None) -> Grade:
    if correct is None:
        return Grade(False, "timeout", answer)
    return Grade(correct, "correct" if correct else "wrong", answer)


def _compare_symbolically(answer: str, gold: str, timeout_s: float, deadline: float = float("inf")) -> bool | None:
    from .pool import shared_pool  # here, because few callers need it and subprocess takes time to import

    return shared_pool().compare(answer, gold, limit_s=min(timeout_s, COMPUTE_LIMIT_S), deadline=deadline)


def _compare_concurrently(pairs: list[tuple[str, str]], timeout_s: float, workers: int | None) -> list[bool | None]:
    from concurrent.futures import ThreadPoolExecutor

    from .pool import shared_pool

    def compare(pair: tuple[str, str]) -> bool | None:
        return _compare_symbolically(*pair, timeout_s=timeout_s)

    size = shared_pool().size
    threads = min(size, workers or size, len(pairs))
    if threads == 1:
        return list(map(compare, pairs))
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(compare, pairs))
