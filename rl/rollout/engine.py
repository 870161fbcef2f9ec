"""`Engine`: what a worker process drives. Requests go in one by one, finished groups come out of `step`.

A `Sampler` answers a whole batch; an engine is the half below it, which can be asked for more, stopped, and given new
weights between two steps. `LocalEngine` and `VLLMEngine` implement it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from rl.rollout.types import Sample, SamplingParams


class Engine(Protocol):
    """One thread at a time may call an engine; none of its methods waits for another request to come.

    takes_weights_midway: whether `update_weights` and `score` may be called while requests are unfinished, which then
    go on with the new weights. Not so of an engine that says RestartNeeded.
    """

    version: int
    takes_weights_midway: bool

    def submit(self, key: str, prompt: Sequence[int], params: SamplingParams, stream: int) -> None:
        """Asks for params.n samples of one prompt, under a key of the caller's own; sample j uses the random
        stream (params.seed, stream, j). ValueError if the request cannot be served."""
        ...

    def step(self) -> list[tuple[str, list[Sample]]]:
        """Goes on with what was submitted; returns the groups that are complete, all n samples of a key together."""
        ...

    def abort(self, key: str) -> None:
        """Forgets a request; an unknown or finished key is no error."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights of these Hugging Face names; the others stay as they are."""
        ...

    def score(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of each sequence's tokens 1.. under the current weights, at temperature 1, in nats."""
        ...

    def idle(self) -> bool:
        """Whether nothing that was submitted is unfinished."""
        ...

    def close(self) -> None:
        """Gives memory and processes back; nothing may be called afterwards."""
        ...


class RestartNeeded(RuntimeError):
    """This engine cannot take new weights while it runs: start another one from a checkpoint that has them."""
