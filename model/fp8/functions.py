"""The public functions: the operators of the backend that fits the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8.backends import choose
from model.fp8.blocks import AMAX_FLOOR
from model.fp8.quantized import Quantized


def quantize_activation(
    x: Tensor | Quantized,
    *,
    floor: float | None = AMAX_FLOOR,
    power_of_two: bool = False,
    transposed: bool = False,
    backend: str = "auto",
) -> Quantized:
    """x [M, K] in E4M3, one float32 scale for each 1 × 128 tile: values [M, K], scales [M, ⌈K/128⌉].

    A scale is the multiplier that dequantises: max(amax, floor) / 448, rounded up to a power of two if asked. Give
    gradients floor=None: a tile of zeros has scale 1 then. A tile with a NaN or an infinity becomes NaN as a whole.
    transposed: x^T in tiles along the tokens, as weight gradients need it: values [K, M], scales [K, ⌈M/128⌉].
        x may be quantised along its channels already, as the forward pass kept it.
    """
    operators = choose(backend, x.device).operators
    return operators.quantize_activation(x, floor=floor, power_of_two=power_of_two, transposed=transposed)


def quantize_weight(weight: Tensor, *, power_of_two: bool = False, backend: str = "auto") -> Quantized:
    """weight [..., N, K] in E4M3, one scale for each block of 128 × 128: scales [..., ⌈N/128⌉, ⌈K/128⌉]."""
    return choose(backend, weight.device).operators.quantize_weight(weight, power_of_two=power_of_two)


def fp8_gemm(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """a b^T [M, N] of a [M, K] in 1 × 128 and b [N, K] in 128 × 128 or 1 × 128, summed in float32 every 128 of K.

    accumulate: a float32 [M, N] (a weight's gradient) that the product is added to in place and that is returned.
    """
    operators = choose(backend, a.values.device).operators
    return operators.fp8_gemm(a, b, out_dtype=out_dtype, accumulate=accumulate)
