"""The reference policy of the KL term: frozen, replaced now and then, or an exponential moving average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rl.policy.packing import Pack
from rl.policy.policy import Policy
from rl.recipe import ReferenceSpec


class Reference:
    """A frozen copy of the policy in its compute type.

    `updated` is called after each optimizer update and moves it as the recipe says: R1 replaces it by the
    policy every 400 updates; an EMA is kept in float32.
    """

    def __init__(self, policy: Policy, spec: ReferenceSpec):
        self.spec = spec
        self.source = policy
        self.policy = Policy(
            copy.deepcopy(policy.model).requires_grad_(False).eval(),
            temperature=policy.temperature,
            logits_chunk=policy.logits_chunk,
        )
        self.policy.packed = policy.packed
        self.average = self._floats() if spec.ema is not None else None

    @torch.no_grad()
    def logprobs(self, batch: Pack) -> Tensor:
        return self.policy.logprobs(batch)[0]

    @torch.no_grad()
    def updated(self, updates_done: int) -> None:
        if self.spec.replace_every and updates_done % self.spec.replace_every == 0:
            for mine, theirs in self._pairs():
                mine.copy_(theirs)
        elif self.average is not None and self.spec.ema is not None:
            for average, (mine, theirs) in zip(self.average, self._pairs(), strict=True):
                average.lerp_(theirs.float(), 1 - self.spec.ema)
                mine.copy_(average)
        else:
            return
        for mine, theirs in self._buffers():
            mine.copy_(theirs)

    @property
    def moves(self) -> bool:
        return self.spec.replace_every is not None or self.spec.ema is not None

    def state(self) -> dict[str, Any]:
        """Only what cannot be had again from the recipe's model."""
        tensors = self.average if self.average is not None else [p for p, _ in self._pairs()]
        return {
            "reference": [t.clone() for t in tensors],
            "reference_buffers": [mine.clone() for mine, _ in self._buffers()],
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for i, (mine, _) in enumerate(self._pairs()):
            saved = state["reference"][i]
            mine.copy_(saved)
            if self.average is not None:
                self.average[i].copy_(saved)
        for (mine, _), saved in zip(self._buffers(), state["reference_buffers"], strict=True):
            mine.copy_(saved)

    def _floats(self) -> list[Tensor]:
        return [p.detach().float().clone() for p in self.source.model.parameters()]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.policy.model.parameters(), self.source.model.parameters(), strict=True))

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """What no gradient moves, the balancing biases of experts among them."""
        return list(zip(self.policy.model.buffers(), self.source.model.buffers(), strict=True))
