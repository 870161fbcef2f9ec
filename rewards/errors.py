"""The one exception of this package."""

from collections.abc import Iterable
from difflib import get_close_matches


class RewardError(ValueError):
    """A reward that cannot be loaded, does not fit the data, or failed while scoring."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest choice, or an empty string."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
