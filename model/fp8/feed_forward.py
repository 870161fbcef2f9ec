"""SwiGLU networks and routed experts in FP8: what lies between their projections is kept in FP8 and formed again.

Of each network the outputs of gate and up projection are kept for the backward pass in E4M3; silu(gate) · up is
computed from them again (V3 report, section 3.3.3).

T tokens of C channels (M of networks), inner size I, E experts, K experts a token, R = T·K rows sorted by expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.experts import Experts, places
from model.fp8.context import Fp8Context, Fp8Module, as_rows
from model.fp8.linear import Fp8Linear, quantize_gradient
from model.fp8.quantized import ROW, TILE, Quantized
from model.fp8.weights import QuantizedWeight, add_gradient
from model.moe import SwiGLU


class Fp8SwiGLU(SwiGLU):
    """A dense network, or the shared experts. Its projections are Fp8Linears.

    Kept for the backward pass: the input in tiles along the tokens, as an Fp8Linear keeps it, and gate and up in E4M3.
    """

    gate_proj: Fp8Linear
    up_proj: Fp8Linear
    down_proj: Fp8Linear

    @classmethod
    def convert(cls, network: SwiGLU) -> None:
        """`network` itself, from now on of this class."""
        network.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        if torch.is_grad_enabled():
            y: Tensor = _SwiGLU.apply(x, *weights, self)
            return y
        return _swiglu(x, weights, self, columns=False)[0]


def _swiglu(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], network: Fp8SwiGLU, *, columns: bool
) -> tuple[Tensor, Quantized | None, Quantized]:
    """(y [..., C], x along its tokens if wanted, gate and up [M, 2P]).

    P is I filled up with zeros to whole tiles, so that none has channels of both.
    """
    gate_proj, up_proj, down_proj = weights
    context, inner_size = network.gate_proj.context, len(gate_proj)
    ops = context.operators(x.device)
    given = context.input(x, power_of_two=False, columns=columns)
    halves = [
        ops.fp8_gemm(given.rows, projection.quantized.get(weight, ops), out_dtype=x.dtype)
        for projection, weight in ((network.gate_proj, gate_proj), (network.up_proj, up_proj))
    ]
    inner, kept = ops.swiglu_quantize(torch.cat([_whole_tiles(half) for half in halves], -1))
    down = network.down_proj.quantized.get(down_proj, ops)
    y = ops.fp8_gemm(_channels(inner, 0, inner_size), down, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], len(down_proj)), given.columns, kept


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, network: Fp8SwiGLU) -> Tensor:
        columns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        y, x_t, kept = _swiglu(x, (gate, up, down), network, columns=columns)
        tensors = [tensor for q in (kept, x_t) if q is not None for tensor in (q.values, q.scales)]
        ctx.save_for_backward(gate, up, down, *tensors)
        ctx.network = network
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, values, scales, *columns = ctx.saved_tensors  # see linear.py for the weights
        network: Fp8SwiGLU = ctx.network
        down_proj = network.down_proj
        ops = down_proj.context.operators(grad.device)
        dy, dy_t = quantize_gradient(ops, as_rows(grad), True, ctx.needs_input_grad[3])
        assert dy is not None
        d_inner = ops.fp8_gemm(dy, down_proj.quantized.transposed(down_proj.weight, ops), out_dtype=grad.dtype)
        size = d_inner.shape[1]
        found = ops.swiglu_quantize_backward(_whole_tiles(d_inner), Quantized(values, scales, ROW))
        d_x: Tensor | None = None
        d_weights: list[Tensor | None] = []
        halves = zip((network.gate_proj, network.up_proj), (0, found.gate_up.shape[1] // 2), strict=True)
        for place, (projection, start) in enumerate(halves, 1):
            if ctx.needs_input_grad[0]:
                transposed = projection.quantized.transposed(projection.weight, ops)
                part = ops.fp8_gemm(_channels(found.gate_up, start, size), transposed, out_dtype=grad.dtype)
                d_x = part if d_x is None else d_x.add_(part)
            d_weight = None
            if ctx.needs_input_grad[place]:
                d_half_t, x_t = _head(found.gate_up_t, start, size), Quantized(columns[0], columns[1], ROW)
                d_weight = add_gradient(projection.weight, partial(ops.fp8_gemm, d_half_t, x_t))
            d_weights.append(d_weight)
        d_down = None
        if dy_t is not None:
            d_down = add_gradient(down_proj.weight, partial(ops.fp8_gemm, dy_t, _head(found.out_t, 0, size)))
        return None if d_x is None else d_x.view(*grad.shape[:-1], d_x.shape[1]), *d_weights, d_down, None


def _whole_tiles(x: Tensor) -> Tensor:
    """x with zeros after its channels, up to whole tiles."""
    missing = -x.shape[-1] % TILE
    return F.pad(x, (0, missing)) if missing else x


def _channels(q: Quantized, start: int, count: int) -> Quantized:
    """`count` channels of q, tiled along them, from the start of a tile on."""
    tiles = slice(start // TILE, -(-(start + count) // TILE))
    return Quantized(q.values[:, start : start + count], q.scales[:, tiles], ROW)


def _head(q: Quantized, start: int, count: int) -> Quantized:
    """`count` rows of q from `start` on."""
    return Quantized(q.values[start : start + count], q.scales[start : start + count], ROW)


class Fp8Experts(Experts, Fp8Module):
    """Routed experts. What they are sent, the layer's input and the gradient of their output, has scales that are
    powers of two. Both are quantised before they are dispatched, and again, in tiles along tokens, where they arrive:
    powers of two make the second rounding exact but for underflow.

    The gate's weights are applied before the down projection, which is linear: what comes out of it is only summed, and
    a weight's gradient needs silu(gate) · up, which is computed again anyway. A row's weight goes into the row's
    scales after rounding, and leaves the values as they are.

    Kept for the backward pass: the input once, [T, C] in E4M3 whatever the number of experts a token, gate and up
    [R, 2I] in E4M3, the weights and the order of the rows.
    """

    in_fp8 = ("gate_up_proj", "down_proj")
    gate_up_quantized: QuantizedWeight
    down_quantized: QuantizedWeight

    @classmethod
    def convert(cls, experts: Experts, context: Fp8Context) -> None:
        """`experts` itself, from now on of this class."""
        experts.__class__ = cls
        assert isinstance(experts, Fp8Experts)
        experts.context = context
        experts.gate_up_quantized, experts.down_quantized = context.weight(), context.weight()

    def quantize_weights(self) -> None:
        ops = self.context.operators(self.down_proj.device)
        self.gate_up_quantized.get(self.gate_up_proj, ops)
        self.down_quantized.get(self.down_proj, ops)

    def products(self, x_TC: Tensor, weight_TK: Tensor, order_R: Tensor, count_E: Tensor) -> Tensor:
        ends_E = count_E.cumsum(0).to(torch.int32)
        y: Tensor = _Experts.apply(x_TC, weight_TK, self.gate_up_proj, self.down_proj, order_R, ends_E, self)
        return y


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        weight_TK: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        order_R: Tensor,
        ends_E: Tensor,
        module: Fp8Experts,
    ) -> Tensor:
        ops = module.context.operators(x_TC.device)
        sent = ops.quantize_activation(x_TC, power_of_two=True)
        arrived = _rows(sent, order_R // weight_TK.shape[-1])
        gate_up_RI = ops.grouped_gemm(
            arrived, module.gate_up_quantized.get(gate_up_proj, ops), ends_E, out_dtype=x_TC.dtype
        )
        inner, kept = ops.swiglu_quantize(gate_up_RI, weight_TK.flatten()[order_R].float())
        ctx.save_for_backward(
            gate_up_proj, down_proj, weight_TK, order_R, ends_E, sent.values, sent.scales, kept.values, kept.scales
        )
        ctx.module = module
        y_RC = ops.grouped_gemm(inner, module.down_quantized.get(down_proj, ops), ends_E, out_dtype=x_TC.dtype)
        return y_RC[places(order_R).view_as(weight_TK)].sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        _, _, weight_TK, order_R, ends_E, *kept = ctx.saved_tensors  # see linear.py for the weights
        sent, gate_up = Quantized(kept[0], kept[1], ROW), Quantized(kept[2], kept[3], ROW)
        module: Fp8Experts = ctx.module
        gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
        ops = module.context.operators(grad_TC.device)
        token_R, place_TK = order_R // weight_TK.shape[-1], places(order_R).view_as(weight_TK)
        dy = _rows(ops.quantize_activation(grad_TC, floor=None, power_of_two=True), token_R)
        d_inner = ops.grouped_gemm(
            dy, module.down_quantized.transposed(down_proj, ops), ends_E, out_dtype=grad_TC.dtype
        )
        weight_R = weight_TK.flatten()[order_R].float()
        found = ops.swiglu_quantize_backward(d_inner, gate_up, weight_R, offsets=ends_E)
        d_x = d_weight = d_gate_up = d_down = None
        if ctx.needs_input_grad[0]:
            transposed = module.gate_up_quantized.transposed(gate_up_proj, ops)
            d_x = ops.grouped_gemm(found.gate_up, transposed, ends_E, out_dtype=grad_TC.dtype)[place_TK].sum(1)
        if ctx.needs_input_grad[1]:
            d_weight = found.weight[place_TK].to(weight_TK.dtype)
        columns = partial(ops.quantize_activation, power_of_two=True, transposed=True, offsets=ends_E)
        if ctx.needs_input_grad[2]:
            x_t = columns(_rows(sent, token_R))
            d_gate_up = add_gradient(gate_up_proj, partial(ops.grouped_wgrad, found.gate_up_t, x_t, ends_E))
        if ctx.needs_input_grad[3]:
            d_down = add_gradient(down_proj, partial(ops.grouped_wgrad, columns(dy, floor=None), found.out_t, ends_E))
        return d_x, d_weight, d_gate_up, d_down, None, None, None


def _rows(x: Quantized, index_R: Tensor) -> Quantized:
    """The rows of x that are named. As bytes: not every device gathers float8."""
    return Quantized(x.values.view(torch.uint8)[index_R].view(x.values.dtype), x.scales[index_R], x.tile)
