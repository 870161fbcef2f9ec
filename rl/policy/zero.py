"""DeepSpeed ZeRO: optimizer and masters (1), gradients (2) and weights (3) cut over the processes.

DeepSpeed averages gradients over processes and divides losses by a number of micro-batches; here losses are divided by
global denominators, so it is given one micro-batch's loss times the number of processes, and told that `step` ends an
update. Clipping, AdamW and its groups are those of the other backends.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from rl.policy.backend import MOMENTS, Backend, Named, Read, WholeCopy, adamw
from rl.policy.execution import Execution, Root, directly
from rl.policy.load import kept_in_float32
from rl.policy.processes import Processes
from rl.policy.sharding import LaunchError, Sharding
from rl.recipe import OptimizerSpec

deepspeed.utils.logger.setLevel(logging.WARNING)

BUCKET = 25_000_000  # elements that are reduced or gathered at once; DeepSpeed's own 500 million take gigabytes


class DeepSpeedBackend(Backend):
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
        sharding = processes.sharding
        low = compute_dtype != torch.float32
        self.whole = sharding.whole
        # In bfloat16 DeepSpeed's ZeRO-1 is another optimizer, which stops at a gradient that is zero or no number.
        self.stage = 2 if sharding.stage == 1 and low else sharding.stage
        kept = kept_in_float32(model)
        if kept and low:
            raise LaunchError(f"{sharding}: {kept[0]} must stay float32; set model.dtype: float32")
        if not self.whole:
            self._copy = WholeCopy(model, compute_dtype, processes.device, samples=samples, reference=reference)
        self.named: list[tuple[str, Any]] = list(model.named_parameters())
        self.trained = [(name, p) for name, p in self.named if p.requires_grad]
        # DeepSpeed casts whatever floats, makes its masters of the cast weights, and would cast the buffers too.
        originals = {name: p.detach().to("cpu", copy=True) for name, p in self.trained} if low else {}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if low else {}
        # Compiled with g++ at first use, while everyone waits, and used by inference alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, *_ = deepspeed.initialize(
            model=Root(model),
            optimizer=adamw([p for _, p in self.trained], spec),
            config=configuration(self.stage, sharding, spec, low, processes.device),
            dist_init_required=False,
        )
        self.zero = self.engine.optimizer
        self._begin_moments()
        for name, buffer in buffers.items():
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer.to(processes.device))
        for name, parameter in self.trained:
            if name in originals:
                safe_set_full_fp32_param(parameter, originals.pop(name).to(processes.device))
        if self.stage == 3:
            for module, parameter in used_elsewhere(model, self.engine.module):
                deepspeed.zero.register_external_parameter(module, parameter)
        self.execution = Execution(processes.device, compute_dtype, self.engine)

    def _differentiate(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.world)

    def step(self, learning_rate: float) -> tuple[float, bool]:
        for group in self.zero.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self.poisoned = False
        if not self.engine.was_step_applied():
            self._skip("a gradient")
            return math.nan, False
        self.updates += 1
        return float(self.engine.get_global_grad_norm()), True

    # ---- weights ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _weights(self, trained: bool) -> Named:
        for name, parameter in self.trained if trained else self.named:
            if self.whole:
                yield name, parameter.detach()
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                gathered = parameter.detach().clone()
            yield name, gathered

    def sampler_model(self) -> Any:
        return self.model if self.whole else self._copy.model

    def sampler_weights(self) -> Named:
        if not self.whole:
            yield from self.trained_weights()

    def frozen_copy(self) -> tuple[Any, Execution]:
        if self.whole:
            return copy.deepcopy(self.model).requires_grad_(False).eval(), self.execution._replace(run=directly)
        from rl.policy.fsdp import frozen  # what has no optimizer is cut by FSDP2, under any backend

        return frozen(self._copy.for_reference(), self.processes, self.compute_dtype)

    # ---- checkpoints -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _master_tensors(self) -> Named:
        for name, parameter in self.trained:
            yield f"master/{name}", safe_get_full_fp32_param(parameter)
            for moment in MOMENTS:
                yield f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment)

    @torch.no_grad()
    def _load_masters(self, read: Read) -> None:
        device = self.processes.device
        for part in self.parts:
            self.zero.optimizer.state[part]["step"].fill_(float(self.updates))
        for name, parameter in self.trained:
            master = read(f"master/{name}")[:].to(device)
            safe_set_full_fp32_param(parameter, master)
            if self.whole:
                parameter.data.copy_(master)
            else:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(master)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, read(f"{moment}/{name}")[:].to(device), moment)

    @property
    def parts(self) -> list[Tensor]:
        """This process's masters, flat: of each group of parameters one."""
        held: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        return held

    def _begin_moments(self) -> None:
        """Adam's state before its first step. DeepSpeed would make it in that step, and then find that of the first
        group of parameters only, so that a checkpoint could not be written."""
        for part in self.parts:
            moments = {moment: torch.zeros_like(part) for moment in MOMENTS}
            self.zero.optimizer.state[part] = {"step": torch.zeros((), device=part.device), **moments}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()


def configuration(
    stage: int, sharding: Sharding, spec: OptimizerSpec, low: bool, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration: what the other backends do, said in its words. low: compute in bfloat16."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET}
    offload = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if sharding.offload_optimizer:
        zero["offload_optimizer"] = offload
    if sharding.offload_parameters:
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": spec.clip,
        "steps_per_print": 1 << 30,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": low, "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on CPU as well, with the same numbers
        "zero_optimization": zero,
    }


def used_elsewhere(model: Any, root: Root) -> list[tuple[Any, Any]]:
    """(module, parameter) where a module's forward reads a parameter that is not its own: ZeRO-3 gathers by module."""
    from model.moe import MixtureOfExperts

    output = model.get_output_embeddings()
    found = [(root, p) for p in (output.weight, output.bias) if p is not None]
    return found + [(m, m.gate.weight) for m in model.modules() if isinstance(m, MixtureOfExperts)]
