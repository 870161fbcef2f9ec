"""float32 masters that this process updates itself, whole ones (`Replicated`) or its shards (FSDP2)."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from rl.policy import shards
from rl.policy.backend import MOMENTS, Backend, Named, Read, adamw, trained_names
from rl.policy.load import DTYPES


class LocalMasters(Backend):
    """Subclasses call `_hold`, and say how gradients cross processes."""

    def _hold(self, parameters: list[Any], masters: list[Tensor]) -> None:
        """parameters: those that are trained, perhaps sharded; masters: what of each this process updates."""
        self.names = trained_names(self.model)
        self.parameters, self.masters = parameters, masters
        self.optimizer = adamw(masters, self.spec)

    @abstractmethod
    def _reduced_gradients(self) -> tuple[list[Tensor], Tensor]:
        """Gradients of the masters, summed over processes, and their global norm."""

    @abstractmethod
    def _updated(self) -> None:
        """After the masters moved."""

    def _differentiate(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[float, bool]:
        gradients, norm = self._reduced_gradients()
        poisoned = self.sum({"poisoned": float(self.poisoned)})["poisoned"] > 0
        finite = bool(torch.isfinite(norm)) and not poisoned
        if finite:
            torch._foreach_mul_(gradients, min(1.0, self.spec.clip / (float(norm) + 1e-6)))
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.updates += 1
            self._updated()
        else:
            bad = [n for n, g in zip(self.names, gradients, strict=True) if not torch.isfinite(g).all()]
            self._skip(f"the gradient of {bad[0] if bad else 'all parameters together'}")
        self.poisoned = False
        self._forget_gradients()
        return float(norm) if finite else math.nan, finite

    def _forget_gradients(self) -> None:
        for master in self.masters:
            master.grad = None

    # ---- checkpoints -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _master_tensors(self) -> Named:
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            yield f"master/{name}", shards.whole(parameter, master.detach())
            for moment in MOMENTS:
                held = self.optimizer.state[master].get(moment)
                yield f"{moment}/{name}", shards.whole(parameter, torch.zeros_like(master) if held is None else held)

    @torch.no_grad()
    def _load_masters(self, read: Read) -> None:
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            master.copy_(shards.part(parameter, read(f"master/{name}")))
            state = self.optimizer.state[master]
            state["step"] = torch.tensor(float(self.updates), device=master.device)
            for moment in MOMENTS:
                saved = shards.part(parameter, read(f"{moment}/{name}"))
                state[moment] = saved.to(master.device, DTYPES[self.spec.moments], copy=True)
        self._updated()
