"""Dense products by cuBLAS (through torch), beside the Triton kernels, for the shapes that it takes: forward and input
gradient, bfloat16, whole tiles. Weight gradients are added to float32 in place, which scaled_mm cannot do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import kernels
from model.fp8.blocks import BLOCK
from model.fp8.quantized import TILE, Quantized, check_product


def fp8_gemm(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    check_product(a, b, accumulate, (a.shape[0], b.shape[0]))
    if accumulate is not None or out_dtype != torch.bfloat16 or not suits(a, b):
        return kernels.fp8_gemm(a, b, out_dtype=out_dtype, accumulate=accumulate)
    x, w, scale_x, scale_w = operands(a, b)
    kinds = F.ScalingType
    return F.scaled_mm(x, w, scale_x, kinds.BlockWise1x128, scale_w, kinds.BlockWise128x128, output_dtype=out_dtype)


def suits(a: Quantized, b: Quantized) -> bool:
    """Whole tiles, and rows in fours: cuBLAS reads scales 16 bytes at a time."""
    (m, k), n = a.shape, b.shape[0]
    return b.tile == BLOCK and m > 0 and m % 4 == 0 and k > 0 and k % TILE == 0 and n > 0 and n % TILE == 0


def operands(a: Quantized, b: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a [M, K], b^T [K, N], scales of a [M, K/128], of b [4 ⌈K/512⌉, N/128]), where in a's scales the rows and in b's
    the tiles of K lie side by side in memory."""
    scale_b = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).contiguous()
    return a.values.contiguous(), b.values.contiguous().mT, a.scales.mT.contiguous().mT, scale_b.mT
