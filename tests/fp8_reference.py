"""What FP8 layers compute, written down with float64 products of fake-quantised tensors: round, then go on in float64.

Each of the three products of y = x W^T has roundings of its own: x along channels for y, gradients along channels for
dx, both along tokens for dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fp8.reference import quantize_activation, quantize_weight


def rounded(x: Tensor, *, tokens: bool = False, gradient: bool = False, power_of_two: bool = False) -> Tensor:
    """x [M, K] in tiles of 128 channels, or of 128 tokens."""
    q = quantize_activation(x, floor=None if gradient else 1e-4, power_of_two=power_of_two, transposed=tokens)
    return q.dequantize().double().mT if tokens else q.dequantize().double()


def rounded_weight(weight: Tensor) -> Tensor:
    return quantize_weight(weight.bfloat16()).dequantize().double()


def linear(x: Tensor, weight: Tensor, dy: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dW) of [M, K], [N, K], [M, N], in float64."""
    w = rounded_weight(weight)
    y = rounded(x, power_of_two=power_of_two) @ w.mT
    dx = rounded(dy, gradient=True) @ w
    dw = rounded(dy, gradient=True, tokens=True).mT @ rounded(x, tokens=True, power_of_two=power_of_two)
    return y, dx, dw


def network(
    x: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, dx, d gate_up, d down, d weight) of one SwiGLU. With weights [M] of the tokens, of an expert, whose x and dy
    travel in FP8."""
    dispatched = weight is not None
    factor = (torch.ones(len(x)) if weight is None else weight).double().requires_grad_()
    wide, narrow = rounded_weight(gate_up), rounded_weight(down)
    sent = rounded(x, power_of_two=dispatched)
    hidden = (sent @ wide.mT).to(x.dtype)
    y = rounded(_swiglu(hidden.float())) * factor.detach()[:, None] @ narrow.mT
    kept = rounded(hidden).requires_grad_()
    inner = _swiglu(kept) * factor[:, None]
    dy_sent = rounded(dy, gradient=True, power_of_two=dispatched)
    d_hidden, d_weight = torch.autograd.grad(inner, [kept, factor], (dy_sent @ narrow).to(x.dtype).double())
    # What an expert is sent is rounded again where it arrives; a dense network's projections read the tensor itself.
    x_arrived, dy_arrived = (sent, dy_sent) if dispatched else (x, dy)
    dy_t = rounded(dy_arrived, gradient=True, tokens=True, power_of_two=dispatched).mT
    d_down = dy_t @ rounded(inner.detach(), tokens=True)
    dx = rounded(d_hidden, gradient=True) @ wide
    along_tokens = rounded(x_arrived, tokens=True, power_of_two=dispatched)
    d_gate_up = rounded(d_hidden, gradient=True, tokens=True).mT @ along_tokens
    return y, dx, d_gate_up, d_down, d_weight


def straight_through(x: Tensor, error: Tensor) -> Tensor:
    """x as rounded, with gradient 1: `error` is what rounding added where it was looked at."""
    return x + error


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within it, fills storage address -> bytes with what autograd keeps, besides the model's own parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
