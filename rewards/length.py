r"""Rewards on the length of a completion, in tokens (the sampler's own, EOS included).

`soft_overlong`, the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13). With L = number of
completion tokens, M = max_length, B = buffer:

    r = 0              if L <= M - B
    r = (M - B - L)/B  if M - B < L <= M       (from 0 down to -1)
    r = -1             if L > M

`cosine_length`, the cosine reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (Yeo et al., arXiv
2502.03373, section 4.2). With r0 = reward at length 0 and rL = reward at length M:

    r = rL + (r0 - rL)/2 * (1 + cos(pi L / M))   if L < M
    r = exceed                                   if L >= M

(r0, rL) is (correct_at_0, correct_at_max) for a correct final answer and (wrong_at_0, wrong_at_max) for any other,
so that short is better among correct completions, and long is better among wrong ones: think on before giving up.
The defaults are the paper's: 2 falling to 1, -10 rising to 0, exceed -10.
"""

import math
from collections.abc import Sequence
from typing import Any

from .accuracy import JudgedScore, verdicts
from .math.extract import Mode
from .messages import Completion


def soft_overlong(completion_ids: Sequence[Sequence[Any]], *, max_length: int, buffer: int) -> list[float]:
    """Between -1 and 0 per completion, never None. Raises ValueError unless 0 < buffer <= max_length (tokens)."""
    if not 0 < buffer <= max_length:
        raise ValueError(f"need 0 < buffer <= max_length, got buffer={buffer}, max_length={max_length}")
    free = max_length - buffer
    return [min(0.0, max(-1.0, (free - len(ids)) / buffer)) for ids in completion_ids]


def cosine_length(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[Any]],
    answer: Sequence[object],
    *,
    max_length: int,
    correct_at_0: float = 2.0,
    correct_at_max: float = 1.0,
    wrong_at_0: float = -10.0,
    wrong_at_max: float = 0.0,
    exceed: float = -10.0,
    mode: Mode = "any",
    prefill: str = "",
) -> list[float | None]:
    """One reward per completion, with the verdict that `math` would give; None where there is no gold answer.

    max_length: tokens; the recipe's `rollout.max_tokens`, so that `exceed` falls on truncated completions (and on
        the rare one whose last token is its EOS).
    Raises ValueError for max_length < 1 or an end that is not finite.
    """
    ends = (correct_at_0, correct_at_max, wrong_at_0, wrong_at_max, exceed)
    if max_length < 1 or not all(map(math.isfinite, ends)):
        raise ValueError(f"need max_length >= 1 and finite rewards, got max_length={max_length}, {ends}")
    rewards: list[float | None] = []
    judged = verdicts(completions, answer, mode=mode, prefill=prefill)
    for verdict, ids in zip(judged, completion_ids, strict=True):
        if verdict is None:
            rewards.append(None)
            continue
        at_0, at_max = (correct_at_0, correct_at_max) if verdict == "correct" else (wrong_at_0, wrong_at_max)
        value = exceed if len(ids) >= max_length else cosine(len(ids) / max_length, at_0, at_max)
        rewards.append(JudgedScore(value, verdict))
    return rewards


def cosine(progress: float, at_0: float, at_1: float) -> float:
    """Half a cosine wave from `at_0` to `at_1` as progress goes from 0 to 1."""
    return at_1 + (at_0 - at_1) / 2 * (1 + math.cos(math.pi * progress))
