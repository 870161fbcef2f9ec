"""The one exception that `data` raises on purpose, and the "did you mean" helper of its messages."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Something about the problems is wrong and the user can mend it.

    Every message has three parts, so that nobody has to read our source to go on:
    `field` (where: a recipe key, or file and row), `reason` (what is wrong) and `fix` (what to do).
    """

    def __init__(self, field: str, reason: str, fix: str) -> None:
        super().__init__(field, reason, fix)  # all three in args: the error survives pickling
        self.field, self.reason, self.fix = field, reason, fix

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}. {self.fix}"


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the option nearest to `name`; an empty string when none is near."""
    by_folded = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return f"did you mean {by_folded[near[0]]!r}?" if near else ""
