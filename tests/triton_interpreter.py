"""Puts the casts of Triton's interpreter right. For tests that run with TRITON_INTERPRET=1.

Its casts to 8 and 16 bits round halves away from zero and do not saturate; the hardware's and torch's round to even,
and Triton's to E4M3 saturate. So casts go through torch here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def cast(data: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: object = None) -> np.ndarray:
    """The bits, in type `target`, of the values that the bits of `data` mean in type `source`."""
    signed = np.ascontiguousarray(data).view("u1" if data.itemsize == 1 else f"i{data.itemsize}")
    values = torch.from_numpy(signed).view(TYPES[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-448, 448)
    found = values.to(TYPES[target])
    return found.view(BITS[found.element_size()]).numpy().view(f"u{found.element_size()}").reshape(data.shape)


@pytest.fixture(autouse=True)
def exact_casts(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", cast)
