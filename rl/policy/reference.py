"""The reference policy of the KL term: frozen, replaced now and then, or an exponential moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rl.policy import shards
from rl.policy.backend import Backend
from rl.policy.packing import Pack
from rl.policy.policy import Policy
from rl.recipe import ReferenceSpec


class Reference:
    """A frozen copy of the policy in its compute type, spread over the processes as the policy is.

    `updated` is called after each optimizer update and moves it as the recipe says: R1 replaces it by the
    policy every 400 updates; an EMA is kept in float32.
    """

    def __init__(self, policy: Policy, backend: Backend, spec: ReferenceSpec):
        self.spec, self.backend = spec, backend
        model, execution = backend.frozen_copy()
        self.policy = Policy(
            model, temperature=policy.temperature, logits_chunk=policy.logits_chunk, execution=execution
        )
        self.policy.packed = policy.packed
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        self.average: dict[str, Tensor] = {}  # this process's part of it
        if spec.ema is not None:
            self.average = {name: shards.local(p).float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def logprobs(self, batch: Pack) -> Tensor:
        return self.policy.logprobs(batch)[0]

    @torch.no_grad()
    def updated(self, updates_done: int) -> None:
        replaced = bool(self.spec.replace_every) and updates_done % (self.spec.replace_every or 1) == 0
        if not replaced and self.spec.ema is None:
            return
        for name, whole in self.backend.named_weights():
            if name not in self.parameters:
                continue
            parameter = self.parameters[name]
            mine, theirs = shards.local(parameter), shards.part(parameter, whole)
            if self.spec.ema is not None:
                mine.copy_(self.average[name].lerp_(theirs.float(), 1 - self.spec.ema))
            else:
                mine.copy_(theirs)
        for name, buffer in self.backend.model.named_buffers():
            self.buffers[name].copy_(buffer)

    @property
    def moves(self) -> bool:
        return self.spec.replace_every is not None or self.spec.ema is not None

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Only what cannot be had again from the recipe's model; by name, whole, one at a time."""
        if not self.moves:
            return
        for name, parameter in self.parameters.items():
            held = self.average[name] if self.average else shards.local(parameter)
            yield f"reference/{name}", shards.whole(parameter, held)
        for name, buffer in self.buffers.items():
            yield f"reference_buffer/{name}", buffer

    @torch.no_grad()
    def load(self, read: Callable[[str], Any]) -> None:
        if not self.moves:
            return
        for name, parameter in self.parameters.items():
            saved = shards.part(parameter, read(f"reference/{name}"))
            shards.local(parameter).copy_(saved)
            if self.average:
                self.average[name].copy_(saved)
        for name, buffer in self.buffers.items():
            buffer.copy_(shards.part(buffer, read(f"reference_buffer/{name}")))
