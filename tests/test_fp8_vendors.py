"""The adapters of cuBLAS and DeepGEMM on CPU tensors: what they hand over, by fakes with the libraries' checks, and
what they leave to Triton, in whose place the reference stands."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fp8_reference import exact, normal, within_bound

import model.fp8
from model.fp8 import Fp8Linear, Quantized, backends, reference, vendor, with_deep_gemm, with_scaled_mm
from model.fp8.backends import BACKENDS, Backend
from model.fp8.context import Fp8Context
from model.fp8.quantized import ROW

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture(autouse=True)
def the_reference_stands_for_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "model.fp8.kernels", reference)
    monkeypatch.setattr(model.fp8, "kernels", reference, raising=False)
    vendor.warn_once.cache_clear()
    yield
    vendor.warn_once.cache_clear()


@pytest.fixture
def deep_gemm(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    yield importlib.import_module("deep_gemm")
    del sys.modules["deep_gemm"]


@pytest.fixture
def scaled_mm(monkeypatch):
    """torch's function for this scaling on Hopper: its checks of shapes and strides, and the product in float32."""
    calls = []

    def fake(a, b, scale_a, kind_a, scale_b, kind_b, *, output_dtype):
        (m, k), n, tiles = a.shape, b.shape[1], -(-a.shape[1] // 128)
        assert (kind_a, kind_b) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
        assert k % 16 == n % 16 == 0 and a.stride() == (k, 1) and b.stride() == (1, k)
        assert scale_a.shape == (m, tiles) and scale_a.stride(0) == 1
        assert scale_a.stride(1) == m or (tiles == 1 and scale_a.stride(1) == 1)
        padded = -(-tiles // 4) * 4
        assert scale_b.shape == (padded, -(-n // 128)) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == padded or (scale_b.shape[1] == 1 and scale_b.stride(1) == 1)
        x = a.float() * scale_a.repeat_interleave(128, 1)[:, :k]
        w = b.float() * scale_b.repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
        calls.append((m, n, k))
        return (x @ w).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", fake)
    return calls


def rounded(got: torch.Tensor, a: Quantized, b: Quantized) -> bool:
    """The product in float32, rounded to bfloat16."""
    want, size = exact(a, b)
    return bool(((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-5 * size).all())


WEIGHTS = [(256, 384), (144, 128), (32, 512), (2112, 256)]  # N, K: whole and parts of blocks, one block, one tile


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("adapter", [with_scaled_mm, with_deep_gemm])
def test_both_form_outputs_and_input_gradients(adapter, n, k, scaled_mm, deep_gemm):
    weight = reference.quantize_weight(normal(n, k, seed=1))
    x = reference.quantize_activation(normal(8, k))
    with warnings.catch_warnings(action="error"):
        y = adapter.fp8_gemm(x, weight)
    assert y.dtype == torch.bfloat16 and rounded(y, x, weight)
    whole = n % 128 == 0 or adapter is with_deep_gemm  # scaled_mm is not given parts of tiles, and here sums are over N
    if whole:
        dy = reference.quantize_activation(normal(8, n), floor=None)
        assert rounded(adapter.fp8_gemm(dy, weight.t()), dy, weight.t())
    wanted = [(8, n, k), (8, k, n)][: 1 + whole]
    assert (scaled_mm or [call.shape for call in deep_gemm.CALLS]) == wanted
    assert all((call.recipe, call.added) == ((1, 128, 128), False) for call in deep_gemm.CALLS)


def test_deep_gemm_adds_every_weight_gradient_the_first_one_to_zeros(deep_gemm):
    dy, x = (reference.quantize_activation(normal(256, c, seed=c), transposed=True) for c in (136, 200))
    first = with_deep_gemm.fp8_gemm(dy, x, out_dtype=torch.float32)
    assert first.dtype == torch.float32 and within_bound(first, dy, x)
    want = 2 * first
    assert with_deep_gemm.fp8_gemm(dy, x, accumulate=first) is first and torch.allclose(first, want)
    # The number of tokens is not among the dimensions that a kernel is compiled for.
    assert deep_gemm.CALLS == [((136, 200, 256), (1, 1, 128), "mn", True)] * 2


def test_operands_are_brought_to_16_bytes(deep_gemm):
    weight, x = reference.quantize_weight(normal(128, 128)), reference.quantize_activation(normal(9, 128))
    shifted = torch.zeros(9 * 128 + 1, dtype=torch.float8_e4m3fn)[1:].view(9, 128).copy_(x.values)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    got = with_deep_gemm.fp8_gemm(Quantized(shifted, x.scales, ROW), weight)
    assert torch.equal(got, with_deep_gemm.fp8_gemm(x, weight))


def product(adapter, m: int, n: int, k: int, *, tiles: bool = False, **options) -> torch.Tensor:
    b = normal(n, k, seed=1)
    b = reference.quantize_activation(b) if tiles else reference.quantize_weight(b)
    return adapter.fp8_gemm(reference.quantize_activation(normal(m, k)), b, **options)


FLOAT32 = {"out_dtype": torch.float32}
LEFT = [
    (with_scaled_mm, (8, 128, 128), {"tiles": True, **FLOAT32}, "weight gradients"),
    (with_scaled_mm, (8, 128, 128), FLOAT32, "not bfloat16"),
    (with_scaled_mm, (8, 128, 200), {}, "no multiple of 128"),
    (with_scaled_mm, (8, 136, 128), {}, "no multiple of 16"),
    (with_scaled_mm, (6, 128, 128), {}, "tokens whose number is no multiple of 4"),
    (with_deep_gemm, (8, 128, 128), FLOAT32, "not bfloat16"),
    (with_deep_gemm, (8, 128, 200), {}, "no multiples of 16"),
    (with_deep_gemm, (8, 132, 128), {}, "no multiples of 16"),
    (with_deep_gemm, (8, 128, 144), {"tiles": True, **FLOAT32}, "no multiple of 128"),
    (with_deep_gemm, (8, 128, 128), {"tiles": True}, "not float32"),
    (with_deep_gemm, (8, 130, 128), {"tiles": True, **FLOAT32}, "no multiple of 4"),
]


@pytest.mark.parametrize(("adapter", "shape", "options", "said"), LEFT)
def test_what_is_left_to_triton_is_said_once(adapter, shape, options, said, scaled_mm, deep_gemm):
    with pytest.warns(UserWarning, match=f"leaves to Triton .*{said}"):
        got = product(adapter, *shape, **options)
    assert torch.equal(got, product(reference, *shape, **options))
    with warnings.catch_warnings(action="error"):
        product(adapter, *shape, **options)
    assert not scaled_mm and not deep_gemm.CALLS


def test_a_gradient_that_the_copy_engine_cannot_write_is_left_to_triton(deep_gemm):
    wide, shifted = torch.zeros(8, 130)[:, :128], torch.zeros(8 * 128 + 1)[1:].view(8, 128)
    for gradient in (wide, shifted):
        vendor.warn_once.cache_clear()
        with pytest.warns(UserWarning, match="not contiguous from a multiple of 16 bytes"):
            assert product(with_deep_gemm, 8, 128, 128, tiles=True, accumulate=gradient) is gradient
        assert torch.equal(gradient, product(reference, 8, 128, 128, tiles=True, **FLOAT32))
    assert not deep_gemm.CALLS


def test_products_of_nothing():
    for adapter in (with_scaled_mm, with_deep_gemm):
        with pytest.warns(UserWarning, match="products of nothing"):
            assert product(adapter, 0, 128, 128).shape == (0, 128)


def test_a_backend_says_what_its_module_leaves():
    x, weight = reference.quantize_activation(normal(8, 128)), reference.quantize_weight(normal(128, 128))
    assert all(backend.declines(x, weight) is None for backend in BACKENDS.values() if backend.name != "triton")
    tiles = reference.quantize_activation(normal(128, 128))
    assert BACKENDS["scaled_mm"].declines(tiles, tiles, torch.float32) == "weight gradients"
    assert BACKENDS["deep_gemm"].declines(tiles, tiles, accumulate=torch.zeros(128, 128)) is None
    assert BACKENDS["reference"].declines(tiles, tiles) is None


def test_a_layer_trains_by_deep_gemm_as_by_the_reference(deep_gemm, monkeypatch):
    here = Backend("deep_gemm", "model.fp8.with_deep_gemm", lambda device: None, rest="model.fp8.reference")
    monkeypatch.setitem(BACKENDS, "deep_gemm", here)
    found = []
    for name in ("reference", "deep_gemm"):
        layer = Fp8Linear(256, 128, bias=False, context=Fp8Context(name), dtype=torch.bfloat16)
        layer.weight.data.copy_(normal(128, 256))
        layer.weight.master = layer.weight.detach().float()
        x = normal(128, 256, seed=1).bfloat16().requires_grad_()
        y = layer(x)
        y.backward(normal(128, 128, seed=2).bfloat16())
        found.append((y, x.grad, layer.weight.master.grad))
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype and (got - want).norm() <= 2**-8 * want.norm()
    assert [call.added for call in deep_gemm.CALLS] == [False, False, True]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(backends, "_no_triton", lambda device: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_deep_gemm_is_looked_into_when_it_is_chosen(hopper, deep_gemm, monkeypatch):
    missing = BACKENDS["deep_gemm"].missing
    assert missing(hopper) is None
    monkeypatch.delattr(deep_gemm, "fp8_gemm_nt")
    monkeypatch.setattr(deep_gemm, "__version__", "1.0.0", raising=False)
    with pytest.raises(ValueError, match="deep_gemm 1.0.0 has no fp8_gemm_nt; install version 2 or later"):
        backends.choose("deep_gemm", hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "this one has 10.0" in missing(hopper)


def test_a_deep_gemm_that_cannot_be_imported_says_why(hopper, tmp_path, monkeypatch):
    (tmp_path / "deep_gemm.py").write_text("cuda_home = None\nassert cuda_home is not None, 'no nvcc'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    assert BACKENDS["deep_gemm"].missing(hopper) == "importing deep_gemm failed: AssertionError: no nvcc"
