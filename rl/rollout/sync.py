"""The trainer's weights on their way to the sampler, whichever it is, and the proof that they arrived."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.fp8.named import quantized_weights
from rl.policy.backend import Backend
from rl.policy.names import checkpoint_weights, in_fp8
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.rollout.local import LocalSampler
from rl.rollout.probe import check_probe
from rl.rollout.workers.sampler import WorkerSampler


class Sync:
    """Keeps a sampler (a LocalSampler, VLLMSampler or WorkerSampler) at the trainer's version. Every process of the
    trainer calls it at the same places."""

    def __init__(
        self,
        sampler: Any,
        source: Backend,
        policy: Policy,
        probe: list[int],
        tolerance: float,
        *,
        as_in_files: bool,
        fp8: bool = False,
        keeps_others: bool = True,
    ):
        """as_in_files: whether the engine knows weights by the names that they have in files, or by the model's own.
        fp8: whether weights that the policy's products read in FP8 are sent so.
        keeps_others: whether what the first update brought is still there later, for those that only bring changes."""
        self.sampler, self.source, self.policy, self.as_in_files = sampler, source, policy, as_in_files
        self.probe, self.tolerance, self.keeps_others = probe, tolerance, keeps_others
        self.in_fp8 = in_fp8(policy.model, as_in_files=as_in_files) if fp8 else {}
        self.first = True  # nothing has been sent yet
        self.bytes = 0  # of the last update, as far as it has been read

    def send(self, version: int) -> dict[str, float]:
        """Returns metrics of the update."""
        sampler = self.sampler
        if isinstance(sampler, LocalSampler):
            own = sampler.model is self.source.sampler_model()  # its tensors are the backend's care
            sampler.update_weights(self.source.sampler_weights() if own else self.source.named_weights(), version)
            return {}
        if isinstance(sampler, WorkerSampler):
            self._send_to(sampler, version)
            return {"sync/version": float(version), **sampler.sync.metrics()}
        start = time.perf_counter()
        self._send_to(sampler, version)
        scores = sampler.engine.score([self.probe])[0]
        gap = check_probe(probe_logprobs(self.policy, self.probe), scores, self.tolerance, version)
        seconds = time.perf_counter() - start
        return {
            "sync/version": float(version),
            "sync/seconds": seconds,
            "sync/bytes": float(self.bytes),
            "sync/probe": gap,
        }

    def _send_to(self, sampler: Any, version: int) -> None:
        sampler.update_weights(self.weights(all_=self.first or not self.keeps_others), version)
        self.first = False

    def weights(self, all_: bool = True) -> Iterable[tuple[str, Tensor]]:
        """All of them, or those that training changes, as the engine knows them."""
        named = self.source.named_weights() if all_ else self.source.changed_weights()
        if self.as_in_files:
            named = checkpoint_weights(self.policy.model, named)
        self.bytes = 0
        return self._counted(quantized_weights(named, self.in_fp8))

    def _counted(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            self.bytes += tensor.nbytes
            yield name, tensor

    def make_room(self) -> None:
        """Between rollout and training: an engine on the trainer's devices gives their memory back."""
        if not isinstance(self.sampler, LocalSampler | WorkerSampler):
            self.sampler.release()

    def close(self) -> None:
        if not isinstance(self.sampler, LocalSampler):
            self.sampler.close()


@torch.no_grad()
def probe_logprobs(policy: Policy, tokens: list[int]) -> list[float]:
    """The policy's log-probabilities of tokens 1.. at temperature 1, as an engine's `score` gives them."""
    plain = copy.copy(policy)
    plain.temperature, plain.experts = 1.0, None
    (pack,) = plain.pack([Document(tokens[:1], tokens[1:])], len(tokens))
    values: list[float] = plain.logprobs(pack)[0].tolist()
    return values
