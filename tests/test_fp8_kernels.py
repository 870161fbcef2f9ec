"""The Triton kernels against the torch reference and float64: on a GPU that runs them, or in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest -m slow tests/test_fp8_kernels.py
"""

from __future__ import annotations

import os

import pytest
import test_fp8_reference
import torch

from model.fp8 import Quantized
from model.fp8 import reference as fp8
from model.fp8.backends import BACKENDS, choose
from model.fp8.blocks import quantize_blocks
from model.fp8.quantized import ROW

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="needs triton: pip install -e '.[fp8]'")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton_interpreter import exact_casts  # noqa: F401
elif BACKENDS["triton"].missing(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None:
    pytest.skip("needs a GPU or, from the start, TRITON_INTERPRET=1", allow_module_level=True)

from model.fp8 import kernels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return test_fp8_reference.normal(*shape, seed=seed).to(DEVICE)


def ends(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int().to(DEVICE)


def within_bound(got: torch.Tensor, a: Quantized, b: Quantized) -> bool:
    return test_fp8_reference.within_bound(got, a, b, tensor_cores=not INTERPRETED)


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Products of the same operands."""
    tolerance = 1e-5 if INTERPRETED else 2e-2
    return torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """So that what a kernel forgets to write is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tiles of very different sizes down to subnormals, a tile of zeros, one with an infinity and one with a NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * 10 ** (torch.rand(*shape[:-1], 1, generator=generator) * 70 - 42)
    x[..., 0, :128] = 0
    if shape[-2] > 2:
        x[..., 1, 5], x[..., 2, -1] = torch.inf, torch.nan
    return x.to(DEVICE)


def same(got: Quantized, want: Quantized) -> None:
    """To the bit; NaN is NaN, whatever its sign."""
    assert got.tile == want.tile and got.shape == want.shape
    assert torch.equal(got.scales.nan_to_num(-1.0), want.scales.nan_to_num(-1.0))
    assert torch.equal(got.values.float().nan_to_num(1e9), want.values.float().nan_to_num(1e9))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("floor", [1e-4, None])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (130, 128), (40, 259)])
def test_quantised_rows_and_columns_equal_the_reference(shape, floor, power_of_two):
    for x in (wide(*shape), normal(*shape).bfloat16()):
        how = {"floor": floor, "power_of_two": power_of_two}
        same(kernels.quantize_activation(x, **how), fp8.quantize_activation(x, **how))
        same(kernels.quantize_activation(x, transposed=True, **how), fp8.quantize_activation(x, transposed=True, **how))
        for got, want in zip(kernels.quantize_both(x, **how), fp8.quantize_both(x, **how), strict=True):
            same(got, want)


@pytest.mark.parametrize("sizes", [[3, 0, 130, 1], [0, 0], [128], [140, 4]])
def test_grouped_columns_equal_the_reference(sizes):
    offsets = ends(sizes)
    x = wide(sum(sizes) + 2, 140)
    for got, want in zip(kernels.quantize_both(x, offsets=offsets), fp8.quantize_both(x, offsets=offsets), strict=True):
        same(got, want)
    kept = fp8.quantize_activation(normal(sum(sizes) + 2, 140))
    how = {"transposed": True, "offsets": offsets, "power_of_two": True, "floor": None}
    same(kernels.quantize_activation(kept, **how), fp8.quantize_activation(kept, **how))


@pytest.mark.parametrize("shape", [(1, 1), (130, 70), (2, 129, 260)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_weights_equal_the_reference(shape, power_of_two):
    for weight in (wide(*shape), normal(*shape)):
        got = kernels.quantize_weight(weight, power_of_two=power_of_two)
        same(got, fp8.quantize_weight(weight, power_of_two=power_of_two))


def test_quotients_round_as_division_does():
    # Every bfloat16 below 2^k in a tile whose largest is near it, at the ends and in the middle of the range.
    for exponent in (-99, -60, 0, 100):
        fractions = torch.arange(1, 2**11, device=DEVICE).float() / 2**11
        x = torch.cat([fractions * 2.0**exponent, fractions * 1.37 * 2.0**exponent])
        x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
        x = torch.cat([x, torch.full((len(x), 1), 1.9 * 2.0**exponent, device=DEVICE)], 1)
        same(kernels.quantize_activation(x, floor=None), fp8.quantize_activation(x, floor=None))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (130, 129, 257), (70, 144, 400)])
@pytest.mark.parametrize("tile", [ROW, (128, 128)])
def test_products_are_within_the_bound(m, n, k, tile):
    a = kernels.quantize_activation(normal(m, k))
    b = Quantized(*quantize_blocks(normal(n, k, seed=1), tile), tile)  # its rows are not 16 bytes apart
    got = kernels.fp8_gemm(a, b, out_dtype=torch.float32)
    assert got.shape == (m, n) and within_bound(got, a, b)
    assert torch.equal(kernels.fp8_gemm(a, b), got.bfloat16())
    gradient = normal(m, n, seed=2)
    want = gradient + got
    assert kernels.fp8_gemm(a, b, accumulate=gradient) is gradient
    assert torch.allclose(gradient, want, rtol=1e-6, atol=1e-6)


def test_weight_and_input_gradients_of_a_dense_layer():
    x, dy, weight = normal(150, 200), normal(150, 140, seed=1), normal(140, 200, seed=2)
    w = kernels.quantize_weight(weight)
    dy_rows, dy_columns = kernels.quantize_both(dy, floor=None)
    x_columns = kernels.quantize_activation(kernels.quantize_activation(x), transposed=True)
    assert within_bound(kernels.fp8_gemm(dy_rows, w.t(), out_dtype=torch.float32), dy_rows, w.t())
    gradient = kernels.fp8_gemm(dy_columns, x_columns, accumulate=torch.zeros(140, 200, device=DEVICE))
    assert within_bound(gradient, dy_columns, x_columns)


def test_views_that_the_copy_engine_cannot_read_are_copied():
    a, b = fp8.quantize_activation(normal(9, 160)), fp8.quantize_weight(normal(8, 160))
    shifted = torch.zeros(9 * 160 + 1, dtype=torch.float8_e4m3fn, device=DEVICE)[1:].view(9, 160)
    shifted.copy_(a.values)
    strided = torch.zeros(160, 9, dtype=torch.float8_e4m3fn, device=DEVICE).mT
    strided.copy_(a.values)
    want = kernels.fp8_gemm(a, b)
    for values in (shifted, strided):
        assert torch.equal(kernels.fp8_gemm(Quantized(values, a.scales, ROW), b), want)


@pytest.mark.parametrize("sizes", [[3, 0, 130, 1], [0, 0], [70, 128], [5]])
def test_grouped_products_are_those_of_each_group(sizes):
    experts, tokens, n, k = len(sizes), sum(sizes), 140, 200
    offsets = ends(sizes)
    x, dy = normal(tokens + 2, k), normal(tokens + 2, n, seed=1)
    a, b = fp8.quantize_activation(x), fp8.quantize_weight(normal(experts, n, k, seed=2))
    got = kernels.grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    want = fp8.grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    assert near(got, want) and not got[tokens:].any()
    dy_t = kernels.quantize_activation(dy, floor=None, transposed=True, offsets=offsets)
    x_t = kernels.quantize_activation(x, transposed=True, offsets=offsets)
    got, want = kernels.grouped_wgrad(dy_t, x_t, offsets), fp8.grouped_wgrad(dy_t, x_t, offsets)
    assert got.dtype == torch.float32 and near(got, want)
    added = torch.ones_like(want)
    assert kernels.grouped_wgrad(dy_t, x_t, offsets, accumulate=added) is added
    assert near(added, want + 1)
    assert kernels.grouped_wgrad(dy_t, x_t, offsets, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("inner", [256, 72])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_and_its_gradient_follow_the_reference(inner, grouped, weighted):
    """Exponentials may differ in the last bit, and so may an element that lies between two E4M3 numbers."""
    offsets = ends([20, 0, 129]) if grouped else None
    gate_up, d_out = normal(150, 2 * inner).bfloat16(), normal(150, inner, seed=1).bfloat16()
    weight = normal(150, seed=2).sigmoid() if weighted else None
    got, kept = kernels.swiglu_quantize(gate_up, weight, power_of_two=True)
    want, kept_want = fp8.swiglu_quantize(gate_up, weight, power_of_two=True)
    same(kept, kept_want)
    close(got, want)
    *found, d_weight = kernels.swiglu_quantize_backward(d_out, kept, weight, power_of_two=True, offsets=offsets)
    *wanted, want_weight = fp8.swiglu_quantize_backward(d_out, kept, weight, power_of_two=True, offsets=offsets)
    for got, want in zip(found, wanted, strict=True):
        close(got, want)
    assert d_weight.shape == want_weight.shape and torch.allclose(d_weight, want_weight, rtol=1e-5, atol=1e-5)


def close(got: Quantized, want: Quantized) -> None:
    """Scales to the last bits; few elements off, and those by one step of E4M3."""
    assert got.shape == want.shape and torch.allclose(got.scales, want.scales, rtol=1e-5)
    x, y = got.dequantize(), want.dequantize()
    off = (x - y).abs() > 1e-4 * y.abs()
    assert off.float().mean() < 1e-3
    assert ((x - y).abs() <= 0.126 * y.abs() + 2**-9 * want.scales.max())[off].all()


def test_what_is_not_finite_reaches_the_product():
    x = torch.ones(3, 256, device=DEVICE)
    x[1, 200] = torch.nan
    y = kernels.fp8_gemm(kernels.quantize_activation(x), kernels.quantize_weight(torch.ones(4, 256, device=DEVICE)))
    assert y.isnan().any(1).tolist() == [False, True, False] and y[1].isnan().all()


def test_nothing_times_something():
    none, weight = kernels.quantize_activation(normal(0, 130)), kernels.quantize_weight(normal(5, 130))
    offsets = ends([0, 0])
    assert kernels.fp8_gemm(none, weight).shape == (0, 5)
    experts = kernels.quantize_weight(normal(2, 5, 130))
    assert kernels.grouped_gemm(none, experts, offsets).shape == (0, 5)
    columns = kernels.quantize_activation(normal(0, 130), transposed=True, offsets=offsets)
    assert not kernels.grouped_wgrad(columns, columns, offsets).any()
    no_channels = kernels.quantize_activation(normal(3, 0))
    assert not kernels.fp8_gemm(no_channels, kernels.quantize_weight(normal(5, 0))).any()


def test_auto_never_takes_the_interpreter():
    assert choose("triton", DEVICE).operators is kernels
    assert choose("auto", DEVICE).operators is (fp8 if INTERPRETED else kernels)
