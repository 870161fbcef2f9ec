"""A tensor in E4M3 with its scales, and how groups of tokens are laid out in tiles.

M tokens of K channels, N output channels, E groups (experts). `offsets` [E] int32 are the groups' ends in M, as
`torch.nn.functional.grouped_mm` takes them: group e is rows offsets[e-1] to offsets[e]. They stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.fp8.blocks import BLOCK, dequantize_blocks, scale_shape

TILE = 128
ROW = (1, TILE)  # a tile of activations or gradients: 128 neighbours of one row


@dataclass(frozen=True)
class Quantized:
    """values [..., R, C] float8_e4m3fn ≈ x / scales, with one float32 scale for each `tile` of (rows, columns)."""

    values: Tensor
    scales: Tensor
    tile: tuple[int, int]

    def __post_init__(self) -> None:
        wanted = scale_shape(self.values.shape, self.tile)
        if self.values.dtype != torch.float8_e4m3fn or self.scales.dtype != torch.float32:
            raise TypeError(
                f"values must be float8_e4m3fn and scales float32, not {self.values.dtype}, {self.scales.dtype}"
            )
        if tuple(self.scales.shape) != wanted:
            raise ValueError(
                f"values of {tuple(self.values.shape)} in tiles of {self.tile} need scales of {wanted}, "
                f"not {tuple(self.scales.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """values · scales, multiplied in float32."""
        return dequantize_blocks(self.values, self.scales, self.tile, dtype)

    def t(self) -> Quantized:
        """The transpose of the last two dimensions. Nothing is rounded again, but the values are copied: Hopper's
        FP8 products read both operands along the dimension that is summed."""
        return Quantized(self.values.mT.contiguous(), self.scales.mT, (self.tile[1], self.tile[0]))


def padded_tiles(tokens: int, groups: int) -> int:
    """The most tiles of 128 that `groups` groups of `tokens` tokens in all can need, if no tile crosses a group."""
    return (tokens + (TILE - 1) * groups) // TILE


def check_activation(x: Tensor | Quantized, transposed: bool, offsets: Tensor | None) -> None:
    """Refuses what cannot be quantised in tiles of 1 × 128 so."""
    if len(x.shape) != 2:
        raise ValueError(f"activations must have two dimensions, tokens and channels, not {tuple(x.shape)}")
    if offsets is not None and not transposed:
        raise ValueError("offsets need transposed=True: tiles along channels never cross groups")
    if isinstance(x, Quantized) and not transposed:
        raise ValueError("x is quantised already; with transposed=True its transpose is quantised")


def check_product(a: Quantized, b: Quantized, accumulate: Tensor | None, out: tuple[int, ...]) -> None:
    """Refuses what a b^T cannot be formed of. `out`: the shape of the result."""
    if a.tile != ROW or b.tile not in (ROW, BLOCK):
        raise ValueError(f"a product needs tiles of 1 x 128, and 128 x 128 or 1 x 128, not {a.tile} and {b.tile}")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must have the same last dimension")
    if accumulate is not None and (accumulate.dtype != torch.float32 or tuple(accumulate.shape) != out):
        raise ValueError(f"accumulate must be float32 of {out}, not {accumulate.dtype} of {tuple(accumulate.shape)}")
