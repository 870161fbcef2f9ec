"""DeepGEMM's dense product on Hopper, as far as this project calls it: its checks, and the product in float32 on any
device. What it asks of its arguments was read in its public sources (versions 2.0 to 2.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Operand = tuple[Tensor, Tensor]  # values [R, K], scales


class Call(NamedTuple):
    shape: tuple[int, int, int]  # M, N, K
    recipe: tuple[int, int, int]
    compiled_dims: str
    added: bool


CALLS: list[Call] = []


def fp8_gemm_nt(
    a: Operand,
    b: Operand,
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    recipe = recipe or (1, 128, 128)
    (m, k), n = a[0].shape, b[0].shape[0]
    assert b[0].shape == (n, k) and d.shape == (m, n) and recipe in ((1, 1, 128), (1, 128, 128))
    for (values, scales), height in ((a, recipe[0]), (b, recipe[1])):
        assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
        assert values.is_contiguous() and values.data_ptr() % 16 == 0 and values.stride(0) % 16 == 0
        assert scales.shape == (-(-len(values) // height), -(-k // 128))
    assert d.stride(1) == 1 and d.stride(0) * d.element_size() % 16 == 0 and d.data_ptr() % 16 == 0
    if recipe[1] == 1:
        assert d.dtype == torch.float32 and c is not None
        assert c.data_ptr() == d.data_ptr() and c.shape == d.shape and c.stride() == d.stride()
    else:
        assert d.dtype == torch.bfloat16 and c is None and n % 8 == 0
        assert b[1].stride() == (b[1].shape[1], 1)
    product = wide(*a, recipe[0]) @ wide(*b, recipe[1]).mT
    d.copy_(product if c is None else c + product)
    CALLS.append(Call((m, n, k), recipe, compiled_dims, c is not None))


def wide(values: Tensor, scales: Tensor, height: int) -> Tensor:
    rows, columns = values.shape
    return values.float() * scales.repeat_interleave(height, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
