"""Triton's interpreter on CPU tensors with its casts put right. Import it before `model.fp8.kernels`.

The interpreter's casts to 8 and 16 bits round halves away from zero and do not saturate; the hardware's and torch's round
to even, and Triton's to E4M3 saturate. So casts go through torch here.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: pip install -e '.[fp8]'")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def cast(data: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: object = None) -> np.ndarray:
    """The bits of `data`, whose bits are of type `source`, in type `target`."""
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}" if data.itemsize > 1 else "u1"))
    values = bits.view(TYPES[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-448, 448)
    found = values.to(TYPES[target])
    return found.view(BITS[found.element_size()]).numpy().view(f"u{found.element_size()}").reshape(data.shape)


interpreter._convert_float = cast
