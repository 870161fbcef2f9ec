"""Rewards of groups that are complete, computed while others are still being sampled.

A reward function is called with whole groups, but with how many of them depends on time. So all rewards must be
`per_group`: what they give a completion depends on nothing outside its group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType

from rl.experience import Completion

Score = Callable[[list[Completion]], None]


class EarlyScores:
    """`with EarlyScores(score) as scores: ... scores.add(groups) ... scores.finish()`.

    score: called in a thread of its own, never twice at a time, with all groups that have come since the last call: a
        reward that asks a server asks for all of them together.
    """

    def __init__(self, score: Score):
        self._score = score
        self._waiting: SimpleQueue[Sequence[Completion] | None] = SimpleQueue()  # None: there is no more
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)

    def add(self, groups: Sequence[Completion]) -> None:
        """Raises what went wrong with earlier ones."""
        if self._error is not None:
            raise self._error
        if groups:
            self._waiting.put(groups)

    def finish(self) -> None:
        """Waits until everything that was added is scored."""
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> EarlyScores:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(None)

    def _run(self) -> None:
        try:
            more = True
            while more:
                batch, more = self._arrived()
                if batch:
                    self._score(batch)
        except BaseException as error:  # raised where the groups come from
            self._error = error

    def _arrived(self) -> tuple[list[Completion], bool]:
        """Everything that waits, at least one thing; whether there may be more."""
        groups = self._waiting.get()
        batch: list[Completion] = []
        while groups is not None:
            batch += groups
            try:
                groups = self._waiting.get_nowait()
            except Empty:
                return batch, True
        return batch, False
