"""What the adapters of vendors' products share: operands as their libraries read them, and what is left to Triton."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from model.fp8.quantized import Quantized


def leave_to_triton(
    vendor: str, reason: str, a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: Tensor | None
) -> Tensor:
    """The product by the kernels, after a word to the user: whoever asked for a vendor counts on its products."""
    from model.fp8 import kernels

    warn_once(vendor, reason)
    return kernels.fp8_gemm(a, b, out_dtype=out_dtype, accumulate=accumulate)


@cache
def warn_once(vendor: str, reason: str) -> None:
    warnings.warn(f"FP8: {vendor} leaves to Triton {reason}", stacklevel=3)


def aligned(values: Tensor) -> Tensor:
    """values contiguous, from an address that is a multiple of 16 bytes on: the copy engine takes no other."""
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()
