"""The ways in which training launches the kernels, for `offline.py`: by types, alignments and what is there or not.

Call sites: `model/fp8/linear.py`, `feed_forward.py`, `context.py`, `weights.py`. Float32 comes from what torch computes
between the kernels, and from models in float32.
"""

from collections.abc import Callable
from typing import Any

import torch

from model.fp8 import kernels
from model.fp8.quantized import Quantized

Launches = dict[str, Callable[[], object]]
FLOAT32: dict[str, Any] = {"out_dtype": torch.float32}
BFLOAT16: dict[str, Any] = {"out_dtype": torch.bfloat16}


def training() -> Launches:
    """By name. Of what operands hold, nothing is read."""
    return {**_quantisation(), **_dense(), **_grouped()}


def _tokens(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(m, k, dtype=dtype)


def _ends(groups: int) -> dict[str, Any]:
    """256 tokens in `groups` groups."""
    return {"offsets": torch.arange(1, groups + 1, dtype=torch.int32) * (256 // groups)}


def _quantisation() -> Launches:
    quantize, both, weight = kernels.quantize_activation, kernels.quantize_both, kernels.quantize_weight
    x, x32, two = _tokens(256, 512), _tokens(256, 512, torch.float32), _ends(2)
    kept, weight_R = quantize(x), torch.zeros(256)
    return {
        "quantise rows": lambda: quantize(x),
        "quantise rows of float32": lambda: quantize(x32),
        "quantise rows to powers of two": lambda: quantize(x, power_of_two=True),
        "quantise rows of gradients to powers of two": lambda: quantize(x, floor=None, power_of_two=True),
        "quantise columns": lambda: quantize(x, floor=None, transposed=True),
        "quantise columns of float32 in groups": lambda: quantize(x32, transposed=True, **two),
        "quantise columns of E4M3 in groups": lambda: quantize(kept, power_of_two=True, transposed=True, **two),
        "quantise columns of E4M3 gradients in groups": lambda: quantize(
            kept, floor=None, power_of_two=True, transposed=True, **two
        ),
        "quantise rows and columns": lambda: both(x, floor=None),
        "quantise rows and columns of float32": lambda: both(x32, floor=None),
        "quantise rows and columns to powers of two": lambda: both(x, power_of_two=True),
        "quantise rows and columns of float32 in groups": lambda: both(x32, floor=None, **two),
        "quantise blocks": lambda: weight(x),
        "quantise blocks of float32": lambda: weight(x32),
        "SwiGLU": lambda: kernels.swiglu_quantize(x),
        "SwiGLU backward": lambda: kernels.swiglu_quantize_backward(x[:, :256], kept),
        "SwiGLU backward of experts": lambda: kernels.swiglu_quantize_backward(x[:, :256], kept, weight_R, **two),
    }


def _dense() -> Launches:
    """Products of layers with 512 inputs and 256 outputs. One tile: with 128 inputs, or of 128 tokens."""
    gemm = kernels.fp8_gemm
    x, dy = (kernels.quantize_activation(_tokens(256, width)) for width in (512, 256))
    narrow, w_narrow = kernels.quantize_activation(_tokens(256, 128)), kernels.quantize_weight(_tokens(256, 128))
    x_t, dy_t = (kernels.quantize_activation(_tokens(256, width), transposed=True) for width in (512, 256))
    short = kernels.quantize_activation(_tokens(128, 512), transposed=True)
    w = kernels.quantize_weight(_tokens(256, 512))
    few, one = (kernels.quantize_activation(_tokens(rows, 512)) for rows in (32, 1))
    gradient = torch.zeros(256, 512)
    return {
        "product": lambda: gemm(x, w),
        "product, float32": lambda: gemm(x, w, **FLOAT32),
        "product, few rows": lambda: gemm(few, w),
        "product, one row": lambda: gemm(one, w),
        "product, one tile": lambda: gemm(narrow, w_narrow),
        "product, transposed weight": lambda: gemm(dy, w.t()),
        "product, transposed weight, float32": lambda: gemm(dy, w.t(), **FLOAT32),
        "weight gradient": lambda: gemm(dy_t, x_t, accumulate=gradient),
        "weight gradient, one tile": lambda: gemm(short, short, accumulate=torch.zeros(512, 512)),
        "weight gradient, first": lambda: gemm(dy_t, x_t, **FLOAT32),
        "weight gradient, bfloat16": lambda: gemm(dy_t, x_t, **BFLOAT16),
    }


def _grouped() -> Launches:
    """The same of experts, and with few rows for each of eight."""
    gemm, wgrad, two, eight = kernels.grouped_gemm, kernels.grouped_wgrad, _ends(2), _ends(8)
    x, dy = (kernels.quantize_activation(_tokens(256, width)) for width in (512, 256))
    narrow = kernels.quantize_activation(_tokens(256, 128))
    x_t, dy_t = (kernels.quantize_activation(_tokens(256, width), transposed=True, **two) for width in (512, 256))

    def weights(experts: int, inputs: int = 512) -> Quantized:
        return kernels.quantize_weight(_tokens(256, inputs).expand(experts, -1, -1))

    w, more, w_narrow = weights(2), weights(8), weights(2, 128)
    return {
        "grouped product": lambda: gemm(x, w, **two),
        "grouped product, few rows": lambda: gemm(x, more, **eight),
        "grouped product, one tile": lambda: gemm(narrow, w_narrow, **two),
        "grouped product, transposed weights": lambda: gemm(dy, w.t(), **two),
        "grouped product, transposed weights, few rows": lambda: gemm(dy, more.t(), **eight),
        "grouped weight gradient": lambda: wgrad(dy_t, x_t, accumulate=torch.zeros(2, 256, 512), **two),
        "grouped weight gradient, first": lambda: wgrad(dy_t, x_t, **FLOAT32, **two),
        "grouped weight gradient, bfloat16": lambda: wgrad(dy_t, x_t, **BFLOAT16, **two),
    }
