"""Where the weights live and how a gradient becomes an update: what every backend has in common.

`Replicated` (DDP), `FullyShardedBackend` (FSDP2) and `DeepSpeedBackend` (ZeRO) differ in who holds which part; the
update is the same: gradients summed over micro-batches and processes, clipped by their global norm, AdamW on float32
masters with weight decay on matrices only.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.fp8.context import keep_quantized_weights
from rl.policy import shards
from rl.policy.adamw import AdamW
from rl.policy.execution import Execution
from rl.policy.load import DTYPES, cast_parameters
from rl.policy.lora import block_of, merged
from rl.policy.packing import Pack, idle_pack
from rl.policy.processes import Processes
from rl.policy.sharding import LaunchError
from rl.recipe import OptimizerSpec

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch and DeepSpeed name them

Named = Iterator[tuple[str, Tensor]]
Read = Callable[[str], Any]  # name -> a lazily read tensor of a checkpoint: `[:]`, `[a:b]`


class NonFinite(RuntimeError):
    """A loss or gradient is NaN or infinite; the message names the tensor."""


class Backend(ABC):
    """Every process calls the same methods in the same order; most of them communicate."""

    execution: Execution
    lockstep = False  # whether a forward or backward of one process waits for those of the others

    def __init__(self, model: Any, compute_dtype: torch.dtype, spec: OptimizerSpec, processes: Processes):
        self.model, self.compute_dtype, self.spec, self.processes = model, compute_dtype, spec, processes
        self.rank, self.world = processes.rank, processes.world
        # Of all weights in compute type, before any is sharded.
        self.weight_bytes = sum(p.numel() for p in model.parameters()) * compute_dtype.itemsize
        self.skipped = 0  # updates left out because something was not finite
        self.updates = 0  # Adam's count of steps
        self.poisoned = False  # a micro-batch of the coming update had no finite loss

    # ---- an update -------------------------------------------------------------------------------------

    def micro_batches(self, packs: Sequence[Pack]) -> Iterator[Pack]:
        """The packs. In lockstep every process gets equally many, at least one: those with fewer get idle ones."""
        missing = max(1, *self.gather(len(packs))) - len(packs) if self.lockstep else 0
        yield from packs
        yield from (idle_pack() for _ in range(missing))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch; its loss is already divided by the global denominator."""
        if torch.isfinite(loss):
            self._differentiate(loss)
            return
        if self.spec.on_nonfinite == "stop":
            raise NonFinite(f"the loss of a micro-batch is {loss.item()}; optimizer.on_nonfinite: skip goes on")
        self.poisoned = True
        if self.lockstep:  # the others wait for this backward; that it is no number makes all of them skip the update
            self._differentiate(loss * math.nan)

    @abstractmethod
    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clips and updates, or leaves the update out where something is not finite.

        Returns (gradient norm before clipping, NaN if it was left out; whether it was made).
        """

    @abstractmethod
    def _differentiate(self, loss: Tensor) -> None: ...

    def _skip(self, reason: str) -> None:
        if self.spec.on_nonfinite == "stop":
            raise NonFinite(f"{reason} is not finite")
        self.skipped += 1

    # ---- over processes --------------------------------------------------------------------------------

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return self.processes.sum(values)

    def gather(self, value: Any) -> list[Any]:
        return self.processes.gather(value)

    # ---- weights ---------------------------------------------------------------------------------------

    @abstractmethod
    def _weights(self, trained: bool) -> Named:
        """Parameters, or the trained ones among them, whole and in compute type."""

    def named_weights(self) -> Named:
        """(name in the model, whole tensor in compute type) of every weight, one at a time; adapters merged.

        Every process takes all of them: each may be gathered from all. For their names in files, see `names.py`.
        """
        yield from merged(self.model, self._weights(trained=False))
        yield from self.buffers.items()

    def changed_weights(self) -> Named:
        """Those of `named_weights` that training can change: with adapters the blocks that have some, whole, as an
        engine may keep several weights of a block in one tensor (q, k and v)."""
        changed = {block_of(name) for name in (*trained_names(self.model), *self.buffers)}
        yield from ((name, tensor) for name, tensor in self.named_weights() if block_of(name) in changed)

    def trained_weights(self) -> Named:
        """What training changes: with adapters these, by their own names, and nothing else."""
        yield from self._weights(trained=True)
        yield from self.buffers.items()

    @abstractmethod
    def sampler_model(self) -> Any:
        """The whole model in compute type, for sampling: never run through shards, token by token."""

    @abstractmethod
    def sampler_weights(self) -> Named:
        """What `sampler_model` lacks since the last update; nothing where it shares the trained tensors."""

    @abstractmethod
    def frozen_copy(self) -> tuple[Any, Execution]:
        """Another model with the present weights, for a reference, as spread out as this one."""

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What belongs to the model's weights though no gradient moves it (the biases of balanced experts)."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in parameters}

    # ---- checkpoints: the same whichever backend wrote them ----------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"adam_steps": self.updates, "skipped": self.skipped}

    def tensors(self) -> Named:
        """Whole float32 masters, Adam moments and buffers by parameter name, one at a time, for `load`."""
        yield from self._master_tensors()
        yield from ((f"buffer/{name}", tensor) for name, tensor in self.buffers.items())

    def load(self, state: Mapping[str, Any], read: Read) -> None:
        """Takes up what `state` and `tensors` gave, whatever backend and number of processes they came from."""
        self.updates, self.skipped = state["adam_steps"], state["skipped"]
        self._load_masters(read)
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                buffer.copy_(shards.part(buffer, read(f"buffer/{name}")))

    @abstractmethod
    def _master_tensors(self) -> Named:
        """("master/NAME", ...), ("exp_avg/NAME", ...), ("exp_avg_sq/NAME", ...) of every trained parameter."""

    @abstractmethod
    def _load_masters(self, read: Read) -> None: ...


def trained_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def adamw(masters: Sequence[Tensor], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Weight decay on matrices only, as everywhere in the field; norms and biases have none."""
    groups = [
        {"params": [m for m in masters if m.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.eps}
    if spec.moments == "float32":
        return torch.optim.AdamW(groups, **settings, fused=True)
    return AdamW(groups, **settings, moments=DTYPES[spec.moments])


def learning_rate(spec: OptimizerSpec, update: int, total: int) -> float:
    """Rate of update `update` (from 0) of `total`: linear warm-up, then constant, cosine or linear."""
    if update < spec.warmup_updates:
        return spec.learning_rate * (update + 1) / spec.warmup_updates
    if spec.schedule == "constant":
        return spec.learning_rate
    done = min(1.0, (update - spec.warmup_updates) / max(1, total - spec.warmup_updates - 1))
    share = 0.5 * (1 + math.cos(math.pi * done)) if spec.schedule == "cosine" else 1 - done
    return spec.learning_rate * (spec.final_ratio + (1 - spec.final_ratio) * share)


class WholeCopy:
    """An untrained copy in compute type of a model that is about to be sharded, for what needs it whole: the sampler,
    and a reference while it is made."""

    def __init__(self, model: Any, compute_dtype: torch.dtype, device: torch.device, *, samples: bool, reference: bool):
        self._samples = samples
        self._model: Any = None
        if samples or reference:
            made = copy.deepcopy(model).requires_grad_(False).eval()
            cast_parameters(made, compute_dtype)
            keep_quantized_weights(made, samples)  # decoding would make them anew for every token
            self._model = made.to(device)

    @property
    def model(self) -> Any:
        assert self._model is not None, "made without a model to sample from"
        return self._model

    def for_reference(self) -> Any:
        """Another one where a sampler has this one; else this one, which nobody else wants whole."""
        model = self.model
        if self._samples:
            other = copy.deepcopy(model)
            keep_quantized_weights(other, False)  # it will be sharded
            return other
        self._model = None
        return model


def load_backend(
    model: Any,
    compute_dtype: torch.dtype,
    spec: OptimizerSpec,
    processes: Processes,
    *,
    samples: bool,
    reference: bool = False,
) -> Backend:
    """The backend that the accelerate configuration names. samples: whether `sampler_model` will be asked for;
    reference: whether `frozen_copy` will be, once, before the first update."""
    sharding = processes.sharding
    if sharding.kind == "none":
        from rl.policy.replicated import Replicated

        return Replicated(model.to(processes.device), compute_dtype, spec, processes)
    if sharding.kind == "fsdp2":
        from rl.policy.fsdp import FullyShardedBackend

        return FullyShardedBackend(model, compute_dtype, spec, processes, samples=samples, reference=reference)
    try:
        from rl.policy.zero import DeepSpeedBackend
    except ImportError as error:
        raise LaunchError(f"{sharding} needs DeepSpeed: pip install 'r1forge[deepspeed]' ({error})") from error
    return DeepSpeedBackend(model, compute_dtype, spec, processes, samples=samples, reference=reference)
