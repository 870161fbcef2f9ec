"""How forwards of a model are run: directly, or, where its parameters are sharded, through what gathers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Execution(NamedTuple):
    """`run(function, *arguments)` calls the function within a forward of the whole model: where parameters are sharded,
    only there are those outside its layers (embedding, final norm, head) at hand, and gradients find their way back."""

    device: torch.device
    dtype: torch.dtype  # of the computation; parameters may be kept in another
    run: Callable[..., Any]


class Root(torch.nn.Module):
    """A module whose forward is whatever it is asked to call: what FSDP2 and DeepSpeed wrap."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def whole_on(model: Any) -> Execution:
    """Of a model that is whole in this process."""
    return Execution(next(model.parameters()).device, model.dtype, directly)
