"""E4M3 with one scale per block: the definition of quantisation that everything in `model.fp8` keeps to.

N rows, K columns, blocks of n × k of them; those at the lower and right edge may be smaller. 128 × 128 for weights, as
released checkpoints store them (V3 report, section 3.3), 1 × 128 for activations. Leading dimensions stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0  # the largest finite number: 1.75 · 2^8
AMAX_FLOOR = 1e-4  # of a block: zeros get a finite scale
SMALLEST_SCALE = 2.0**-100  # so that remainders of divisions by it are no subnormals that count
BLOCK = (128, 128)


def scale_shape(shape: tuple[int, ...] | torch.Size, block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """(..., ⌈N/n⌉, ⌈K/k⌉) for a tensor of (..., N, K)."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))


def quantize_blocks(
    x_NK: Tensor,
    block: tuple[int, int] = BLOCK,
    *,
    floor: float | None = AMAX_FLOOR,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """(q [..., N, K] float8_e4m3fn, scale [..., ⌈N/n⌉, ⌈K/k⌉] float32) with x ≈ q · its block's scale.

    The scale is `block_scales`'; q = x / scale, rounded to the nearest, ties to even. E4M3 has 3 bits after the leading
    one and its subnormals are 2^-9 apart, so an element x is off by at most max(2^-4 |x|, 2^-10 scale), besides
    rounding in float32. A block with a NaN or an infinity becomes NaN as a whole.
    """
    blocks = _blocks(x_NK.float(), block)
    amax = torch.maximum(blocks.amax((-3, -1)), -blocks.amin((-3, -1)))
    scale = block_scales(amax, floor, power_of_two)
    q = (blocks / scale[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _joined(q, x_NK.shape), scale


def block_scales(amax: Tensor, floor: float | None, power_of_two: bool) -> Tensor:
    """max(amax, floor) / 448, of the same shape; without a floor, 1 for a block of zeros.

    power_of_two: rounded up to one, so that dividing by it is exact and only E4M3 rounds. Never below 2^-100, which
    an amax of 3.5e-28 reaches: there GPUs could not divide quickly and exactly. NaN if amax is not finite.
    """
    scale = (amax.clamp(min=floor) if floor else amax) / E4M3_MAX
    scale = torch.where(amax.isfinite(), scale.clamp(min=SMALLEST_SCALE), torch.nan)
    if power_of_two:  # a mantissa that is not zero carries into the exponent; log2 could round the wrong way
        bits = scale.view(torch.int32) + 0x007FFFFF & 0x7F800000
        scale = torch.where(amax.isfinite(), bits.view(torch.float32), torch.nan)
    return scale if floor else torch.where(amax == 0, 1.0, scale)


def dequantize_blocks(
    q_NK: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """q · its block's scale, multiplied in float32, as `dtype` [..., N, K]. Files call `scale` weight_scale_inv."""
    wanted = scale_shape(q_NK.shape, block)
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"a weight of {tuple(q_NK.shape)} in blocks of {block[0]} x {block[1]} needs scales of {wanted}, "
            f"not {tuple(scale.shape)}"
        )
    blocks = _blocks(q_NK.float(), block) * scale.float()[..., :, None, :, None]
    return _joined(blocks, q_NK.shape).to(dtype)


def _blocks(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., ⌈N/n⌉, n, ⌈K/k⌉, k], filled up with zeros."""
    (rows, columns), (n, k) = x_NK.shape[-2:], block
    if rows % n or columns % k:
        x_NK = F.pad(x_NK, (0, -columns % k, 0, -rows % n))
    return x_NK.unflatten(-1, (-(-columns // k), k)).unflatten(-3, (-(-rows // n), n))


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Back to [..., N, K]."""
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
