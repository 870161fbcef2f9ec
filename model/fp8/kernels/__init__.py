"""The operators as Triton kernels, with blocks for Hopper; `reference.py` has the contracts.

`TRITON_INTERPRET=1`, set before the import, runs them on CPU tensors, slowly. `python -m model.fp8.kernels.offline`
compiles them without a GPU.
"""

from model.fp8.kernels.products import fp8_gemm, grouped_gemm, grouped_wgrad
from model.fp8.kernels.quantize import quantize_activation, quantize_both, quantize_weight
from model.fp8.kernels.swiglu import swiglu_quantize, swiglu_quantize_backward

__all__ = [
    "fp8_gemm",
    "grouped_gemm",
    "grouped_wgrad",
    "quantize_activation",
    "quantize_both",
    "quantize_weight",
    "swiglu_quantize",
    "swiglu_quantize_backward",
]
