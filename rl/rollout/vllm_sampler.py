"""`VLLMSampler`: a `Sampler` over an engine in this process, for training and sampling on the same devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from rl.rollout.engine import Engine
from rl.rollout.types import Sample, SamplingParams
from rl.rollout.vllm_engine import VLLMEngine


class VLLMSampler:
    """Everything that `generate` is asked for is given to the engine at once; it batches as it likes.

    engine: `VLLMEngine` as a rule; nobody else may use it meanwhile.
    progress: called with (completions done, completions asked for).
    """

    def __init__(self, engine: Engine, *, progress: Callable[[int, int], None] | None = None):
        self.engine = engine
        self.progress = progress

    @property
    def version(self) -> int:
        return self.engine.version

    @version.setter
    def version(self, version: int) -> None:
        raise AttributeError("the version changes with the weights: update_weights")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        if streams is not None and len(streams) != len(prompts):
            raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts")
        chosen = streams if streams is not None else range(len(prompts))
        groups: dict[str, list[Sample]] = {}
        submitted: list[str] = []
        try:
            for place, (prompt, stream) in enumerate(zip(prompts, chosen, strict=True)):
                self.engine.submit(str(place), prompt, params, stream)
                submitted.append(str(place))
            while len(groups) < len(prompts):
                finished = self.engine.step()
                groups.update(finished)
                if finished and self.progress:
                    self.progress(len(groups) * params.n, len(prompts) * params.n)
        except BaseException:
            for key in submitted:  # so that the next call does not meet this one's groups
                self.engine.abort(key)
            raise
        return [groups[str(place)] for place in range(len(prompts))]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Unlike LocalSampler's, the engine has weights of its own: every update must carry them."""
        self.engine.update_weights(named_tensors, version)

    def release(self) -> None:
        """Gives the device's memory back (before training on it); the next call takes it again."""
        if isinstance(self.engine, VLLMEngine):
            self.engine.sleep()

    def close(self) -> None:
        self.engine.close()
