"""Products: dense, grouped along the rows, grouped along the tokens that are summed.

Both operands are copied by Hopper's copy engine (tensor descriptors), which reads zeros beyond the edges: no masks in
the inner loop. A tile of 128 of K is one product from zero on the tensor cores; scaling it and adding it to the float32
sum on the ordinary ones is the promotion.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.fp8.blocks import BLOCK
from model.fp8.kernels.common import WIDTH, experts_above, group_of
from model.fp8.quantized import TILE, Quantized, check_product

BLOCK_N = 128
HOPPER_SHARED = 232448  # bytes of shared memory that a block may have on compute capability 9.0
BESIDE_STAGES = 1024  # of them, for what are not copied operands
SWIZZLE = 8  # row blocks whose products with one column block follow each other: they find it in the cache


@triton.jit
def swizzled(program, blocks_m, blocks_n, SWIZZLE: tl.constexpr):
    """(m, n): strips of SWIZZLE row blocks, in each column by column."""
    strip = program // (SWIZZLE * blocks_n)
    first = strip * SWIZZLE
    height = tl.minimum(blocks_m - first, SWIZZLE)
    inside = program % (SWIZZLE * blocks_n)
    return first + inside % height, inside // height


@triton.jit
def tile_sum(
    a, b, a_scales, b_scales, row_a, row_b, first, tiles,
    live_a, live_b, a_scale_row, a_scale_tile, b_scale_row, b_scale_tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, B_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Σ over tiles of (a b^T of the tile) · its scales, [BLOCK_M, BLOCK_N] float32.

    a_scales points at the scales of the first row of a, b_scales at those of b: of its block, or of its first row.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows_a, rows_b = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for tile in range(first, first + tiles):
        x = a.load([row_a, tile * WIDTH])
        y = b.load([row_b, tile * WIDTH])
        scale_a = tl.load(a_scales + rows_a * a_scale_row + tile * a_scale_tile, rows_a < live_a, 0.0)
        product = tl.dot(x, y.T)
        if B_BLOCKS:
            total += product * (scale_a * tl.load(b_scales + tile * b_scale_tile))[:, None]
        else:
            scale_b = tl.load(b_scales + rows_b * b_scale_row + tile * b_scale_tile, rows_b < live_b, 0.0)
            total += product * (scale_a[:, None] * scale_b[None, :])
    return total


@triton.jit
def write(out, total, live_m, live_n, pitch, ACCUMULATE: tl.constexpr):
    """total into out, or onto it."""
    m, n = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1])
    place = out + m.to(tl.int64)[:, None] * pitch + n[None, :]
    there = (m < live_m)[:, None] & (n < live_n)[None, :]
    if ACCUMULATE:
        total += tl.load(place, there, 0.0)
    tl.store(place, total.to(out.dtype.element_ty), there)


@triton.jit
def rows_kernel(
    a, b, a_scales, b_scales, out, ends, M, N, E, tiles, blocks_m,
    a_scale_row, a_scale_tile, b_scale_expert, b_scale_row, b_scale_tile, pitch,
    GROUPED: tl.constexpr, EXPERTS: tl.constexpr, B_BLOCKS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """One block of a b^T: BLOCK_M rows (of one group) by BLOCK_N columns. `tiles` of K."""
    block_m, block_n = swizzled(tl.program_id(0), blocks_m, tl.cdiv(N, BLOCK_N), SWIZZLE)
    row, end, column = block_m * BLOCK_M, M, block_n * BLOCK_N
    row_b = column
    if GROUPED:
        expert, start, end, first = group_of(ends, M, E, block_m, BLOCK_M, EXPERTS)
        row = start + (block_m - first) * BLOCK_M
        tiles = tl.where(expert < E, tiles, 0)  # rows of no group are zero
        expert = tl.minimum(expert, E - 1)
        row_b += expert * N
        b_scales += expert.to(tl.int64) * b_scale_expert
    if row < end:
        b_scales += (column // WIDTH if B_BLOCKS else column) * b_scale_row
        total = tile_sum(
            a, b, a_scales + row.to(tl.int64) * a_scale_row, b_scales, row, row_b, 0, tiles,
            end - row, N - column, a_scale_row, a_scale_tile, b_scale_row, b_scale_tile, BLOCK_M, BLOCK_N, B_BLOCKS,
        )  # fmt: skip
        write(out + row.to(tl.int64) * pitch + column, total, end - row, N - column, pitch, ACCUMULATE)


@triton.jit
def tokens_kernel(
    dy, x, dy_scales, x_scales, out, ends, N, K, E,
    dy_scale_row, dy_scale_tile, x_scale_row, x_scale_tile, out_expert, pitch,
    EXPERTS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """One block of one expert's weight gradient: BLOCK_M rows of dy^T [N, ...] by BLOCK_N of x^T [K, ...]."""
    block_n, block_k = swizzled(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), SWIZZLE)
    expert = tl.program_id(1)
    index = tl.arange(0, EXPERTS)
    start = tl.load(ends + index - 1, (index > 0) & (index < E), 0)
    tiles_E = tl.where(index < E, tl.cdiv(tl.load(ends + index, index < E, 0) - start, WIDTH), 0)
    first = tl.sum(tl.where(index < expert, tiles_E, 0), 0)
    tiles = tl.sum(tl.where(index == expert, tiles_E, 0), 0)
    if tiles > 0 or not ACCUMULATE:
        row_n, row_k = block_n * BLOCK_M, block_k * BLOCK_N
        total = tile_sum(
            dy, x, dy_scales + row_n * dy_scale_row, x_scales + row_k * x_scale_row, row_n, row_k, first, tiles,
            N - row_n, K - row_k, dy_scale_row, dy_scale_tile, x_scale_row, x_scale_tile, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        out += expert.to(tl.int64) * out_expert + row_n.to(tl.int64) * pitch + row_k
        write(out, total, N - row_n, K - row_k, pitch, ACCUMULATE)


def fp8_gemm(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    out = _out(a, b, accumulate, (a.shape[0], b.shape[0]), out_dtype)
    return _rows(a, b, None, out, accumulate is not None)


def grouped_gemm(a: Quantized, b: Quantized, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return _rows(a, b, offsets, _out(a, b, None, (a.shape[0], b.shape[1]), out_dtype), False)


def grouped_wgrad(
    dy_t: Quantized,
    x_t: Quantized,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    accumulate: Tensor | None = None,
) -> Tensor:
    experts, n, k = shape = (len(offsets), dy_t.shape[0], x_t.shape[0])
    out = _out(dy_t, x_t, accumulate, shape, out_dtype)
    if not out.numel() or not dy_t.shape[1]:
        return out if accumulate is not None else out.zero_()
    block, warps, stages = launch_shape(n, out.device)
    grid = (triton.cdiv(n, block) * triton.cdiv(k, BLOCK_N), experts)
    tokens_kernel[grid](
        descriptor(dy_t.values, block), descriptor(x_t.values, BLOCK_N), dy_t.scales, x_t.scales, out, offsets,
        n, k, experts, *dy_t.scales.stride(), *x_t.scales.stride(), *out.stride()[:2],
        experts_above(experts), accumulate is not None, block, BLOCK_N, SWIZZLE,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def launch_shape(rows: int, device: torch.device) -> tuple[int, int, int]:
    """(rows of a block, warps, stages of copies in flight): two warp groups of 64 rows each, one for a few rows.

    As many stages as Hopper makes use of, or as the device's shared memory holds.
    """
    block, warps, stages = (128, 8, 4) if rows > 64 else (64, 4, 5)
    return block, warps, min(stages, (shared_memory(device) - BESIDE_STAGES) // ((block + BLOCK_N) * TILE))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return HOPPER_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def descriptor(values: Tensor, rows: int) -> TensorDescriptor:
    """For blocks of [rows, 128] of values [..., R, K], as one matrix of all their rows. Copies what is not aligned."""
    k = values.shape[-1]
    flat = values.dim() == 2 or values.stride(0) == values.shape[1] * values.stride(1)
    if values.stride(-1) != 1 or values.stride(-2) % 16 or values.data_ptr() % 16 or not flat:
        # Padded as bytes: not everything is written for float8.
        values = F.pad(values.view(torch.uint8).contiguous(), (0, -k % 16)).view(torch.float8_e4m3fn)
    return TensorDescriptor(values, [values.shape[:-1].numel(), k], [values.stride(-2), 1], [rows, 128])


def _rows(a: Quantized, b: Quantized, offsets: Tensor | None, out: Tensor, accumulate: bool) -> Tensor:
    m, n, experts = a.shape[0], b.shape[-2], 1 if offsets is None else len(offsets)
    if not out.numel() or not b.values.numel():
        return out if accumulate else out.zero_()
    block, warps, stages = launch_shape(m // experts, out.device)
    blocks_m = (m + (block - 1) * (experts + (offsets is not None))) // block
    rows_kernel[(blocks_m * triton.cdiv(n, BLOCK_N),)](
        descriptor(a.values, block), descriptor(b.values, BLOCK_N), a.scales, b.scales, out, offsets,
        m, n, experts, a.scales.shape[1], blocks_m, *a.scales.stride(),
        0 if offsets is None else b.scales.stride(0), *b.scales.stride()[-2:], out.stride(0),
        offsets is not None, experts_above(experts), b.tile == BLOCK, accumulate, block, BLOCK_N, SWIZZLE,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _out(a: Quantized, b: Quantized, accumulate: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    check_product(a, b, accumulate, shape)
    if accumulate is None:
        return torch.empty(shape, dtype=dtype, device=a.values.device)
    if accumulate.stride(-1) != 1:
        raise ValueError("accumulate must have its last dimension's elements next to each other")
    return accumulate
