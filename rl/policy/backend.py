"""Where the weights live and how a gradient becomes an update.

`Replicated` is plain data parallelism: every process holds the whole model, gradients are summed once per
update. Sharded backends (FSDP2, DeepSpeed) are to offer the same few methods.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rl.policy.adamw import AdamW
from rl.policy.load import DTYPES, cast_parameters
from rl.recipe import OptimizerSpec


class NonFinite(RuntimeError):
    """A loss or gradient is NaN or infinite; the message names the tensor."""


class Backend(Protocol):
    rank: int
    world: int

    def backward(self, loss: Tensor) -> None: ...
    def step(self, learning_rate: float) -> tuple[float, bool]: ...
    def sum(self, values: Mapping[str, float]) -> dict[str, float]: ...
    def gather(self, value: Any) -> list[Any]: ...
    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class Processes:
    """The process group, as the launcher made it: rank, world size, device, and sums over processes."""

    def __init__(self) -> None:
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
            if os.environ.get(variable, "false").lower() in ("1", "true"):
                raise LaunchError(
                    f"the accelerate configuration asks for {variable.removeprefix('ACCELERATE_USE_')}, which this "
                    "release does not train with: use distributed_type MULTI_GPU"
                )
        if announced > 1:
            from accelerate import PartialState

            cpu = not torch.cuda.is_available()
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


class LaunchError(RuntimeError):
    """Launcher and process group disagree, or ask for what is not here."""


class Replicated:
    """float32 master weights, float32 accumulated gradients and AdamW beside a model in its compute type."""

    def __init__(self, model: Any, compute_dtype: torch.dtype, spec: OptimizerSpec, processes: Processes):
        self.model, self.spec, self.processes = model, spec, processes
        self.rank, self.world = processes.rank, processes.world
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float() for p in self.parameters]
        self.shared = compute_dtype == torch.float32
        if self.shared:
            self.masters = self.parameters
        else:
            cast_parameters(model, compute_dtype)  # gives parameters new storage; the masters keep the old
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
                parameter.master = master  # layers that form gradients in float32 (FP8) add them there themselves
        decays = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]
        groups = [{"params": decays, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        settings: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.eps}
        self.optimizer: torch.optim.Optimizer
        if spec.moments == "float32":
            self.optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        else:
            self.optimizer = AdamW(groups, **settings, moments=DTYPES[spec.moments])
        self.skipped = 0  # updates left out because something was not finite
        self.poisoned = False  # a micro-batch of the coming update had no finite loss

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch; its loss is already divided by the global denominator."""
        if torch.isfinite(loss):
            loss.backward()
        elif self.spec.on_nonfinite == "stop":
            raise NonFinite(f"the loss of a micro-batch is {loss.item()}; optimizer.on_nonfinite: skip goes on")
        else:
            self.poisoned = True

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Sums gradients over processes, clips, updates. Returns (gradient norm before clipping, updated)."""
        gradients = []
        for master in self.masters:
            if master.grad is None:  # nothing informative in this mini-batch: momentum still moves
                master.grad = torch.zeros_like(master)
            gradients.append(master.grad)
        if self.world > 1:
            _all_reduce(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        poisoned = self.processes.sum({"poisoned": float(self.poisoned)})["poisoned"] > 0
        finite = bool(torch.isfinite(norm)) and not poisoned
        if finite:
            torch._foreach_mul_(gradients, min(1.0, self.spec.clip / (float(norm) + 1e-6)))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            if not self.shared:
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    parameter.copy_(master)
        elif self.spec.on_nonfinite == "stop":
            bad = [n for n, g in zip(self.names, gradients, strict=True) if not torch.isfinite(g).all()]
            raise NonFinite(f"the gradient of {bad[0] if bad else 'all parameters together'} is not finite")
        else:
            self.skipped += 1
            self.poisoned = False
        for master in self.masters:
            master.grad = None
        return float(norm), finite

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return self.processes.sum(values)

    def gather(self, value: Any) -> list[Any]:
        return self.processes.gather(value)

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """(Hugging Face name, tensor in compute type) of every weight."""
        yield from ((name, p.detach()) for name, p in zip(self.names, self.parameters, strict=True))
        yield from self.buffers.items()

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What belongs to the model's weights though no gradient moves it (the biases of balanced experts)."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in parameters}

    def state(self) -> dict[str, Any]:
        return {
            "masters": {n: m.detach() for n, m in zip(self.names, self.masters, strict=True)},
            "buffers": self.buffers,
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            master.copy_(state["masters"][name])
            if not self.shared:
                parameter.copy_(master)
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped = state["skipped"]


def learning_rate(spec: OptimizerSpec, update: int, total: int) -> float:
    """Rate of update `update` (from 0) of `total`: linear warm-up, then constant, cosine or linear."""
    if update < spec.warmup_updates:
        return spec.learning_rate * (update + 1) / spec.warmup_updates
    if spec.schedule == "constant":
        return spec.learning_rate
    done = min(1.0, (update - spec.warmup_updates) / max(1, total - spec.warmup_updates - 1))
    share = 0.5 * (1 + math.cos(math.pi * done)) if spec.schedule == "cosine" else 1 - done
    return spec.learning_rate * (spec.final_ratio + (1 - spec.final_ratio) * share)


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


def _all_reduce(tensors: list[Tensor], bucket_elements: int = 25_000_000) -> None:
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
