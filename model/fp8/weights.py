"""Weights in E4M3, quantised once for all micro-batches and samples that read them between two optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from model.fp8.backends import Operators
from model.fp8.quantized import Quantized

_changes = 0  # how often weights may have changed in ways that autograd's counters do not show


def weights_changed(*_: Any) -> None:
    """Every quantised copy is made anew at its next use.

    Called by itself after each step of any torch optimizer (fused ones change weights without counting it), and not
    needed for other in-place operations. Call it after writing through `.data` or into memory that numpy shares.
    """
    global _changes
    _changes += 1


register_optimizer_step_post_hook(weights_changed)


class QuantizedWeight:
    """The copy of one weight [..., N, K] in 128 × 128 blocks, and its transpose for input gradients.

    rounding: the weight is rounded to this type first. Masters are float32, what a sampler is sent is bfloat16: both
        must quantise the same numbers. None quantises the weight as it is.
    keep: whether the copy outlives its use; without, it is made for each product (see `Fp8Context`).
    """

    def __init__(self, rounding: torch.dtype | None, keep: bool):
        self.rounding, self.keep = rounding, keep
        self._key: tuple[Any, ...] | None = None
        self._copy: Quantized | None = None
        self._transpose: Quantized | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        return QuantizedWeight(self.rounding, self.keep)  # another model's weights are other weights

    def get(self, weight: Tensor, operators: Operators) -> Quantized:
        key = (weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype, _changes, operators)
        if self._copy is not None and key == self._key:
            return self._copy
        with torch.inference_mode(False), torch.no_grad():  # made while sampling, it must serve training too
            made = operators.quantize_weight(weight.detach().to(self.rounding or weight.dtype))
        if not self.keep:
            return made
        if self._copy is not None and self._copy.values.device == made.values.device:
            # In place: the CUDA graphs of a sampler read from these addresses.
            self._copy.values.copy_(made.values)
            self._copy.scales.copy_(made.scales)
        else:
            self._copy = made
        self._key, self._transpose = key, None
        return self._copy

    def transposed(self, weight: Tensor, operators: Operators) -> Quantized:
        """[..., K, N]; blocks are square, so nothing is rounded again."""
        current = self.get(weight, operators)
        if not self.keep:
            return current.t()
        if self._transpose is None:
            with torch.inference_mode(False), torch.no_grad():
                self._transpose = current.t()
        return self._transpose


def add_gradient(weight: Tensor, product: Any) -> Tensor | None:
    """Forms a weight gradient where it is to be summed: `product(out_dtype=..., accumulate=...)` is dy^T x.

    A trainer that keeps float32 masters beside its weights sets `weight.master`: then the product is added to
    `master.grad` in float32, and the weight itself gets no gradient. Otherwise it is returned, for autograd to add.
    """
    master: nn.Parameter | Tensor | None = getattr(weight, "master", None)
    if master is None:
        return product(out_dtype=weight.dtype, accumulate=None)
    if master.grad is None:
        master.grad = product(out_dtype=torch.float32, accumulate=None)
    else:
        product(out_dtype=torch.float32, accumulate=master.grad)
    return None
