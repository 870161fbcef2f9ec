"""What became of the traces that were asked for: counted while a teacher is sampled, shown, and summed up."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rl.distill.journal import Wanted
from rl.run.progress import Progress

_LISTED = 20


@dataclass
class Tally:
    """`retried`, `failed` and `seconds` are of this start of the run alone."""

    asked: int = 0
    known: int = 0  # of them, in the journal before this start
    received: int = 0  # of them, since this start
    over_long_prompts: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # for now: asked for again by the next start
    refused: Counter[str] = field(default_factory=Counter)  # for good
    retried: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)  # the first of them, with what the server said
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add_failure(self, wanted: Wanted, reason: str, counts: Counter[str]) -> None:
        counts[kind_of(reason)] += 1
        if len(self.errors) < _LISTED:
            self.errors.append(f"problem {wanted.id}, sample {wanted.sample}: {reason}")

    def line(self) -> str:
        got = self.known + self.received - self.refused.total()
        parts = [f"{got} of {self.asked} traces received, {self.received} of them now"]
        for name, counts in (("failed", self.failed), ("refused", self.refused), ("retried", self.retried)):
            if counts:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(4))
                parts.append(f"{counts.total()} {name}: {reasons}")
        if self.over_long_prompts:
            parts.append(f"{self.over_long_prompts} over-long prompts dropped")
        parts.append(f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens")
        return "; ".join(parts) + f"; {self.seconds:.0f} s"

    def record(self) -> dict[str, Any]:
        """For the summary."""
        named = ("asked", "known", "received", "over_long_prompts", "prompt_tokens", "completion_tokens", "seconds")
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("failed", "refused", "retried")}
        return {**{name: getattr(self, name) for name in named}, **counts, "errors": self.errors}


def kind_of(reason: str) -> str:
    """A failure without what the server said about it, to be counted."""
    return reason.partition(": ")[0] if reason.startswith("HTTP ") else reason


class Meter:
    """A bar on a terminal; in a log a line for every twentieth."""

    def __init__(self, progress: Progress, tally: Tally):
        self._progress, self._tally = progress, tally
        self._start = time.monotonic()
        self._shown = 20 * tally.known // max(1, tally.asked)

    def show(self) -> None:
        tally = self._tally
        done, total = tally.known + tally.received, max(1, tally.asked)
        per_trace = (time.monotonic() - self._start) / max(1, tally.received)
        width = 30 * done // total
        failed = f", {tally.failed.total()} failed" if tally.failed else ""
        state = f"{done}/{total}{failed}, {per_trace * (total - done) / 60:.1f} min left"
        self._progress.update(f"sampling {'━' * width}{'╌' * (30 - width)} {state}")
        if not self._progress.live and 20 * done // total > self._shown:
            self._shown = 20 * done // total
            self._progress.line(f"sampling: {state}")
