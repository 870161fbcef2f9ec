"""SwiGLU with quantisation, forward and backward: each reads only its input and writes only E4M3.

Fused where both halves are whole tiles (I a multiple of 128); otherwise torch computes and the other kernels quantise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.blocks import AMAX_FLOOR
from model.fp8.kernels.common import WIDTH, experts_above, group_of
from model.fp8.kernels.quantize import (
    WARPS,
    columns_for,
    quantize_activation,
    quantize_both,
    rows_for,
    store_columns,
    store_rows,
    token_tiles,
)
from model.fp8.quantized import TILE, Quantized
from model.fp8.reference import SwigluGradients, swiglu, swiglu_gradient, weighted

ROWS = 64  # of a block of the forward pass
FLOOR = tl.constexpr(AMAX_FLOOR)


@triton.jit
def forward_kernel(
    gate_up, out, out_scales, kept, kept_scales, M, N, pitch, out_pitch, kept_pitch,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """N channels of the output. ROWS tokens by 128 channels of the output, from those of gate and of up."""
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * WIDTH
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, WIDTH)
    place = gate_up + rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    there = (rows < M)[:, None] & (columns < N)[None, :]
    gate = tl.load(place, there, 0.0).to(tl.float32)
    up = tl.load(place + N, there, 0.0).to(tl.float32)
    silu = gate * tl.sigmoid(gate)
    store_rows(silu * up, out, out_scales, row, M, column, N, M, out_pitch, FLOOR, POWER_OF_TWO)
    store_rows(gate, kept, kept_scales, row, M, column, 2 * N, M, kept_pitch, FLOOR, False)
    store_rows(up, kept, kept_scales, row, M, column + N, 2 * N, M, kept_pitch, FLOOR, False)


@triton.jit
def backward_kernel(
    d_out, kept, kept_scales, weight, d_weight, ends,
    d_values, d_scales, d_t_values, d_t_scales, out_t_values, out_t_scales,
    M, N, E, d_out_pitch, kept_pitch, kept_scale_m, kept_scale_k, d_pitch, d_t_pitch, out_t_pitch, limit,
    POWER_OF_TWO: tl.constexpr, WEIGHTED: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """N channels of the output; 128 tokens (of one group) by 128 channels of one of three results: the gradient of gate
    or of up, by rows and by columns, or the output, by columns.

    All three in one program would not fit into registers. They follow each other, so that two find their input in the
    cache. WEIGHTED: with the output also its 128 channels' part of the weights' gradients, [N / 128, M].
    """
    part, column, tile = tl.program_id(0) % 3, tl.program_id(0) // 3 * WIDTH, tl.program_id(1)
    row, end = tile * WIDTH, M
    owned_end = end
    if GROUPED:
        group, start, end, first = group_of(ends, M, E, tile, WIDTH, EXPERTS)
        row = start + (tile - first) * WIDTH
        owned_end = tl.where(group < E, end, row)
    rows = row + tl.arange(0, WIDTH)
    there = (rows < end)[:, None]
    columns = column + tl.arange(0, WIDTH)[None, :]
    # Of the block's own rows, so that vectors of offsets need no 64 bits: registers are short.
    row_of, first_row = tl.arange(0, WIDTH), row.to(tl.int64)
    kept += first_row * kept_pitch
    d_out += first_row * d_out_pitch
    scales = kept_scales + first_row * kept_scale_m + row_of * kept_scale_m
    gate = tl.load(kept + row_of[:, None] * kept_pitch + columns, there, 0.0).to(tl.float32)
    gate *= tl.load(scales + column // WIDTH * kept_scale_k, rows < end, 0.0)[:, None]
    up = tl.load(kept + row_of[:, None] * kept_pitch + columns + N, there, 0.0).to(tl.float32)
    up *= tl.load(scales + (column + N) // WIDTH * kept_scale_k, rows < end, 0.0)[:, None]
    sigmoid = tl.sigmoid(gate)
    if WEIGHTED:
        factor = tl.load(weight + rows, rows < end, 0.0)
    if part == 2:
        out = gate * sigmoid * up
        if WEIGHTED:
            d = tl.load(d_out + row_of[:, None] * d_out_pitch + columns, there, 0.0).to(tl.float32)
            tl.store(d_weight + (column // WIDTH).to(tl.int64) * M + rows, tl.sum(d * out, 1), rows < end)
            out *= factor[:, None]
        store_columns(
            out, out_t_values, out_t_scales, tile, row, owned_end, limit, column, N, out_t_pitch,
            FLOOR, POWER_OF_TWO,
        )  # fmt: skip
    else:
        d = tl.load(d_out + row_of[:, None] * d_out_pitch + columns, there, 0.0).to(tl.float32)
        if WEIGHTED:
            d *= factor[:, None]
        d *= tl.where(part == 0, up * (sigmoid * (1 + gate * (1 - sigmoid))), gate * sigmoid)
        column += part * N
        store_rows(d, d_values, d_scales, row, end, column, 2 * N, M, d_pitch, 0.0, False)
        store_columns(d, d_t_values, d_t_scales, tile, row, owned_end, limit, column, 2 * N, d_t_pitch, 0.0, False)


def swiglu_quantize(
    gate_up: Tensor, weight: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    if inner % TILE:
        out, kept = quantize_activation(swiglu(gate_up), power_of_two=power_of_two), quantize_activation(gate_up)
        return out if weight is None else weighted(out, weight), kept
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    out, kept = rows_for(tokens, inner, gate_up.device), rows_for(tokens, 2 * inner, gate_up.device)
    if gate_up.numel():
        forward_kernel[(inner // TILE, triton.cdiv(tokens, ROWS))](
            gate_up, out.values, out.scales, kept.values, kept.scales, tokens, inner,
            gate_up.stride(0), out.values.stride(0), kept.values.stride(0), power_of_two, ROWS, num_warps=WARPS,
        )  # fmt: skip
    return out if weight is None else weighted(out, weight), kept


def swiglu_quantize_backward(
    d_out: Tensor,
    gate_up: Quantized,
    weight: Tensor | None = None,
    *,
    power_of_two: bool = False,
    offsets: Tensor | None = None,
) -> SwigluGradients:
    tokens, inner = d_out.shape
    if inner % TILE:
        d_gate_up, out, d_weight = swiglu_gradient(d_out, gate_up, weight)
        out_t = quantize_activation(out, power_of_two=power_of_two, transposed=True, offsets=offsets)
        return SwigluGradients(*quantize_both(d_gate_up, floor=None, offsets=offsets), out_t, d_weight)
    d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
    device = d_out.device
    found = (
        rows_for(tokens, 2 * inner, device),
        columns_for(tokens, 2 * inner, offsets, device),
        columns_for(tokens, inner, offsets, device),
    )
    d_weight = torch.empty(inner // TILE, 0 if weight is None else tokens, device=device)
    if found[-1].values.numel():
        backward_kernel[(3 * (inner // TILE), token_tiles(tokens, offsets))](
            d_out, gate_up.values, gate_up.scales, None if weight is None else weight.contiguous(), d_weight, offsets,
            *(part for q in found for part in (q.values, q.scales)),
            tokens, inner, 0 if offsets is None else len(offsets), d_out.stride(0), gate_up.values.stride(0),
            *gate_up.scales.stride(), *(q.values.stride(0) for q in found), found[-1].shape[1],
            power_of_two, weight is not None, offsets is not None,
            1 if offsets is None else experts_above(len(offsets)), num_warps=WARPS,
        )  # fmt: skip
    return SwigluGradients(*found, d_weight.sum(0))
