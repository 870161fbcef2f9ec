"""Weights in E4M3 with one scale per block, as released checkpoints store them (V3 report, section 3.3).

N rows, K columns, blocks of n × k of them (128 × 128); those at the lower and right edge may be smaller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0  # the largest finite number: 1.75 · 2^8
AMAX_FLOOR = 1e-4  # of a block: zeros get a finite scale
BLOCK = (128, 128)


def scale_shape(shape: tuple[int, ...] | torch.Size, block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """(⌈N/n⌉, ⌈K/k⌉) for a weight of (N, K)."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def quantize_blocks(weight_NK: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """(q [N, K] float8_e4m3fn, scale [⌈N/n⌉, ⌈K/k⌉] float32) with weight ≈ q · its block's scale.

    scale = max(amax, 1e-4) / 448; q = weight / scale, rounded to the nearest, ties to even. E4M3 has 3 bits after the
    leading one and its subnormals are 2^-9 apart, so an element x is off by at most max(2^-4 |x|, 2^-10 scale), besides
    rounding in float32. A block with a NaN or an infinity becomes NaN as a whole: its scale is not finite.
    """
    blocks = _blocks(weight_NK.float(), block)
    amax = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))
    scale = amax.clamp(min=AMAX_FLOOR) / E4M3_MAX
    q = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _joined(q, weight_NK.shape), scale


def dequantize_blocks(
    q_NK: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """q · its block's scale, multiplied in float32, as `dtype` [N, K]. `scale` is what files call weight_scale_inv."""
    wanted = scale_shape(q_NK.shape, block)
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"a weight of {tuple(q_NK.shape)} in blocks of {block[0]} x {block[1]} needs scales of {wanted}, "
            f"not {tuple(scale.shape)}"
        )
    blocks = _blocks(q_NK.float(), block) * scale.float()[:, None, :, None]
    return _joined(blocks, q_NK.shape).to(dtype)


def _blocks(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """[⌈N/n⌉, n, ⌈K/k⌉, k], filled up with zeros."""
    (rows, columns), (n, k) = x_NK.shape, block
    if rows % n or columns % k:
        x_NK = F.pad(x_NK, (0, -columns % k, 0, -rows % n))
    return x_NK.unflatten(1, (-1, k)).unflatten(0, (-1, n))


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Back to [N, K]."""
    return blocks.flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()
