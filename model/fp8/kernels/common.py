"""What the kernels share: scales, quotients, where groups of tokens lie, how results are allocated.

Blocks in kernels are [tokens M, channels K] of 128 × 128. Groups as in `quantized.py`; `EXPERTS` is a power of two
above their number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import blocks
from model.fp8.quantized import TILE

WIDTH = tl.constexpr(TILE)
E4M3_MAX = tl.constexpr(blocks.E4M3_MAX)
SMALLEST_SCALE = tl.constexpr(blocks.SMALLEST_SCALE)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """max |x|, on the bits: as integers, NaN is above infinity is above all finite numbers. (tl.max loses NaN.)"""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`blocks.block_scales`, to the bit: division is rounded to the nearest (`/` would be approximate)."""
    finite = amax < float("inf")
    scale = tl.maximum(tl.div_rn(tl.maximum(amax, FLOOR), E4M3_MAX), SMALLEST_SCALE)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    if FLOOR == 0.0:
        scale = tl.where(amax == 0.0, 1.0, scale)
    return tl.where(finite, scale, float("nan"))


@triton.jit
def divided(x, scale):
    """x / scale as E4M3, for a scale of the same number of dimensions.

    The quotient is corrected once by its remainder, with the scale's rounded reciprocal: it is within 2^-40 of the
    exact one before it is rounded to float32. Three instructions an element where IEEE division takes about ten, and
    these kernels should wait for memory only. Scales are large enough for the remainder not to be lost.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    quotient = tl.clamp(quotient, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return quotient.to(tl.float8e4nv)


@triton.jit
def group_of(ends, M, E, tile, SIZE: tl.constexpr, EXPERTS: tl.constexpr):
    """(group, its first row, its end, its first tile) of tile `tile`, if groups are cut into tiles of SIZE rows.

    The rows after the last group are group E. Tiles that nobody needs belong to a group > E without rows.
    """
    index = tl.arange(0, EXPERTS)
    end = tl.load(ends + index, index < E, M)
    start = tl.where(index == 0, 0, tl.load(ends + index - 1, (index > 0) & (index <= E), M))
    tiles = tl.cdiv(end - start, SIZE)
    after = tl.cumsum(tiles, 0)
    group = tl.sum((after <= tile).to(tl.int32), 0)
    mine = index == group
    return (
        group,
        tl.sum(tl.where(mine, start, 0), 0),
        tl.sum(tl.where(mine, end, 0), 0),
        tl.sum(tl.where(mine, after - tiles, 0), 0),
    )


def experts_above(groups: int) -> int:
    """EXPERTS: the groups, and the rows after them."""
    return triton.next_power_of_2(groups + 1)


def empty_values(*shape: int, device: torch.device) -> Tensor:
    """[..., C] float8_e4m3fn whose rows start 16 bytes apart or a multiple, as the copy engine needs them."""
    *rows, columns = shape
    pitch = -(-columns // 16) * 16
    return torch.empty(*rows, pitch, dtype=torch.float8_e4m3fn, device=device)[..., :columns]


def empty_scales(rows: int, tiles: int, device: torch.device) -> Tensor:
    """[R, T] float32, rows next to each other in memory: a product reads one tile's scales of many rows at once."""
    return torch.empty(tiles, rows, device=device).mT
