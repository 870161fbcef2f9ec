"""The process group as the launcher made it, and what the accelerate configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


class LaunchError(RuntimeError):
    """Launcher and process group disagree, or ask for what is not here."""


@dataclass(frozen=True)
class Sharding:
    """How the model is spread over the processes: what `recipes/accelerate/*.yaml` say, and nothing else does."""

    kind: Literal["none", "fsdp2", "zero"] = "none"
    stage: int = 0  # of ZeRO
    reshard: bool = True  # FSDP2: a layer's weights are dropped after its forward, gathered again for its backward
    offload_parameters: bool = False  # to CPU memory
    offload_optimizer: bool = False

    @classmethod
    def of_environment(cls) -> Sharding:
        """From the variables in which `accelerate launch` hands on its configuration."""
        if _flag("ACCELERATE_USE_MEGATRON_LM"):
            raise LaunchError(
                "the accelerate configuration asks for Megatron-LM, which is not supported: use distributed_type "
                "MULTI_GPU, FSDP or DEEPSPEED, as in recipes/accelerate/"
            )
        if _flag("ACCELERATE_USE_FSDP"):
            return cls._fsdp()
        if _flag("ACCELERATE_USE_DEEPSPEED"):
            return cls._deepspeed()
        return cls()

    @classmethod
    def _fsdp(cls) -> Sharding:
        if os.environ.get("FSDP_VERSION") != "2":
            raise LaunchError("fsdp_config.fsdp_version: only 2 is supported, as in recipes/accelerate/fsdp2.yaml")
        if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
            raise LaunchError(
                "fsdp_config.fsdp_activation_checkpointing: remove it; model.gradient_checkpointing in the recipe decides"
            )
        offload = _flag("FSDP_OFFLOAD_PARAMS")
        if offload and not torch.cuda.is_available():
            raise LaunchError("fsdp_config.fsdp_offload_params: there is no GPU to offload from; set it to false")
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        return cls("fsdp2", reshard=reshard, offload_parameters=offload, offload_optimizer=offload)

    @classmethod
    def _deepspeed(cls) -> Sharding:
        get = os.environ.get
        if get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise LaunchError(
                "deepspeed_config.deepspeed_config_file: remove it; optimizer, clipping and precision are the "
                "recipe's, stage and offloading stand beside it, as in recipes/accelerate/zero3.yaml"
            )
        for variable, field, advice in (
            ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "optimizer.clip in the recipe"),
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "the recipe's batch sizes"),
        ):
            if get(variable, "none").lower() not in ("none", "1"):
                raise LaunchError(f"deepspeed_config.{field}: remove it, {advice} decides")
        if _flag("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
            raise LaunchError(
                "deepspeed_config.zero3_init_flag: set it to false; models are loaded whole, then sharded"
            )
        stage = int(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        if stage not in (1, 2, 3):
            raise LaunchError(f"deepspeed_config.zero_stage: {stage} is not 1, 2 or 3; MULTI_GPU replicates the model")
        offload = {}
        for what, variable in (("optimizer", "OPTIMIZER"), ("param", "PARAM")):
            device = get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{variable}_DEVICE", "none").lower()
            if device not in ("none", "cpu"):
                raise LaunchError(f"deepspeed_config.offload_{what}_device: {device} is not supported; use none or cpu")
            offload[what] = device == "cpu"
        if offload["param"] and stage != 3:
            raise LaunchError("deepspeed_config.offload_param_device: cpu needs zero_stage 3")
        return cls("zero", stage, offload_parameters=offload["param"], offload_optimizer=offload["optimizer"])

    @property
    def whole(self) -> bool:
        """Whether every process holds the whole model in its compute type."""
        return self.kind == "none" or (self.kind == "zero" and self.stage < 3)

    def __str__(self) -> str:
        offloaded = " offloaded to CPU" if self.offload_parameters or self.offload_optimizer else ""
        return {"none": "replicated", "fsdp2": "FSDP2", "zero": f"ZeRO-{self.stage}"}[self.kind] + offloaded


class Processes:
    """The process group: rank, world size, device, and sums over processes."""

    def __init__(self) -> None:
        self.sharding = Sharding.of_environment()
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        if announced > 1 or (self.sharding.kind != "none" and "WORLD_SIZE" in os.environ):
            from accelerate import PartialState

            cpu = not torch.cuda.is_available()
            # cpu: accelerate would look for DeepSpeed here, and on a CPU set up nothing for FSDP.
            state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl")
            self.rank, self.world, self.local_rank = (
                state.process_index,
                state.num_processes,
                state.local_process_index,
            )
            self.device = state.device
        else:
            self.rank, self.world, self.local_rank = 0, 1, 0
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rank = int(os.environ.get("RANK", "0"))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        launched = int(os.environ.get("ACCELERATE_NUM_PROCESSES", announced))
        # accelerate's MULTI_CPU leaves these for MPI to read, and starts a single process.
        if announced == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
            launched = 0
        if self.world != announced or self.rank != rank or launched != announced:
            raise LaunchError(
                f"the launcher announced process {rank} of {max(announced, launched)}, but this is process "
                f"{self.rank} of {self.world}: with accelerate on CPU set `distributed_type: MULTI_GPU` together "
                "with `use_cpu: true`, as in recipes/accelerate/cpu-2.yaml"
            )
        if self.sharding.kind != "none" and not dist.is_initialized():
            raise LaunchError(
                f"the accelerate configuration asks for {self.sharding}, but no process group was started: use "
                "`accelerate launch --config_file` with a file like recipes/accelerate/fsdp2.yaml"
            )

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums each value over all processes, in float64; every process must pass the same keys."""
        if self.world == 1:
            return dict(values)
        keys = sorted(values)
        total = torch.tensor([values[k] for k in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(keys, total.tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def all_reduce(self, tensors: list[Tensor], bucket_elements: int = 25_000_000) -> None:
        """Sums tensors over processes in place, through flat buckets."""
        bucket: list[Tensor] = []
        size = 0
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            size += tensor.numel()
            if size >= bucket_elements or i == len(tensors) - 1:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(part.view_as(t))
                bucket, size = [], 0


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
