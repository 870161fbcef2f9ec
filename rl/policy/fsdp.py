"""FSDP2: masters, gradients, Adam moments and weights cut along their first dimension, one part a process.

A layer's weights are gathered in the compute type for its forward and again for its backward; gradients are summed in
float32 and scattered. torch's own `fully_shard` is used; of accelerate's configuration only the variables are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from rl.policy import shards
from rl.policy.backend import Named, WholeCopy
from rl.policy.execution import Execution, Root
from rl.policy.load import kept_in_float32
from rl.policy.masters import LocalMasters
from rl.policy.processes import Processes
from rl.policy.sharding import LaunchError
from rl.recipe import OptimizerSpec


class FullyShardedBackend(LocalMasters):
    """The masters are this process's shards of float32 parameters."""

    lockstep = True

    def __init__(
        self,
        model: Any,
        compute_dtype: torch.dtype,
        spec: OptimizerSpec,
        processes: Processes,
        *,
        samples: bool,
        reference: bool = False,
    ):
        super().__init__(model, compute_dtype, spec, processes)
        kept = kept_in_float32(model)
        if kept and compute_dtype != torch.float32:
            raise LaunchError(f"FSDP2: {kept[0]} must stay float32; set model.dtype: float32")
        self._copy = WholeCopy(model, compute_dtype, processes.device, samples=samples, reference=reference)
        root = shard(model, processes, compute_dtype)
        self.execution = Execution(processes.device, compute_dtype, runner(root))
        # Taken once: while a layer is gathered, its module shows whole parameters in their place.
        self.sharded: list[tuple[str, Any]] = list(model.named_parameters())
        parameters = [p for _, p in self.sharded if p.requires_grad]
        self._hold(parameters, [shards.local(p) for p in parameters])

    def _reduced_gradients(self) -> tuple[list[Tensor], Tensor]:
        gradients = [
            torch.zeros_like(master) if p.grad is None else shards.local(p.grad)
            for p, master in zip(self.parameters, self.masters, strict=True)
        ]
        square = float(torch.nn.utils.get_total_norm(gradients)) ** 2
        return gradients, torch.tensor(self.sum({"square": square})["square"] ** 0.5)

    def _updated(self) -> None:
        pass  # the masters are the parameters' own memory, and nothing is gathered between updates

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def _weights(self, trained: bool) -> Named:
        for name, parameter in self.sharded:
            if parameter.requires_grad or not trained:
                yield name, shards.whole(parameter, shards.local(parameter).to(self.compute_dtype))

    def sampler_model(self) -> Any:
        return self._copy.model

    def sampler_weights(self) -> Named:
        yield from self.trained_weights()

    def frozen_copy(self) -> tuple[Any, Execution]:
        return frozen(self._copy.for_reference(), self.processes, self.compute_dtype)


def shard(model: Any, processes: Processes, compute_dtype: torch.dtype | None) -> Root:
    """Shards a model in place, layer by layer. compute_dtype: None = that of its parameters."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    if processes.sharding.offload_parameters and processes.device.type != "cpu":
        settings["offload_policy"] = CPUOffloadPolicy()
    # What transformers says must not be split: the decoder layers.
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=processes.sharding.reshard, **settings)
    # The rest (embedding, final norm, head) stays gathered from the forward to the end of the backward.
    root: Any = fully_shard(Root(model), reshard_after_forward=False, **settings)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by global denominators, so gradients are summed; gloo cannot scale while it sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return cast(Root, root)


def runner(root: Root) -> Callable[..., Any]:
    """`Execution.run` of a sharded model: drops what a forward without gradient leaves gathered."""
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        found = root(function, *arguments)
        if not torch.is_grad_enabled():
            for unit in units:
                unit.reshard()  # the next forward may find other weights
        return found

    return run


def frozen(model: Any, processes: Processes, compute_dtype: torch.dtype) -> tuple[Any, Execution]:
    """Shards a whole model in compute type, for a reference. Needs no optimizer, so every backend has it."""
    root = shard(model, processes, None)
    return model, Execution(processes.device, compute_dtype, runner(root))
