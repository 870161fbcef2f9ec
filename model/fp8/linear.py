"""`Fp8Linear`: a linear layer whose three products are formed in FP8 (V3 report, section 3.3).

M tokens, K inputs, N outputs. Forward y = x W^T; backward dx = dy W, dW = dy^T x.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.fp8.backends import Operators
from model.fp8.context import Fp8Context, Fp8Module, as_rows
from model.fp8.quantized import ROW, Quantized
from model.fp8.weights import QuantizedWeight, add_gradient


class Fp8Linear(nn.Linear, Fp8Module):
    """Parameters, names and results are those of nn.Linear, results up to quantisation.

    Activations are quantised in 1 × 128 tiles, weights in 128 × 128 blocks, gradients in 1 × 128 tiles without a floor.
    For the backward pass it keeps the input in FP8, once: transposed, in tiles along the tokens, as the weight gradient
    reads it. It is quantised for that from the input itself, so nothing is rounded twice.

    power_of_two: the input's scales are rounded up to powers of two (the linear after attention; the report keeps that
        input in a 12-bit format of its own, this one keeps it in E4M3).
    The weight may change in place between forward passes; see `weights_changed` for ways that are not noticed.
    """

    in_fp8 = ("weight",)
    quantized: QuantizedWeight
    power_of_two: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        context: Fp8Context | None = None,
        power_of_two: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._prepare(context or Fp8Context(), power_of_two)

    @classmethod
    def convert(cls, linear: nn.Linear, context: Fp8Context, *, power_of_two: bool = False) -> Fp8Linear:
        """`linear` itself, from now on of this class: its parameters, hooks and place in the model stay."""
        linear.__class__ = cls
        assert isinstance(linear, Fp8Linear)
        linear._prepare(context, power_of_two)
        return linear

    def _prepare(self, context: Fp8Context, power_of_two: bool) -> None:
        self.context, self.power_of_two = context, power_of_two
        self.quantized = context.weight()

    def quantize_weights(self) -> None:
        self.quantized.get(self.weight, self.context.operators(self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8"


def linear(x: Tensor, module: Fp8Linear) -> Tensor:
    """x W^T + b, [..., K] -> [..., N]."""
    if torch.is_grad_enabled():
        y: Tensor = _Linear.apply(x, module.weight, module.bias, module)
        return y
    return _forward(x, module, module.weight, module.bias, columns=False)[0]


def _forward(
    x: Tensor, module: Fp8Linear, weight: Tensor, bias: Tensor | None, *, columns: bool
) -> tuple[Tensor, Quantized | None]:
    ops = module.context.operators(x.device)
    given = module.context.input(x, power_of_two=module.power_of_two, columns=columns)
    y = ops.fp8_gemm(given.rows, module.quantized.get(weight, ops), out_dtype=x.dtype)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight)), given.columns


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: Fp8Linear) -> Tensor:
        y, columns = _forward(x, module, weight, bias, columns=ctx.needs_input_grad[1])
        # The weight is kept only so that autograd refuses if it has changed before the backward pass, as it does for
        # nn.Linear. What is read there is the module's: where activations are recomputed, this one is an alias.
        ctx.save_for_backward(weight, *([] if columns is None else [columns.values, columns.scales]))
        ctx.module, ctx.bias_dtype = module, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        _, *columns = ctx.saved_tensors
        module: Fp8Linear = ctx.module
        weight = module.weight
        ops = module.context.operators(grad.device)
        dy = as_rows(grad)
        dx = dw = db = None
        rows, dy_t = quantize_gradient(ops, dy, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        if rows is not None:
            dx_MK = ops.fp8_gemm(rows, module.quantized.transposed(weight, ops), out_dtype=grad.dtype)
            dx = dx_MK.view(*grad.shape[:-1], dx_MK.shape[-1])
        if dy_t is not None:
            dw = add_gradient(weight, partial(ops.fp8_gemm, dy_t, Quantized(columns[0], columns[1], ROW)))
        if ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None


def quantize_gradient(
    ops: Operators, dy: Tensor, rows: bool, columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    """(along channels for the input's gradient, along tokens for the weight's), as far as wanted; without a floor."""
    if rows and columns:
        return ops.quantize_both(dy, floor=None)
    return (
        ops.quantize_activation(dy, floor=None) if rows else None,
        ops.quantize_activation(dy, floor=None, transposed=True) if columns else None,
    )


def multiplied_weight(linear: nn.Linear) -> Tensor:
    """The weight as the layer's product sees it: of an Fp8Linear the quantised one, in the weight's type.

    For code that multiplies by parts of a weight itself, in another order.
    """
    if not isinstance(linear, Fp8Linear):
        return linear.weight
    ops = linear.context.operators(linear.weight.device)
    return linear.quantized.get(linear.weight, ops).dequantize(linear.weight.dtype)


def multiplied_input(linear: nn.Linear, x: Tensor) -> Tensor:
    """The input as the layer's product sees it."""
    if not isinstance(linear, Fp8Linear):
        return x
    given = linear.context.input(x, power_of_two=linear.power_of_two, columns=False)
    return given.rows.dequantize(x.dtype).view_as(x)
