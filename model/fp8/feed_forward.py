"""SwiGLU networks and routed experts in FP8: what lies between their projections is kept in FP8 and formed again.

Of each network the outputs of gate and up projection are kept for the backward pass in E4M3; silu(gate) · up is
computed from them again (V3 report, section 3.3.3).

T tokens of C channels, E experts of inner size I, K experts a token, R = T·K rows sorted by expert.
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
from model.fp8.quantized import ROW, Quantized
from model.fp8.weights import QuantizedWeight, add_gradient
from model.moe import SwiGLU


class Fp8SwiGLU(SwiGLU):
    """A dense network, or the shared experts. Its projections are Fp8Linears."""

    @classmethod
    def convert(cls, network: SwiGLU) -> None:
        """`network` itself, from now on of this class."""
        network.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], -1)
        y: Tensor = _SwiGLUDown.apply(gate_up, self.down_proj.weight, self.down_proj)
        return y


class _SwiGLUDown(torch.autograd.Function):
    """silu(gate) · up and the down projection, [..., 2I] -> [..., C]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, module: Fp8Linear) -> Tensor:
        ops = module.context.operators(gate_up.device)
        inner, kept = ops.swiglu_quantize(as_rows(gate_up))
        ctx.save_for_backward(weight, kept.values, kept.scales)
        ctx.module = module
        y = ops.fp8_gemm(inner, module.quantized.get(weight, ops), out_dtype=gate_up.dtype)
        return y.view(*gate_up.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        _, values, scales = ctx.saved_tensors
        module: Fp8Linear = ctx.module
        weight = module.weight
        ops = module.context.operators(grad.device)
        rows, dy_t = quantize_gradient(ops, as_rows(grad), True, ctx.needs_input_grad[1])
        assert rows is not None
        d_inner = ops.fp8_gemm(rows, module.quantized.transposed(weight, ops), out_dtype=torch.float32)
        with torch.enable_grad():
            gate_up = Quantized(values, scales, ROW).dequantize().requires_grad_()
            gate, up = gate_up.chunk(2, -1)
            inner = F.silu(gate) * up
        (d_gate_up,) = torch.autograd.grad(inner, gate_up, d_inner)
        dw = None
        if dy_t is not None:
            inner_t = ops.quantize_activation(inner.detach(), transposed=True)
            dw = add_gradient(weight, partial(ops.fp8_gemm, dy_t, inner_t))
        return d_gate_up.to(grad.dtype).view(*grad.shape[:-1], d_gate_up.shape[-1]), dw, None


class Fp8Experts(Experts, Fp8Module):
    """Routed experts. What they are sent, the layer's input and the gradient of their output, has scales that are
    powers of two. The input is quantised before it is dispatched, and again, in tiles along tokens, where it arrives:
    powers of two make the second rounding exact but for underflow.

    Kept for the backward pass: the input once, [T, C] in E4M3 whatever the number of experts a token, and gate and up
    [R, 2I] in E4M3.
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

    def products(self, x_TC: Tensor, order_R: Tensor, count_E: Tensor, k: int) -> Tensor:
        y: Tensor = _Experts.apply(x_TC, self.gate_up_proj, self.down_proj, order_R, count_E, k, self)
        return y


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        order_R: Tensor,
        count_E: Tensor,
        k: int,
        module: Fp8Experts,
    ) -> Tensor:
        ops = module.context.operators(x_TC.device)
        ends_E = count_E.cumsum(0).to(torch.int32)
        sent = ops.quantize_activation(x_TC, power_of_two=True)
        gate_up_RI = ops.grouped_gemm(
            _rows(sent, order_R // k), module.gate_up_quantized.get(gate_up_proj, ops), ends_E, out_dtype=x_TC.dtype
        )
        inner, kept = ops.swiglu_quantize(gate_up_RI)
        ctx.save_for_backward(
            gate_up_proj, down_proj, order_R, ends_E, sent.values, sent.scales, kept.values, kept.scales
        )
        ctx.module, ctx.k = module, k
        return ops.grouped_gemm(inner, module.down_quantized.get(down_proj, ops), ends_E, out_dtype=x_TC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor | None, ...]:
        _, _, order_R, ends_E, *kept = ctx.saved_tensors  # see linear.py for the weights
        sent, gate_up = Quantized(kept[0], kept[1], ROW), Quantized(kept[2], kept[3], ROW)
        module: Fp8Experts = ctx.module
        gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
        ops = module.context.operators(grad_RC.device)
        dy, dy_t = ops.quantize_both(grad_RC, floor=None, power_of_two=True, offsets=ends_E)
        d_inner = ops.grouped_gemm(
            dy, module.down_quantized.transposed(down_proj, ops), ends_E, out_dtype=grad_RC.dtype
        )
        inner = ops.swiglu_quantize_backward(d_inner, gate_up, offsets=ends_E)
        d_x = d_gate_up = d_down = None
        if ctx.needs_input_grad[0]:
            transposed = module.gate_up_quantized.transposed(gate_up_proj, ops)
            d_x_RC = ops.grouped_gemm(inner.gate_up, transposed, ends_E, out_dtype=grad_RC.dtype)
            d_x = d_x_RC[places(order_R)].unflatten(0, (-1, ctx.k)).sum(1)
        if ctx.needs_input_grad[1]:
            x_t = ops.quantize_activation(
                _rows(sent, order_R // ctx.k), power_of_two=True, transposed=True, offsets=ends_E
            )
            d_gate_up = add_gradient(gate_up_proj, partial(ops.grouped_wgrad, inner.gate_up_t, x_t, ends_E))
        if ctx.needs_input_grad[2]:
            d_down = add_gradient(down_proj, partial(ops.grouped_wgrad, dy_t, inner.out_t, ends_E))
        return d_x, d_gate_up, d_down, None, None, None, None


def _rows(x: Quantized, index_R: Tensor) -> Quantized:
    """The rows of x that are named. As bytes: not every device gathers float8."""
    return Quantized(x.values.view(torch.uint8)[index_R].view(x.values.dtype), x.scales[index_R], x.tile)
