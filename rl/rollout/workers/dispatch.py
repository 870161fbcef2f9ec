"""Who samples which prompt. Pure bookkeeping: a prompt is waiting, with one worker, or done, and done once."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from rl.rollout.types import Sample
from rl.rollout.workers.wire import Request

MOST_TRIES = 4  # a prompt that so many workers were lost with is suspected of having ended them


@dataclass
class _Prompt:
    request: Request
    place: int
    tries: int = 0

    @property
    def cost(self) -> int:
        return len(self.request.prompt) + 1

    @property
    def order(self) -> tuple[int, int]:
        """Longest first; LocalSampler's own order, so that one worker samples as it would in this process."""
        return -self.cost, self.place


@dataclass
class _Queue:
    """What one worker has been given: not asked for yet, and asked for."""

    unsent: dict[str, _Prompt] = field(default_factory=dict)
    sent: dict[str, _Prompt] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.unsent) + len(self.sent)

    @property
    def load(self) -> tuple[int, int]:
        return self.count, sum(p.cost for p in (*self.unsent.values(), *self.sent.values()))


class Dispatch:
    """The prompts of one call of `generate`, longest first, each to the worker that has least to do.

    in_flight: prompts that a worker is given at a time; the others wait for whoever comes to an end first.
    """

    def __init__(self, requests: Iterable[Request], in_flight: int):
        prompts = [_Prompt(request, place) for place, request in enumerate(requests)]
        self.total, self.in_flight = len(prompts), max(1, in_flight)
        self._waiting = deque(sorted(prompts, key=lambda p: p.order))
        self._queues: dict[str, _Queue] = {}
        self.done: dict[str, list[Sample]] = {}
        self.moved = 0  # prompts that were taken from a lost worker

    @property
    def complete(self) -> bool:
        return len(self.done) == self.total

    def deal(self, workers: Collection[str]) -> None:
        """Gives waiting prompts to these workers, as far as they have room."""
        while self._waiting:
            room = [w for w in workers if self._queue(w).count < self.in_flight]
            if not room:
                return
            chosen = min(room, key=lambda w: (self._queue(w).load, w))
            prompt = self._waiting.popleft()
            self._queue(chosen).unsent[prompt.request.key] = prompt

    def unsent(self, worker: str) -> list[Request]:
        return [p.request for p in self._queue(worker).unsent.values()]

    def was_sent(self, worker: str, requests: Iterable[Request]) -> None:
        queue = self._queue(worker)
        for request in requests:
            queue.sent[request.key] = queue.unsent.pop(request.key)

    def sent(self, worker: str) -> list[str]:
        return list(self._queue(worker).sent)

    def finish(self, worker: str, key: str, samples: list[Sample]) -> None:
        """A result. KeyError: one that this worker was not asked for, or no longer is."""
        del self._queue(worker).sent[key]
        self.done[key] = samples

    def give_back(self, worker: str) -> list[str]:
        """Everything that a lost worker has not finished waits again; returns the keys of what it was asked for.

        RuntimeError: a prompt that workers are lost with again and again.
        """
        queue = self._queues.pop(worker, _Queue())
        for prompt in queue.sent.values():
            prompt.tries += 1
            if prompt.tries >= MOST_TRIES:
                raise RuntimeError(
                    f"{prompt.tries} workers were lost while they sampled one prompt of {len(prompt.request.prompt)} "
                    "tokens: look at their logs"
                )
        back = [*self._waiting, *queue.unsent.values(), *queue.sent.values()]
        self._waiting = deque(sorted(back, key=lambda p: p.order))
        self.moved += len(queue.sent)
        return list(queue.sent)

    def _queue(self, worker: str) -> _Queue:
        return self._queues.setdefault(worker, _Queue())
