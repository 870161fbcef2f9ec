"""The FP8 operators in plain torch: the truth that kernels are held to. Runs anywhere; loops over groups on the host.

Letters and `offsets` as in `quantized.py`. Rows after the last group belong to no group: products leave zeros there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.blocks import AMAX_FLOOR, BLOCK, quantize_blocks
from model.fp8.quantized import ROW, TILE, Quantized, check_activation, check_product, padded_tiles


def quantize_activation(
    x: Tensor | Quantized,
    *,
    floor: float | None = AMAX_FLOOR,
    power_of_two: bool = False,
    transposed: bool = False,
    offsets: Tensor | None = None,
) -> Quantized:
    """x [M, K] in tiles of 1 × 128: values [M, K], scales [M, ⌈K/128⌉]. For gradients, floor=None.

    transposed: x^T instead, with tiles along the tokens, for weight gradients: values [K, M], scales [K, ⌈M/128⌉].
        x may be what the forward pass kept, quantised along K: it is dequantised first.
    offsets: only with transposed; no tile crosses a group. Each group starts on a tile and is filled up with zeros to
        whole tiles: values [K, 128 S], scales [K, S] with S = `padded_tiles(M, E)`, whatever the groups' sizes; tiles
        after the last group are zero, with scale 1.
    """
    check_activation(x, transposed, offsets)
    x = x.dequantize() if isinstance(x, Quantized) else x
    if not transposed:
        return Quantized(*quantize_blocks(x, ROW, floor=floor, power_of_two=power_of_two), ROW)
    if offsets is None:
        return Quantized(*quantize_blocks(x.mT, ROW, floor=floor, power_of_two=power_of_two), ROW)
    tiles = padded_tiles(len(x), len(offsets))
    values = torch.zeros(x.shape[1], tiles * TILE, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.ones(x.shape[1], tiles, device=x.device)
    for rows, columns in _groups(offsets):
        q, scale = quantize_blocks(x[rows].mT, ROW, floor=floor, power_of_two=power_of_two)
        values[:, columns.start : columns.start + q.shape[1]] = q
        scales[:, columns.start // TILE : columns.stop // TILE] = scale
    return Quantized(values, scales, ROW)


def quantize_both(
    x: Tensor, *, floor: float | None = AMAX_FLOOR, power_of_two: bool = False, offsets: Tensor | None = None
) -> tuple[Quantized, Quantized]:
    """x along its channels, for products with weights, and transposed, for weight gradients. Kernels read x once."""
    rows = quantize_activation(x, floor=floor, power_of_two=power_of_two)
    columns = quantize_activation(x, floor=floor, power_of_two=power_of_two, transposed=True, offsets=offsets)
    return rows, columns


def quantize_weight(weight: Tensor, *, power_of_two: bool = False) -> Quantized:
    """[..., N, K] in blocks of 128 × 128: scales [..., ⌈N/128⌉, ⌈K/128⌉]."""
    return Quantized(*quantize_blocks(weight, BLOCK, power_of_two=power_of_two), BLOCK)


def fp8_gemm(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    """a b^T [M, N] of a [M, K] in 1 × 128 and b [N, K] in 128 × 128 or 1 × 128, as out_dtype.

    Each 128 of K are summed on their own, then scaled and added to a float32 sum: tensor cores keep only about 14 bits
    while they sum FP8 products (V3 report, section 3.5.2).
    accumulate: a float32 [M, N] that the product is added to and that is returned.
    """
    shape = (a.shape[0], b.shape[0])
    check_product(a, b, accumulate, shape)
    scale_b = b.scales.repeat_interleave(b.tile[0], 0)[: shape[1]]
    total = torch.zeros(shape, device=a.values.device)
    for tile in range(a.scales.shape[1]):
        part = slice(tile * TILE, (tile + 1) * TILE)
        product = a.values[:, part].float() @ b.values[:, part].float().mT
        total += product * (a.scales[:, tile, None] * scale_b[:, tile])
    return total.to(out_dtype) if accumulate is None else accumulate.add_(total)


def grouped_gemm(a: Quantized, b: Quantized, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[M, N]: each group's rows of a [M, K] times its own b[e]^T, b [E, N, K]. Groups may be empty."""
    shape = (a.shape[0], b.shape[1])
    check_product(a, b, None, shape)
    out = torch.zeros(shape, dtype=out_dtype, device=a.values.device)
    for expert, (rows, _) in enumerate(_groups(offsets)):
        mine = Quantized(a.values[rows], a.scales[rows], ROW)
        out[rows] = fp8_gemm(mine, Quantized(b.values[expert], b.scales[expert], b.tile), out_dtype=out_dtype)
    return out


def grouped_wgrad(
    dy_t: Quantized,
    x_t: Quantized,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    accumulate: Tensor | None = None,
) -> Tensor:
    """[E, N, K]: dy^T x of each group, from the grouped transposes of `quantize_activation`; zeros of an empty group.

    accumulate: a float32 [E, N, K] that the products are added to and that is returned.
    """
    shape = (len(offsets), dy_t.shape[0], x_t.shape[0])
    check_product(dy_t, x_t, accumulate, shape)
    out = accumulate if accumulate is not None else torch.zeros(shape, dtype=out_dtype, device=dy_t.values.device)
    for expert, (_, columns) in enumerate(_groups(offsets)):
        tiles = slice(columns.start // TILE, columns.stop // TILE)
        dy, x = (Quantized(q.values[:, columns], q.scales[:, tiles], ROW) for q in (dy_t, x_t))
        if accumulate is None:
            out[expert] = fp8_gemm(dy, x, out_dtype=out_dtype)
        else:
            fp8_gemm(dy, x, accumulate=out[expert])
    return out


def swiglu_quantize(
    gate_up: Tensor, weight: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """(silu(gate) · up [M, I], gate_up [M, 2I] for the backward pass), in tiles of 1 × 128, from gate_up [M, 2I].

    weight: float32 [M], each row's factor of the output. It goes into the scales, after rounding: weights that differ
        in their last bits, as a sampler's and a trainer's may, leave the values as they are.
    The output is computed in float32 from what is given, not from its quantised copy.
    """
    out = quantize_activation(swiglu(gate_up), power_of_two=power_of_two)
    return out if weight is None else weighted(out, weight), quantize_activation(gate_up)


def weighted(x: Quantized, weight: Tensor) -> Quantized:
    """x, whose scales are nobody else's, with rows multiplied by weight [M]."""
    x.scales.mul_(weight[:, None])
    return x


class SwigluGradients(NamedTuple):
    """What the backward pass of gate and up projection, and the weight gradient of the down projection, read."""

    gate_up: Quantized  # gradient [M, 2I], tiles along channels
    gate_up_t: Quantized  # its transpose, tiles along tokens
    out_t: Quantized  # the recomputed output, transposed, tiles along tokens
    weight: Tensor  # gradient [M] float32 of the rows' weights; [0] without weights


def swiglu_quantize_backward(
    d_out: Tensor,
    gate_up: Quantized,
    weight: Tensor | None = None,
    *,
    power_of_two: bool = False,
    offsets: Tensor | None = None,
) -> SwigluGradients:
    """The gradient of weight · silu(gate) · up from that of its output [M, I]; the output is computed again, not kept.

    power_of_two: of the output's tiles. Gradients have no floor. offsets: groups of the transposes.
    """
    d_gate_up, out, d_weight = swiglu_gradient(d_out, gate_up, weight)
    out_t = quantize_activation(out, power_of_two=power_of_two, transposed=True, offsets=offsets)
    return SwigluGradients(*quantize_both(d_gate_up, floor=None, offsets=offsets), out_t, d_weight)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up [M, I] in float32."""
    gate, up = gate_up.float().chunk(2, -1)
    return F.silu(gate) * up


def swiglu_gradient(d_out: Tensor, gate_up: Quantized, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of gate_up [M, 2I], weight · silu(gate) · up [M, I], gradient of weight [M] or [0]) in float32."""
    gate, up = gate_up.dequantize().chunk(2, -1)
    d_out, sigmoid = d_out.float(), gate.sigmoid()
    silu, d_weight = gate * sigmoid, gate.new_empty(0)
    out = silu * up
    if weight is not None:
        d_weight = (d_out * out).sum(-1)
        d_out, out = d_out * weight[:, None], out * weight[:, None]
    d_gate = d_out * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    return torch.cat([d_gate, d_out * silu], -1), out, d_weight


def _groups(offsets: Tensor) -> list[tuple[slice, slice]]:
    """(rows, columns) of each group: where its tokens stand, and its whole tiles in a grouped transpose."""
    found, start, column = [], 0, 0
    for end in offsets.tolist():
        width = -(-(end - start) // TILE) * TILE
        found.append((slice(start, end), slice(column, column + width)))
        start, column = end, column + width
    return found
