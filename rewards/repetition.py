"""Repetition penalty on n-grams of tokens (Yeo et al., arXiv 2502.03373, section 4.5 and appendix).

    r = max_penalty * (1 - distinct n-grams / all n-grams)

An n-gram is a repetition if it stood in the completion before, so the bracket is the share of n-grams that are
repetitions. 0 without repetition, towards `max_penalty` (negative) the more n-grams repeat; 0 for completions shorter
than n tokens. The paper's main runs put its penalty (-0.05) on each repeated token instead; a reward for the whole
completion is this form, which the paper's code has too. Tokens rather than words, so that it works for languages
written without blanks. None is never returned: it applies to every completion.
"""

from collections.abc import Hashable, Sequence


def repetition(completion_ids: Sequence[Sequence[Hashable]], *, n: int = 40, max_penalty: float = -1.0) -> list[float]:
    """Between max_penalty and 0 per completion. Raises ValueError unless n >= 1 and max_penalty <= 0."""
    if n < 1 or not max_penalty <= 0:
        raise ValueError(f"need n >= 1 and max_penalty <= 0, got n={n}, max_penalty={max_penalty}")
    return [max_penalty * _repeated_share(ids, n) for ids in completion_ids]


def _repeated_share(ids: Sequence[Hashable], n: int) -> float:
    count = len(ids) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(ids[i : i + n]) for i in range(count)}) / count
