"""What every sampler takes and gives: `Sampler`, `SamplingParams`, `Sample`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 = greedy; top_k 0 = all tokens. max_tokens counts the stop token.

    seed: base of every random stream, None = drawn from the operating system. Sample j of prompt i uses the
    stream (seed, streams[i] or i, j): neither batch neighbours nor order change a sample's random numbers.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "n must be at least 1": self.n >= 1,
            "temperature must not be negative": self.temperature >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "top_k must not be negative": self.top_k >= 0,
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "min_tokens must lie in [0, max_tokens]": 0 <= self.min_tokens <= self.max_tokens,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(f"{message}: {self}")


def streams_of(prompts: Sequence[Sequence[int]], streams: Sequence[int] | None) -> Sequence[int]:
    """The number of each prompt's random stream: the given one, or its place. ValueError for what cannot be sampled."""
    if any(len(p) == 0 for p in prompts):
        raise ValueError(f"prompt {next(i for i, p in enumerate(prompts) if not len(p))} is empty")
    if streams is not None and len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts")
    return range(len(prompts)) if streams is None else streams


@dataclass(frozen=True)
class Sample:
    """One completion. The stop token, when one was drawn, is the last of token_ids.

    logprobs: of each token under the *processed* distribution it was drawn from (after temperature, top-k
    and top-p), in nats; for greedy sampling those of the plain distribution (temperature 1).
    weights_version: of the weights that drew the first token; newest_version: of those that drew the last, where an
    update came in between (None: the same).
    routed_experts: array [prompt + completion - 1, L, K] of uint8 (int16 for more than 256 experts) where it was asked
    for: which experts each token that the model has read met, in each of the L layers that have experts.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weights_version: int
    routed_experts: Any = None
    newest_version: int | None = None

    @property
    def last_version(self) -> int:
        return self.weights_version if self.newest_version is None else self.newest_version


class Sampler(Protocol):
    """Draws completions; holds a numbered version of the policy's weights.

    One that may be given weights while it samples, by another thread, says so by an attribute `takes_weights_midway`:
    true; its samples carry the oldest version that had a part in them.
    """

    version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """n samples for each prompt, in the prompts' order. streams: one number a prompt (see params)."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights by (Hugging Face name, tensor) pairs; no pairs = shared with the trainer."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A sampler that can hand out groups while it goes on with others."""

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> Iterable[list[tuple[int, list[Sample]]]]:
        """`generate` bit by bit: (place of a prompt, its n samples) of those that have become complete. May be
        closed early."""
        ...
