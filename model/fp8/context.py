"""What the FP8 modules of one model share: who computes their products, and the input that was quantised last."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.fp8 import reference
from model.fp8.backends import Operators, choose
from model.fp8.quantized import Quantized
from model.fp8.weights import QuantizedWeight


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K]."""
    return x.reshape(-1, x.shape[-1])


class Input(NamedTuple):
    """An input of [M, K]: along its channels for the product, along its tokens for the weight gradient if wanted."""

    rows: Quantized
    columns: Quantized | None


class Fp8Context:
    """backend: as `backends.choose` takes it.

    keep_weights: whether quantised weights stay in memory between micro-batches, 1 byte for each and, in training, as
        much for the transposes. False where whole weights exist only around their use (FSDP2, which also gathers them
        without counting the change).
    weight_rounding: see `QuantizedWeight`.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        keep_weights: bool = True,
        weight_rounding: torch.dtype | None = torch.bfloat16,
    ):
        self.backend, self.keep_weights, self.weight_rounding = backend, keep_weights, weight_rounding
        self._operators: dict[torch.device, Operators] = {}
        self._last: tuple[Any, int, bool, Input] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Context:
        return Fp8Context(self.backend, keep_weights=self.keep_weights, weight_rounding=self.weight_rounding)

    def operators(self, device: torch.device) -> Operators:
        if device not in self._operators:
            self._operators[device] = choose(self.backend, device).operators
        return self._operators[device]

    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.weight_rounding, self.keep_weights)

    def quantize(self, weight: Tensor) -> Quantized:
        """A weight of the model, wherever it is, as the products see it."""
        return self.operators(weight.device).quantize_weight(weight.detach().to(self.weight_rounding or weight.dtype))

    def input(self, x: Tensor, *, power_of_two: bool, columns: bool) -> Input:
        """x [..., K] quantised. Projections that read the same tensor one after another (queries and latents, gate and
        up) share one copy, in the product and in what is kept for the backward pass."""
        last = self._last
        if last is not None and not x.is_inference():  # which do not count their changes
            source, version, same_scales, found = last
            known = source() is x and version == x._version and same_scales == power_of_two
            if known and (found.columns is not None or not columns):
                return found
        x_MK, ops = as_rows(x), self.operators(x.device)
        if columns:
            made = Input(*ops.quantize_both(x_MK, power_of_two=power_of_two))
        else:
            made = Input(ops.quantize_activation(x_MK, power_of_two=power_of_two), None)
        self._last = None if x.is_inference() else (weakref.ref(x, self._forget), x._version, power_of_two, made)
        return made

    def _forget(self, source: Any) -> None:
        """The last input is gone: so is its copy, unless a backward pass keeps it."""
        if self._last is not None and self._last[0] is source:
            self._last = None


class Fp8Module(nn.Module):
    """A layer that computes in FP8, with what it shares with the others of its model.

    in_fp8: names of the parameters that its products read so.
    """

    context: Fp8Context
    in_fp8: tuple[str, ...]

    def quantize_weights(self) -> None:
        raise NotImplementedError


def keep_quantized_weights(model: nn.Module, keep: bool) -> None:
    """Changes `keep_weights` of a converted model: of a copy that is whole, though the model itself is sharded."""
    for module in model.modules():
        if isinstance(module, Fp8Module):
            module.context.keep_weights = keep
            for value in vars(module).values():
                if isinstance(value, QuantizedWeight):
                    value.keep = keep


def waits_for_host(model: nn.Module, device: torch.device) -> bool:
    """Whether products of a converted model read on the host how large groups are: then no CUDA graph captures them."""
    contexts = (module.context for module in model.modules() if isinstance(module, Fp8Module))
    return any(context.operators(device) is reference for context in contexts)


def quantize_weights(model: nn.Module) -> None:
    """Brings quantised weights up to date now rather than at their next use: what a CUDA graph has captured reads them
    without looking whether the weights have changed."""
    for module in model.modules():
        if isinstance(module, Fp8Module) and module.context.keep_weights:
            module.quantize_weights()
