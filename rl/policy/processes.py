"""The process group, as the launcher made it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rl.policy.sharding import LaunchError, Sharding

# How long a collective call waits for the others. The first process starts workers, sends them weights, and samples on
# while they are restarted, each for as long as the recipe allows; a share of rollouts or problems may take hours more
# than another. NCCL's own limit of 10 minutes, and gloo's of 30, would end such a run. A process that ends is another
# matter: its launcher ends the others at once.
PATIENCE = timedelta(hours=24)


def leave() -> None:
    """Ends the process group in order, as the last thing a process does: its threads, if they are still there when the
    interpreter is taken down, now and then abort the process, and a run that has succeeded would count as failed."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The process group: rank, world size, device, and sums over processes."""

    group: Any = None  # of these calls; None is the group of all

    def __init__(self) -> None:
        self.sharding = Sharding.of_environment()
        if self.sharding.kind == "fsdp2" and self.sharding.offload_parameters and not torch.cuda.is_available():
            raise LaunchError("fsdp_config.fsdp_offload_params: there is no GPU to offload from; set it to false")
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        if announced > 1 or (self.sharding.kind != "none" and "WORLD_SIZE" in os.environ):
            from accelerate import PartialState

            cpu = not torch.cuda.is_available()
            # cpu: accelerate would look for DeepSpeed here, and on a CPU set up nothing for FSDP.
            state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl", timeout=PATIENCE)
            self.rank, self.world = state.process_index, state.num_processes
            self.device = state.device
        else:
            self.rank, self.world = 0, 1
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rank = int(os.environ.get("RANK", "0"))
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
        dist.all_reduce(total, group=self.group)
        return dict(zip(keys, total.tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)

    def apart(self) -> Processes:
        """The same processes on the CPU, through a group of its own: for a second thread, whose calls must not meet
        those of the first. Every process has to ask for it, in the same order."""
        other = copy.copy(self)
        if self.world > 1:
            other.group = dist.new_group(backend="gloo", timeout=PATIENCE)
            other.device = torch.device("cpu")
        return other

    def all_reduce(self, tensors: list[Tensor], bucket_elements: int = 25_000_000) -> None:
        """Sums tensors over processes in place, through flat buckets."""
        bucket: list[Tensor] = []
        size = 0
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            size += tensor.numel()
            if size >= bucket_elements or i == len(tensors) - 1:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat, group=self.group)
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(part.view_as(t))
                bucket, size = [], 0
