"""Plain data parallelism: every process holds the whole model, gradients are summed once per update."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rl.policy.backend import Named
from rl.policy.execution import Execution, directly
from rl.policy.load import cast_parameters
from rl.policy.masters import LocalMasters
from rl.policy.processes import Processes
from rl.recipe import OptimizerSpec


class Replicated(LocalMasters):
    """float32 master weights, float32 accumulated gradients and AdamW beside a model in its compute type."""

    def __init__(self, model: Any, compute_dtype: torch.dtype, spec: OptimizerSpec, processes: Processes):
        super().__init__(model, compute_dtype, spec, processes)
        self.execution = Execution(processes.device, compute_dtype, directly)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.shared = compute_dtype == torch.float32
        self._hold(parameters, parameters if self.shared else [p.detach().float() for p in parameters])
        if not self.shared:
            cast_parameters(model, compute_dtype)  # gives parameters new storage; the masters keep the old
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
                parameter.master = master  # layers that form gradients in float32 (FP8) add them there themselves

    def _reduced_gradients(self) -> tuple[list[Tensor], Tensor]:
        # Nothing informative in this mini-batch: momentum still moves.
        gradients = [torch.zeros_like(m) if m.grad is None else m.grad for m in self.masters]
        if self.world > 1:
            self.processes.all_reduce(gradients)
        return gradients, torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def _updated(self) -> None:
        if not self.shared:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    def _weights(self, trained: bool) -> Named:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not trained:
                yield name, parameter.detach()

    def sampler_model(self) -> Any:
        return self.model

    def sampler_weights(self) -> Named:
        yield from ()  # the trained tensors are the sampler's

    def frozen_copy(self) -> tuple[Any, Execution]:
        return copy.deepcopy(self.model).requires_grad_(False).eval(), self.execution


def _accumulate_into(master: Tensor) -> Any:
    """A hook that adds a low-precision gradient to the master's float32 one and frees it."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is None:  # its layer has added to the master's already
            return
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return hook
