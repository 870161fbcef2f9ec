"""Eight-bit floating point for training: E4M3 with a scale for each tile of 128 values (V3 report, section 3.3).

`blocks` defines quantisation, `reference` the operators, `backends` says what runs them where. `Fp8Linear` is a layer
on top of them; `convert.to_fp8` turns the layers of a model into such.
"""

from model.fp8.functions import fp8_gemm, quantize_activation, quantize_weight
from model.fp8.linear import Fp8Linear
from model.fp8.quantized import Quantized

__all__ = ["Fp8Linear", "Quantized", "fp8_gemm", "quantize_activation", "quantize_weight"]
