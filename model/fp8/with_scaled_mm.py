"""Dense products by cuBLAS (through torch), beside the Triton kernels, for the shapes that it takes: forward and input
gradient, bfloat16. Weight gradients are added to float32 in place, which scaled_mm cannot do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.blocks import BLOCK
from model.fp8.quantized import TILE, Quantized, check_product
from model.fp8.vendor import aligned, leave_to_triton


def fp8_gemm(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    check_product(a, b, accumulate, (a.shape[0], b.shape[0]))
    if (reason := declines(a, b, out_dtype, accumulate)) is not None:
        return leave_to_triton("scaled_mm", reason, a, b, out_dtype, accumulate)
    x, w, scale_x, scale_w = operands(a, b)
    kinds = F.ScalingType
    return F.scaled_mm(x, w, scale_x, kinds.BlockWise1x128, scale_w, kinds.BlockWise128x128, output_dtype=out_dtype)


def declines(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: Tensor | None) -> str | None:
    """Which kind of products, this one being of it, is left to the kernels; None if it is not.

    torch wants N and K in sixteens, and ⌈N/128⌉ scales of the weight: its last block may be a part of one. Sums over
    parts of a tile are not tried.
    """
    (m, k), n = a.shape, b.shape[0]
    if b.tile != BLOCK:
        return "weight gradients"
    if accumulate is not None or out_dtype != torch.bfloat16:
        return "products with weights whose result is not bfloat16"
    if not (m and n and k):
        return "products of nothing"
    if k % TILE:
        return f"sums over a length that is no multiple of {TILE}"
    if n % 16:
        return "weights whose outputs (in input gradients, inputs) are no multiple of 16"
    if m % 4:  # cuBLAS reads scales 16 bytes at a time
        return "products of tokens whose number is no multiple of 4"
    return None


def operands(a: Quantized, b: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a [M, K], b^T [K, N], scales of a [M, K/128], of b [4 ⌈K/512⌉, ⌈N/128⌉]), where in a's scales the rows and in
    b's the tiles of K lie side by side in memory."""
    scale_b = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).contiguous()
    return aligned(a.values), aligned(b.values).mT, a.scales.mT.contiguous().mT, scale_b.mT
