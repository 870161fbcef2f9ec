"""Dense products by DeepGEMM, beside the Triton kernels, for the shapes that it takes. Its grouped products want groups
in whole blocks or their sizes on the host; the kernels want neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8 import kernels
from model.fp8.blocks import BLOCK
from model.fp8.quantized import ROW, TILE, Quantized, check_product


def fp8_gemm(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    check_product(a, b, accumulate, (a.shape[0], b.shape[0]))
    if not suits(a, b, out_dtype, accumulate):
        return kernels.fp8_gemm(a, b, out_dtype=out_dtype, accumulate=accumulate)
    import deep_gemm

    left = (a.values.contiguous(), a.scales)
    if accumulate is None:
        out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.values.device)
        deep_gemm.fp8_gemm_nt(left, (b.values.contiguous(), b.scales.contiguous()), out)
        return out
    deep_gemm.fp8_gemm_nt(left, (b.values.contiguous(), b.scales), accumulate, c=accumulate, recipe=(1, 1, TILE))
    return accumulate


def suits(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: Tensor | None) -> bool:
    """Whole tiles; bfloat16 results of weight blocks, or float32 gradients of tiles on both sides, added in place."""
    (m, k), n = a.shape, b.shape[0]
    if not (m and n and k) or k % TILE or n % TILE:
        return False
    if accumulate is None:
        return b.tile == BLOCK and out_dtype == torch.bfloat16
    return b.tile == ROW and accumulate.is_contiguous()
