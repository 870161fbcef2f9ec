"""Block-wise E4M3 against the format's definition, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.fp8.blocks import BLOCK, dequantize_blocks, quantize_blocks, scale_shape


def e4m3_values() -> np.ndarray:
    """What each of the 256 codes means: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(exponent == 15) & (mantissa == 7)] = np.nan
    return np.where(code >> 7, -magnitude, magnitude)


def rounded(x: np.ndarray) -> np.ndarray:
    """x in E4M3: the nearest value, of two equally near ones that with the even code."""
    codes = np.arange(127)
    values = e4m3_values()[codes]
    distance = np.abs(np.abs(x)[..., None] - values)
    nearest = distance.min(-1, keepdims=True) == distance
    best = np.where(nearest, values + np.where(codes % 2, 1e6, 0.0), np.inf).argmin(-1)
    return np.copysign(values[best], x)


def reference(weight: np.ndarray, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(dequantised, scales) in float64, block by block."""
    rows, columns = weight.shape
    out = np.empty_like(weight)
    scale = np.empty((-(-rows // n), -(-columns // k)))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = np.s_[i * n : (i + 1) * n, j * k : (j + 1) * k]
            scale[i, j] = max(np.abs(weight[part]).max(), 1e-4) / 448
            out[part] = rounded(weight[part] / scale[i, j]) * scale[i, j]
    return out, scale


def sample(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Magnitudes over six decades, so that normals, subnormals and zeros all come up."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (torch.rand(rows, columns, generator=generator) * 6 - 6)
    return torch.randn(rows, columns, generator=generator) * size


def test_codes_mean_what_the_format_says():
    got = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(got, e4m3_values(), equal_nan=True)
    assert np.nanmax(got) == 448


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 7), (1, 300), (57, 129)])
def test_equals_the_reference(shape):
    weight = sample(*shape)
    q, scale = quantize_blocks(weight)
    assert q.dtype == torch.float8_e4m3fn and q.shape == weight.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == scale_shape(weight.shape)
    want, scales = reference(weight.double().numpy(), *BLOCK)
    assert np.allclose(scale.numpy(), scales, rtol=1e-6)
    got = dequantize_blocks(q, scale, dtype=torch.float32).double().numpy()
    # The quotient is rounded to float32 before E4M3: an element within 1e-6 of the middle may go the other way.
    assert (np.abs(got - want) > 1e-5 * np.abs(want)).mean() < 1e-4


def test_error_is_within_the_bound_of_every_element():
    weight = sample(300, 500, seed=1)
    q, scale = quantize_blocks(weight)
    got = dequantize_blocks(q, scale, dtype=torch.float32).double()
    x, s = weight.double(), scale.double().repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :500]
    bound = torch.maximum(x.abs() * 2**-4, s * 2**-10) * (1 + 1e-6)
    assert ((got - x).abs() <= bound).all()
    # And not by far: some normal and some subnormal elements come near it (a normal one to 16/17 of it).
    normal = x.abs() >= s * 2**-6
    for chosen in (normal, ~normal):
        assert 0.9 < float(((got - x).abs() / bound)[chosen].max())


def test_each_block_has_its_own_scale():
    weight = torch.full((256, 256), 3e-3)
    weight[128:, 128:] = 4.48e2
    weight[:128, 128:] = -7.0
    _, scale = quantize_blocks(weight)
    assert torch.allclose(scale * 448, torch.tensor([[3e-3, 7.0], [3e-3, 448.0]]))


def test_zeros_and_tiny_blocks_take_the_floor():
    q, scale = quantize_blocks(torch.zeros(128, 256))
    assert not q.float().any() and torch.allclose(scale, torch.full((1, 2), 1e-4 / 448))
    tiny = torch.full((4, 4), 3e-5)  # below the floor of 1e-4: 30 % of the range
    q, scale = quantize_blocks(tiny)
    assert float(scale) == pytest.approx(1e-4 / 448)
    assert torch.allclose(dequantize_blocks(q, scale, dtype=torch.float32), tiny, rtol=2**-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_becomes_nan_and_its_neighbours_do_not(bad):
    weight = torch.ones(128, 256)
    weight[3, 5] = bad
    q, scale = quantize_blocks(weight)
    got = dequantize_blocks(q, scale)
    assert got[:, :128].isnan().all() and (got[:, 128:] == 1).all()
    assert scale.isfinite().tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_formed_in_float32_and_rounded_once(dtype):
    q, scale = quantize_blocks(sample(64, 64))
    want = (q.double() * scale.double().item()).float().to(dtype)
    assert torch.equal(dequantize_blocks(q, scale, dtype=dtype), want)


def test_quantising_again_changes_nothing():
    q, scale = quantize_blocks(sample(200, 200))
    weight = dequantize_blocks(q, scale, dtype=torch.float32)
    again, scales = quantize_blocks(weight)
    assert torch.allclose(dequantize_blocks(again, scales, dtype=torch.float32), weight, rtol=1e-6)


def test_other_block_sizes_and_wrong_scales():
    weight = sample(10, 10)
    q, scale = quantize_blocks(weight, (4, 3))
    assert scale.shape == (3, 4)
    want, _ = reference(weight.double().numpy(), 4, 3)
    got = dequantize_blocks(q, scale, (4, 3), torch.float32)
    assert np.allclose(got.numpy(), want, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\(10, 10\) in blocks of 128 x 128 needs scales of \(1, 1\), not \(3, 4\)"):
        dequantize_blocks(q, scale)
