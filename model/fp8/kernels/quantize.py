"""Quantisation: one kernel for tiles of activations along rows, along columns or both, one for blocks of weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.blocks import AMAX_FLOOR, BLOCK, scale_shape
from model.fp8.kernels.common import (
    WIDTH,
    divided,
    empty_scales,
    empty_values,
    experts_above,
    group_of,
    largest,
    scale_of,
)
from model.fp8.quantized import ROW, TILE, Quantized, check_activation, padded_tiles

WARPS = 16  # 128 x 128 float32 numbers in the registers of eight would leave none


@triton.jit
def store_rows(x, values, scales, row, end, column, K, M, pitch, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """x [tokens, 128 channels] in 1 × 128 tiles: rows of values [M, K], scales [M, T] kept by columns."""
    scale = scale_of(largest(x, 1), FLOOR, POWER_OF_TWO)
    rows, columns = row + tl.arange(0, x.shape[0]), column + tl.arange(0, WIDTH)
    there = (rows < end)[:, None] & (columns < K)[None, :]
    place = rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(values + place, divided(x, scale[:, None]), there)
    tl.store(scales + (column // WIDTH).to(tl.int64) * M + rows, scale, rows < end)


@triton.jit
def store_columns(
    x, values, scales, tile, row, end, limit, column, K, pitch, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr
):  # fmt: skip
    """x, the tokens from `row` on, in 128 × 1 tiles: tile `tile` of the transpose, values [K, limit] and scales [K, S]
    kept by columns. Tokens from `end` on are zero; a tile without tokens has scale 1."""
    if tile * WIDTH < limit:
        scale = tl.where(row < end, scale_of(largest(x, 0), FLOOR, POWER_OF_TWO), 1.0)
        live = row + tl.arange(0, WIDTH) < end  # of a tile of NaN, what is beyond stays zero
        q = tl.where(live[:, None], divided(x, scale[None, :]).to(tl.int8, bitcast=True), 0)
        tokens, channels = tile * WIDTH + tl.arange(0, WIDTH), column + tl.arange(0, WIDTH)
        place = channels.to(tl.int64)[:, None] * pitch + tokens[None, :]
        there = (channels < K)[:, None] & (tokens < limit)[None, :]
        tl.store(values + place, tl.trans(q).to(tl.float8e4nv, bitcast=True), there)
        tl.store(scales + tile.to(tl.int64) * K + channels, scale, channels < K)


@triton.jit
def tiles_kernel(
    x, x_scales, ends, row_values, row_scales, column_values, column_scales,
    M, K, E, x_pitch, row_pitch, column_pitch, x_scale_m, x_scale_k, limit,
    FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of TOKENS tokens (of one group; 128 if COLUMNS) by 128 channels. SCALED: x is E4M3 with scales.
    limit: columns of the transpose."""
    tile, column = tl.program_id(1), tl.program_id(0) * WIDTH
    row, end = tile * TOKENS, M
    owned_end = end
    if GROUPED:
        group, start, end, first = group_of(ends, M, E, tile, TOKENS, EXPERTS)
        row = start + (tile - first) * TOKENS
        owned_end = tl.where(group < E, end, row)  # rows of no group are in no transpose
    rows, columns = row + tl.arange(0, TOKENS), column + tl.arange(0, WIDTH)
    there = (rows < end)[:, None] & (columns < K)[None, :]
    block = tl.load(x + rows.to(tl.int64)[:, None] * x_pitch + columns[None, :], there, 0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(x_scales + rows.to(tl.int64) * x_scale_m + column // WIDTH * x_scale_k, rows < end, 0.0)
        block = block * scale[:, None]
    if ROWS:
        store_rows(block, row_values, row_scales, row, end, column, K, M, row_pitch, FLOOR, POWER_OF_TWO)
    if COLUMNS:
        store_columns(
            block, column_values, column_scales, tile, row, owned_end, limit, column, K, column_pitch,
            FLOOR, POWER_OF_TWO,
        )  # fmt: skip


@triton.jit
def blocks_kernel(x, values, scales, N, K, x_e, x_n, pitch, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """One block of 128 × 128 of the weights x [E, N, K]."""
    expert = tl.program_id(2).to(tl.int64)
    block_n, block_k = tl.program_id(1), tl.program_id(0)
    rows, columns = block_n * WIDTH + tl.arange(0, WIDTH), block_k * WIDTH + tl.arange(0, WIDTH)
    there = (rows < N)[:, None] & (columns < K)[None, :]
    rows = rows.to(tl.int64)[:, None]
    block = tl.load(x + expert * x_e + rows * x_n + columns[None, :], there, 0.0).to(tl.float32)
    scale = scale_of(largest(largest(block, 1), 0), FLOOR, POWER_OF_TWO)
    tl.store(values + (expert * N + rows) * pitch + columns[None, :], divided(block, scale), there)
    tl.store(scales + (expert * tl.num_programs(1) + block_n) * tl.num_programs(0) + block_k, scale)


def quantize_activation(
    x: Tensor | Quantized,
    *,
    floor: float | None = AMAX_FLOOR,
    power_of_two: bool = False,
    transposed: bool = False,
    offsets: Tensor | None = None,
) -> Quantized:
    check_activation(x, transposed, offsets)
    rows, columns = _tiles(x, floor, power_of_two, offsets, rows=not transposed, columns=transposed)
    found = columns if transposed else rows
    assert found is not None
    return found


def quantize_both(
    x: Tensor, *, floor: float | None = AMAX_FLOOR, power_of_two: bool = False, offsets: Tensor | None = None
) -> tuple[Quantized, Quantized]:
    rows, columns = _tiles(x, floor, power_of_two, offsets, rows=True, columns=True)
    assert rows is not None and columns is not None
    return rows, columns


def quantize_weight(weight: Tensor, *, power_of_two: bool = False) -> Quantized:
    n, k = weight.shape[-2:]
    x = weight.reshape(weight.shape[:-2].numel(), n, k)
    x = x if x.stride(2) == 1 else x.contiguous()
    values = empty_values(*weight.shape, device=weight.device)
    scales = torch.empty(scale_shape(weight.shape), device=weight.device)
    grid = (*reversed(scale_shape((n, k))), len(x))
    if weight.numel():
        blocks_kernel[grid](
            x,
            values,
            scales,
            n,
            k,
            x.stride(0),
            x.stride(1),
            values.stride(-2),
            AMAX_FLOOR,
            power_of_two,
            num_warps=WARPS,
        )
    return Quantized(values, scales, BLOCK)


def columns_for(tokens: int, channels: int, offsets: Tensor | None, device: torch.device) -> Quantized:
    """An unwritten transpose in tiles along the tokens, for `offsets`' groups."""
    tiles = padded_tiles(tokens, 1 if offsets is None else len(offsets))
    width = tokens if offsets is None else tiles * TILE
    return Quantized(empty_values(channels, width, device=device), empty_scales(channels, tiles, device), ROW)


def rows_for(tokens: int, channels: int, device: torch.device) -> Quantized:
    """An unwritten tensor in tiles along the channels."""
    tiles = -(-channels // TILE)
    return Quantized(empty_values(tokens, channels, device=device), empty_scales(tokens, tiles, device), ROW)


def token_tiles(tokens: int, offsets: Tensor | None) -> int:
    """The most programs along the tokens that are needed: those after the last group are a group more."""
    return padded_tiles(tokens, 1 if offsets is None else len(offsets) + 1)


def _tiles(
    x: Tensor | Quantized, floor: float | None, power_of_two: bool, offsets: Tensor | None, *, rows: bool, columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    values, scales = (x.values, x.scales) if isinstance(x, Quantized) else (x, None)
    values = values if values.stride(-1) == 1 else values.contiguous()
    (m, k), device = values.shape, values.device
    by_row = rows_for(m, k, device) if rows else None
    by_column = columns_for(m, k, offsets, device) if columns else None
    if values.numel() or (by_column is not None and by_column.values.numel()):
        r, c = by_row or by_column, by_column or by_row
        assert r is not None and c is not None  # what is not asked for is not written
        tokens, warps = (TILE, WARPS) if columns else (32, 4)
        along_tokens = token_tiles(m, offsets) if columns else triton.cdiv(m, tokens)
        tiles_kernel[(triton.cdiv(k, TILE), along_tokens)](
            values, scales, offsets, r.values, r.scales, c.values, c.scales,
            m, k, 0 if offsets is None else len(offsets),
            values.stride(0), r.values.stride(0), c.values.stride(0),
            *((0, 0) if scales is None else scales.stride()), c.shape[1],
            floor or 0.0, power_of_two, scales is not None, rows, columns,
            offsets is not None, 1 if offsets is None else experts_above(len(offsets)), tokens, num_warps=warps,
        )  # fmt: skip
    return by_row, by_column
