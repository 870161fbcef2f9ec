"""Dense products by DeepGEMM, beside the Triton kernels, for the shapes that it takes. Its grouped products want groups
in whole blocks or their sizes on the host; the kernels want neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8.blocks import BLOCK
from model.fp8.quantized import TILE, Quantized, check_product
from model.fp8.vendor import aligned, leave_to_triton


def fp8_gemm(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    check_product(a, b, accumulate, (a.shape[0], b.shape[0]))
    if (reason := declines(a, b, out_dtype, accumulate)) is not None:
        return leave_to_triton("deep_gemm", reason, a, b, out_dtype, accumulate)
    import deep_gemm

    shape, device = (a.shape[0], b.shape[0]), a.values.device
    left = (aligned(a.values), a.scales)
    if b.tile == BLOCK:
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        deep_gemm.fp8_gemm_nt(left, (aligned(b.values), packed(b.scales)), out)
        return out
    # Tiles on both sides are only ever added to something: for the first micro-batch, to zeros.
    total = torch.zeros(shape, device=device) if accumulate is None else accumulate
    # It compiles one kernel for each value of the dimensions named here. Tokens, the third, are other ones every time.
    deep_gemm.fp8_gemm_nt(left, (aligned(b.values), b.scales), total, c=total, recipe=(1, 1, TILE), compiled_dims="mn")
    return total


def declines(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: Tensor | None) -> str | None:
    """Which kind of products, this one being of it, is left to the kernels; None if it is not.

    On Hopper it forms bfloat16 with blocks of weights and adds to float32 with tiles on both sides. With weights the
    last tile and block may be parts of one: it wants ⌈N/128⌉ and ⌈K/128⌉ scales, and its own tests have such shapes.
    Its kernel stops unless N % 8 = 0, and what the copy engine reads and writes must have rows that lie 16 bytes or a
    multiple apart.
    """
    (m, k), n = a.shape, b.shape[0]
    if not (m and n and k):
        return "products of nothing"
    if b.tile == BLOCK:
        if accumulate is not None or out_dtype != torch.bfloat16:
            return "products with weights whose result is not bfloat16"
        return "weights whose sides are no multiples of 16 (summed) and 8 (the other)" if k % 16 or n % 8 else None
    if accumulate is None and out_dtype != torch.float32:
        return "weight gradients that are not float32"
    if accumulate is not None and (not accumulate.is_contiguous() or accumulate.data_ptr() % 16):
        return "gradients that are not contiguous from a multiple of 16 bytes on"
    if k % TILE:
        return f"weight gradients from tokens whose number is no multiple of {TILE}"
    return "gradients of weights whose inputs are no multiple of 4" if n % 4 else None


def packed(scales: Tensor) -> Tensor:
    """scales contiguous, with the strides of that even where one dimension is 1: they are compared one by one."""
    return scales.flatten().view(scales.shape)
