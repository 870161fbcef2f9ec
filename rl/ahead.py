"""Rollouts of coming steps, collected by a thread of its own while the trainer trains (`rollout.ahead`).

With a steps ahead, step s is sampled by the weights that step s - 1 - a left behind, or by those that the run began
with. The trainer sends them when the rollouts up to s - 1 are done, and only then may those of step s begin:

    trainer    | train 1 | train 2      | train 3 |
    sampler    | 1 | 2   | 3            | 4       |        a = 1
    weights        0       1              2

So which weights sampled what does not depend on how fast either of them is: samples are at most a steps old, and a
checkpoint, which is written after the weights were sent, finds the a steps that come next complete.

With `rollout.in_flight` weights are sent at once, into running rollouts. The bound stays, the rest does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rl.experience import Batch
from rl.policy.processes import Processes
from rl.run.progress import Timer

PATIENCE_S = 10.0  # for a rollout to end after a failure or an interrupt; its thread does not outlive the process


class Stopped(BaseException):
    """Ends a rollout that nobody waits for any more. Not an Exception: a reward's `except` must not swallow it."""


class Collector:
    """Collects steps in order, one at a time. All methods but `check` are for the trainer's thread.

    collect(index, cursor): the rollout of a step whose prompts begin at place `cursor` of their stream. It runs in
        the collector's thread, and communicates through `processes` only.
    last: the step after which there is nothing to collect.
    """

    def __init__(
        self,
        collect: Callable[[int, int], Batch],
        processes: Processes,
        *,
        ahead: int,
        in_flight: bool = False,
        last: int,
    ):
        self.ahead, self.in_flight, self.last = ahead, in_flight, last
        self.trainers = processes
        self.processes = processes.apart()
        self._collect = collect
        self._changed = threading.Condition()
        self._batches: dict[int, Batch] = {}  # collected, and not yet taken
        self._begun = self._collected = 0  # the newest step
        self._allowed = 0  # the newest step that may be begun
        self._error: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    # ---- the trainer's side ------------------------------------------------------------------------------

    def restore(self, step: int, batches: Sequence[Batch]) -> None:
        """The steps after `step` that a checkpoint had collected."""
        self._batches = {step + i: batch for i, batch in enumerate(batches, start=1)}

    def take(self, index: int, cursor: int) -> Batch:
        """Step `index`, as soon as it is collected. The first call begins the collecting, with prompts at `cursor`."""
        if self._thread is None:
            self._begin(index, cursor)
        with self._changed:
            self._wait_for(index)
            return self._batches.pop(index)

    @contextmanager
    def new_weights(self, index: int, timer: Timer) -> Iterator[None]:
        """After training step `index`: within it the sampler may be given the weights; then further steps may begin.

        Every process waits for all: they may share samplers.
        """
        if not self.in_flight:
            with timer("wait"):
                with self._changed:
                    self._wait_for(index + self.ahead)
                self.trainers.barrier()
        yield
        self.trainers.barrier()
        with self._changed:
            self._allowed = index + 1 + self.ahead
            self._changed.notify_all()

    def pending(self, step: int) -> list[Batch]:
        """The steps after `step` that are collected, without a gap, on every process."""
        with self._changed:
            collected = self._collected
        common = min(self.trainers.gather(collected))
        return [self._batches[i] for i in range(step + 1, common + 1)]

    def raise_failure(self) -> None:
        """What went wrong in the collector's thread, if anything did, with the traceback from there."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Training has ended: begins no step more, but what another process has begun, which this one takes part in."""
        with self._changed:
            self._allowed = self._begun
        begun = max(self.trainers.gather(self._begun))
        with self._changed:
            self.last = self._allowed = begun
            self._stopping = self.trainers.world == 1  # nobody else waits for what is under way
            self._changed.notify_all()

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread: after `finish`, or, if there was an error, as soon as it looks.

        After `finish` every process waits for all: the first one may end the workers that they share.
        """
        if error is not None:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(None if error is None else PATIENCE_S)
        if error is None:
            self.trainers.barrier()

    # ---- the thread --------------------------------------------------------------------------------------

    def check(self) -> None:
        """To be called now and then while sampling: raises Stopped when nobody needs the result."""
        if self._stopping:
            raise Stopped

    def _begin(self, index: int, cursor: int) -> None:
        if self._batches:
            cursor = self._batches[max(self._batches)].cursor
        self._begun = self._collected = index - 1 + len(self._batches)
        self._allowed = index + self.ahead
        arguments = (self._collected + 1, cursor)
        self._thread = threading.Thread(target=self._run, args=arguments, name="rollout", daemon=True)
        self._thread.start()

    def _run(self, index: int, cursor: int) -> None:
        try:
            while self._may_begin(index):
                batch = self._collect(index, cursor)
                with self._changed:
                    self._batches[index] = batch
                    self._collected = index
                    self._changed.notify_all()
                index, cursor = index + 1, batch.cursor
        except Stopped:
            pass
        except BaseException as error:  # SystemExit of a reward, too: it is for the trainer to raise
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _may_begin(self, step: int) -> bool:
        """Waits until step `step` may be begun, or never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or step <= self._allowed or step > self.last)
            if self._stopping or step > self.last:
                return False
            self._begun = step
            return True

    def _wait_for(self, step: int) -> None:
        """Until a step is collected; the lock is held."""
        step = min(step, self.last)
        self._changed.wait_for(lambda: self._error is not None or self._collected >= step)
        self.raise_failure()
