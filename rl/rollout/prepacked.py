"""Weights in oneDNN's own layout while sampling on CPU in bfloat16.

A decode step multiplies every weight matrix by a few rows only, so that bringing the matrix into the layout that
the processor's bfloat16 instructions read costs as much as a third of the product. It is done once a rollout
instead of once a step; the products are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def prepacked(model: Any, rows: int) -> Iterator[None]:
    """Within it, linear layers given at most `rows` rows read a prepacked copy of their weights.

    A copy costs as much memory as the weights. Nothing happens on other devices, for other types, or where
    this build of torch has no oneDNN. The weights must not change within.
    """
    layers = [m for m in model.modules() if _applies(m)] if _available() else []
    try:
        for layer in layers:
            layer.forward = _forward(layer, rows)
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def _available() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _applies(module: Any) -> bool:
    return (
        type(module) is torch.nn.Linear  # a subclass may mean something else by its weight
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.bfloat16
    )


def _forward(layer: torch.nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(x: Tensor) -> Tensor:
        if x.numel() > rows * x.shape[-1]:
            return torch.nn.functional.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
