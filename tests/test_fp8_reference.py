"""The torch operators against float64 arithmetic on what they were given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.fp8 import Quantized, fp8_gemm, quantize_activation, quantize_weight
from model.fp8 import reference as fp8
from model.fp8.blocks import BLOCK, quantize_blocks
from model.fp8.quantized import ROW, padded_tiles

SHAPES = [(1, 1, 1), (3, 5, 7), (128, 128, 128), (129, 127, 257), (64, 300, 640), (0, 4, 128)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(a: Quantized, b: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """(a b^T, |a| |b|^T) of the quantised values in float64."""
    x, y = a.dequantize(torch.float64), b.dequantize(torch.float64)
    return x @ y.mT, x.abs() @ y.abs().mT


def within_bound(got: torch.Tensor, a: Quantized, b: Quantized, *, tensor_cores: bool = False) -> bool:
    """Products of two E4M3 numbers are exact in float32 (8 bits). Of 128 of them, at most 127 additions round; then
    the scales, their product with the sum and the additions over T tiles: (128 + T + 3) roundings of 2^-24 in all,
    each of at most Σ|a||b|. 1.01 covers their products and dequantised values, which are rounded to float32 too.

    Tensor cores cut 128 products, in instructions of 32, at about 14 bits of the largest or of their sum: at most
    4 · 33 · 2^-13 of it, were none to cancel; 2^-8 is a quarter of that.
    """
    want, size = exact(a, b)
    bound = (2.0**-8 if tensor_cores else 1.01 * (128 + a.scales.shape[1] + 3) * 2.0**-24) * size
    return bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("tile", [ROW, BLOCK])
def test_products_are_within_the_bound_of_float32_summation(m, n, k, tile):
    a = quantize_activation(normal(m, k))
    b = Quantized(*quantize_blocks(normal(n, k, seed=1), tile), tile)
    got = fp8_gemm(a, b, out_dtype=torch.float32)
    assert got.shape == (m, n) and within_bound(got, a, b)
    assert torch.equal(fp8_gemm(a, b), got.bfloat16())


def test_a_product_is_added_to_a_gradient_in_place():
    a, b = quantize_activation(normal(5, 200)), quantize_weight(normal(6, 200, seed=1))
    gradient = normal(5, 6, seed=2)
    before = gradient.clone()
    assert fp8_gemm(a, b, accumulate=gradient) is gradient
    assert torch.equal(gradient, before + fp8_gemm(a, b, out_dtype=torch.float32))


def test_transposed_tiles_run_along_the_tokens():
    x = normal(200, 130)
    columns = quantize_activation(x, transposed=True)
    assert columns.shape == (130, 200) and columns.scales.shape == (130, 2)
    assert torch.equal(columns.scales[:, 1], quantize_activation(x.mT[:, 128:]).scales[:, 0])
    rows, again = fp8.quantize_both(x)
    assert torch.equal(rows.values.float(), quantize_activation(x).values.float())
    assert torch.equal(again.values.float(), columns.values.float()) and torch.equal(again.scales, columns.scales)


def test_a_transposed_weight_has_the_same_values():
    weight = normal(150, 300)
    w = quantize_weight(weight)
    assert torch.equal(w.t().dequantize(), w.dequantize().mT) and w.t().values.is_contiguous()
    assert torch.equal(w.t().dequantize(), quantize_weight(weight.mT).dequantize())


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "fp8.md").read_text(encoding="utf-8")
    names = {"x": normal(70, 200), "w": torch.nn.Parameter(normal(150, 200, seed=1)), "dy": normal(70, 150, seed=2)}
    names["w"].grad = torch.zeros(150, 200)
    with torch.no_grad():
        exec(page.partition("```python\n")[2].partition("```")[0], names)
    x, w, dy = names["x"], names["w"].detach(), names["dy"]
    for got, want in ((names["y"], x @ w.mT), (names["dx"], dy @ w), (names["w"].grad, dy.mT @ x)):
        assert _error(got, want) < 0.06


def test_what_the_forward_pass_kept_can_be_transposed():
    kept = quantize_activation(normal(200, 300), power_of_two=True)
    got = quantize_activation(kept, transposed=True, power_of_two=True)
    want = quantize_activation(kept.dequantize(), transposed=True, power_of_two=True)
    assert torch.equal(got.values.float(), want.values.float()) and torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("floor", [1e-4, None])
def test_powers_of_two_are_the_next_larger_ones(floor):
    # Also where log2 in float32 rounds to an integer: amax one step above 448 · 2^k.
    amax = torch.cat([torch.logspace(-35, 35, 400), 448 * 2.0 ** torch.arange(-30.0, 30)])
    amax = torch.cat([amax, torch.nextafter(amax, torch.tensor(torch.inf))])
    scale = fp8.quantize_activation(amax[:, None], power_of_two=True, floor=floor).scales[:, 0].double()
    needed = (amax.double().clamp(min=floor or 0) / 448).clamp(min=2**-100)
    assert (scale.frexp().mantissa == 0.5).all()
    assert ((scale >= needed * (1 - 2**-24)) & (scale < 2 * needed)).all()


def test_gradients_keep_their_precision_however_small():
    tiny = normal(4, 128) * 1e-9
    with_floor, without = quantize_activation(tiny), quantize_activation(tiny, floor=None)
    error = [float((q.dequantize() - tiny).norm() / tiny.norm()) for q in (with_floor, without)]
    assert error[0] > 0.1 and error[1] < 2**-4
    smallest = torch.full((1, 128), 2e-32)
    assert torch.allclose(quantize_activation(smallest, floor=None).dequantize(), smallest, rtol=2**-4, atol=0)
    subnormal = quantize_activation(torch.full((1, 128), 1e-39), floor=None)
    assert subnormal.scales == 2**-100 and not subnormal.dequantize().any()
    zeros = quantize_activation(torch.zeros(3, 200), floor=None)
    assert (zeros.scales == 1).all() and not zeros.dequantize().any()
    assert (quantize_activation(torch.zeros(3, 200)).scales == torch.tensor(1e-4) / 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("floor", [1e-4, None])
def test_what_is_not_finite_stays_visible(bad, power_of_two, floor):
    x = torch.ones(2, 384)
    x[1, 200] = bad
    q = quantize_activation(x, power_of_two=power_of_two, floor=floor)
    back = q.dequantize()
    assert back[1, 128:256].isnan().all() and back.isnan().sum() == 128
    product = fp8_gemm(q, quantize_weight(torch.ones(7, 384)))
    assert product[1].isnan().all() and product[0].isfinite().all()


def test_the_largest_numbers_saturate_at_448():
    largest = torch.finfo(torch.float32).max
    q = quantize_activation(torch.tensor([[largest, -largest, 1.0]]))
    assert q.values.float().tolist() == [[448, -448, 0]] and q.scales.isfinite().all()


@pytest.mark.parametrize("sizes", [[3, 0, 130, 1], [0, 0], [128, 256], [5]])
def test_grouped_products_are_those_of_each_group(sizes):
    experts, tokens, n, k = len(sizes), sum(sizes), 140, 260
    offsets = torch.tensor(sizes).cumsum(0).int()
    rest = 2  # rows after the last group
    x, dy = normal(tokens + rest, k), normal(tokens + rest, n, seed=1)
    a, b = quantize_activation(x), quantize_weight(normal(experts, n, k, seed=2))
    y = fp8.grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    assert not y[tokens:].any()
    dy_t = fp8.quantize_activation(dy, floor=None, transposed=True, offsets=offsets)
    x_t = fp8.quantize_activation(x, transposed=True, offsets=offsets)
    assert x_t.shape == (k, 128 * padded_tiles(tokens + rest, experts))
    gradient = fp8.grouped_wgrad(dy_t, x_t, offsets)
    added = torch.ones_like(gradient)
    assert fp8.grouped_wgrad(dy_t, x_t, offsets, accumulate=added) is added
    assert torch.equal(added, gradient + 1)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        mine = Quantized(a.values[rows], a.scales[rows], ROW)
        assert within_bound(y[rows], mine, Quantized(b.values[expert], b.scales[expert], BLOCK))
        alone = [quantize_activation(t[rows], floor=f, transposed=True) for t, f in ((dy, None), (x, 1e-4))]
        assert torch.equal(gradient[expert], fp8_gemm(*alone, out_dtype=torch.float32))
        start += size


def test_swiglu_and_its_gradient():
    gate_up = normal(70, 512).double().requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    d_out = normal(70, 256, seed=1)
    out.backward(d_out.double())
    quantised, kept = fp8.swiglu_quantize(gate_up.detach().float())
    offsets = torch.tensor([20, 70], dtype=torch.int32)
    got = fp8.swiglu_quantize_backward(d_out, kept, offsets=offsets)
    # E4M3 has a relative error of at most 2^-4; the gradient has that of its inputs too.
    assert _error(quantised.dequantize(), out) < 0.03 and _error(kept.dequantize(), gate_up) < 0.03
    assert _error(got.gate_up.dequantize(), gate_up.grad) < 0.045
    assert _error(got.gate_up_t.dequantize()[:, :20], gate_up.grad[:20].mT) < 0.045
    assert _error(got.out_t.dequantize()[:, 128 : 128 + 50], out[20:].mT) < 0.06


def test_rows_of_a_swiglu_have_weights():
    """Gradients are autograd's of what was kept; a row's weight goes into its scales and leaves its values, so that
    one that differs in its last bit rounds nothing otherwise."""
    gate_up, d_out = normal(70, 512), normal(70, 256, seed=1)
    weight = normal(70, seed=2).sigmoid() + 0.1
    quantised, kept = fp8.swiglu_quantize(gate_up, weight)
    plain, _ = fp8.swiglu_quantize(gate_up)
    assert torch.equal(quantised.scales, plain.scales * weight[:, None])
    assert torch.equal(quantised.values.float(), plain.values.float())
    given, factor = kept.dequantize().double().requires_grad_(), weight.double().requires_grad_()
    gate, up = given.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up * factor[:, None]
    out.backward(d_out.double())
    got = fp8.swiglu_quantize_backward(d_out, kept, weight)
    assert _error(got.weight, factor.grad) < 1e-6
    assert _error(got.gate_up.dequantize(), given.grad) < 0.03 and _error(got.out_t.dequantize(), out.mT) < 0.03
    assert fp8.swiglu_quantize_backward(d_out, kept).weight.shape == (0,)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.detach()).norm() / want.detach().norm())


def test_wrong_operands_are_refused():
    a, w = quantize_activation(normal(4, 128)), quantize_weight(normal(4, 128))
    with pytest.raises(ValueError, match=r"not \(128, 128\) and \(1, 128\)"):
        fp8_gemm(w, a)
    with pytest.raises(ValueError, match="the same last dimension"):
        fp8_gemm(a, quantize_weight(normal(4, 129)))
    with pytest.raises(ValueError, match=r"float32 of \(4, 4\), not torch.bfloat16"):
        fp8_gemm(a, w, accumulate=torch.zeros(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"need scales of \(4, 1\)"):
        Quantized(a.values, a.scales.mT, ROW)
    with pytest.raises(ValueError, match="need transposed=True"):
        fp8.quantize_activation(normal(4, 4), offsets=torch.tensor([4]))
