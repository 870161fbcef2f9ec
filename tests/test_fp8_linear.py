"""Fp8Linear against products written down in float64, and against bfloat16; what it keeps and when it quantises."""

from __future__ import annotations

import copy

import fp8_reference as want
import pytest
import torch
from fp8_reference import kept_for_backward
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from model.fp8 import Fp8Linear, reference
from model.fp8.context import Fp8Context
from model.fp8.linear import multiplied_input, multiplied_weight
from model.fp8.weights import weights_changed


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows and columns of different sizes, so that scales matter."""
    generator = torch.Generator().manual_seed(seed)
    x, row, column = (torch.randn(size, generator=generator) for size in (shape, (*shape[:-1], 1), shape[-1:]))
    return (x * row.exp() * column).to(dtype)


def layer_of(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, **kwargs) -> Fp8Linear:
    layer = Fp8Linear(inputs, outputs, dtype=dtype, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(seeded(outputs, inputs, seed=1) * inputs**-0.5)
        if layer.bias is not None:
            layer.bias.copy_(seeded(outputs, seed=2))
    return layer


def run(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())


@pytest.mark.parametrize("tokens, inputs, outputs", [(256, 256, 128), (200, 300, 130), (1, 7, 5), (130, 128, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_three_products_are_those_of_the_rounded_tensors(tokens, inputs, outputs, power_of_two):
    layer = layer_of(inputs, outputs, torch.float32, bias=False, power_of_two=power_of_two)
    x, dy = seeded(tokens, inputs).float(), 1e-6 * seeded(tokens, outputs, seed=3).float()
    found = run(layer, x, dy)
    for got, expected in zip(found, want.linear(x, layer.weight.detach(), dy, power_of_two=power_of_two), strict=True):
        assert got.dtype == torch.float32 and error(got, expected) < 1e-6


def test_any_leading_shape_bias_and_types():
    layer = layer_of(96, 48)
    x, dy = seeded(5, 3, 7, 96), seeded(5, 3, 7, 48, seed=3)
    y, dx, dw, db = run(layer, x, dy)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    assert {t.dtype for t in (y, dx, dw, db)} == {torch.bfloat16}
    flat = run(layer, x.flatten(0, 2), dy.flatten(0, 2))
    assert torch.equal(y.flatten(0, 2), flat[0]) and torch.equal(dw, flat[2])
    one = layer(x[0, 0, 0])
    assert one.shape == (48,) and torch.equal(one, y[0, 0, 0])
    assert error(db, dy.double().sum((0, 1, 2))) < 4e-3
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


def test_no_tokens_at_all():
    layer = layer_of(96, 48)
    y, dx, dw, db = run(layer, torch.empty(0, 96, dtype=torch.bfloat16), torch.empty(0, 48, dtype=torch.bfloat16))
    assert y.shape == (0, 48) and dx.shape == (0, 96) and not dw.any() and not db.any()


def test_frozen_weights_and_inputs():
    layer = layer_of(96, 48)
    x, dy = seeded(4, 96), seeded(4, 48, seed=3)
    _, dx, dw, _ = run(layer, x, dy)
    layer.weight.requires_grad_(False)
    free = x.clone().requires_grad_()
    with kept_for_backward(layer) as kept:
        y = layer(free)
    assert not kept  # nothing but the weight is needed
    y.backward(dy)
    assert torch.equal(free.grad, dx) and layer.weight.grad is None
    layer.weight.requires_grad_(True)
    layer(x).backward(dy)
    assert torch.equal(layer.weight.grad, dw)


def test_errors_against_bfloat16_are_those_of_three_mantissa_bits():
    """Random data: an element of E4M3 is off by 2.7 % on average, a product of two rounded tensors by 3.8 %."""
    layer = layer_of(512, 384, bias=False)
    plain = nn.Linear(512, 384, bias=False, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    x, dy = seeded(640, 512), seeded(640, 384, seed=3)
    for got, expected in zip(run(layer, x, dy), run(plain, x, dy), strict=True):
        assert 0.02 < error(got, expected) < 0.05


def test_a_floor_would_lose_small_gradients():
    """Those of a large batch are about 1e-8: with the floor of 1e-4 they would be subnormal, or zero."""
    layer = layer_of(256, 256, bias=False)
    x, dy = seeded(128, 256), seeded(128, 256, seed=3)
    _, dx, dw = run(layer, x, dy)
    _, small_dx, small_dw = run(layer, x, dy * 2**-30)
    assert torch.equal(small_dx, dx * 2**-30) and torch.equal(small_dw, dw * 2**-30)


def test_gradcheck_of_the_fake_quantised_reference():
    """Straight-through: rounding errors are constants, so the reference's products are its own derivatives."""
    x, weight, dy = (seeded(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(6, 9), (5, 9), (6, 5)]))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    dx, dw = want.rounded(x.detach()) - x.detach(), want.rounded_weight(weight.detach()) - weight.detach()

    def f(x, weight):
        return want.straight_through(x, dx) @ want.straight_through(weight, dw).mT

    assert gradcheck(f, (x, weight))
    # And these derivatives are the layer's, but for the roundings of its own that weight gradients have.
    y, want_dx, want_dw = want.linear(x.detach(), weight.detach(), dy)
    assert torch.allclose(f(x, weight), y)
    found_dx, found_dw = torch.autograd.grad(f(x, weight), (x, weight), want.rounded(dy, gradient=True))
    assert torch.allclose(found_dx, want_dx)
    assert error(found_dw, want_dw) < 0.06


# ---- what is kept --------------------------------------------------------------------------------------


def test_the_input_is_kept_once_in_fp8():
    layer = layer_of(512, 256, bias=False)
    x = seeded(256, 512).requires_grad_()
    with kept_for_backward(layer) as kept:
        layer(x)
    assert sum(kept.values()) == 256 * 512 * (1 + 4 / 128)  # a byte a value and a float32 a tile; bfloat16: 2 bytes


def test_layers_with_one_input_share_what_they_keep():
    context = Fp8Context()
    layers = nn.ModuleList(layer_of(512, n, bias=False, context=context) for n in (128, 256, 64))
    x, dys = seeded(256, 512), [seeded(256, n, seed=n) for n in (128, 256, 64)]
    alone = [run(layer_of(512, n, bias=False), x, dy) for n, dy in zip((128, 256, 64), dys, strict=True)]
    shared = x.clone().requires_grad_()
    with kept_for_backward(layers) as kept:
        ys = [layer(shared) for layer in layers]
    assert sum(kept.values()) == 256 * 512 * (1 + 4 / 128)
    torch.autograd.backward(ys, dys)
    for layer, y, (want_y, _, want_dw) in zip(layers, ys, alone, strict=True):
        assert torch.equal(y, want_y) and torch.equal(layer.weight.grad, want_dw)


def test_a_changed_input_is_quantised_again():
    context = Fp8Context()
    first, second = (layer_of(64, 32, bias=False, context=context) for _ in range(2))
    x = seeded(8, 64)
    y = first(x)
    assert torch.equal(second(x), y)
    x.mul_(3)
    assert torch.equal(second(x), layer_of(64, 32, bias=False)(x)) and not torch.equal(second(x), y)


def test_checkpointing_gives_the_same():
    layers = nn.Sequential(layer_of(64, 96), nn.SiLU(), layer_of(96, 32))
    x, dy = seeded(130, 64), seeded(130, 32, seed=3)
    plain = run(layers, x, dy)
    again = x.clone().requires_grad_()
    y = checkpoint(layers, again, use_reentrant=False)
    y.backward(dy)
    found = [y.detach(), again.grad, *(p.grad for p in layers.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


# ---- quantised weights ---------------------------------------------------------------------------------


@pytest.fixture
def quantised(monkeypatch):
    """How often a weight was quantised."""
    calls = []
    real = reference.quantize_weight
    monkeypatch.setattr(reference, "quantize_weight", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


WAYS = ["data, said", "no_grad", "data", "parameter", "state", "optimizer", "fused optimizer"]


def change(layer: Fp8Linear, way: str) -> None:
    """In one of the ways in which programs change weights."""
    new = layer.weight.detach() * 0.5
    if way == "data, said":
        layer.weight.data.copy_(new)
        weights_changed()
    elif way == "no_grad":
        with torch.no_grad():
            layer.weight.mul_(0.5)
    elif way == "data":
        layer.weight.data = new
    elif way == "parameter":
        layer.weight = nn.Parameter(new)
    elif way == "state":
        layer.load_state_dict({"weight": new})
    else:
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.AdamW([layer.weight], lr=0.1, fused=way == "fused optimizer").step()  # fused: uncounted


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_quantised_once_until_they_change(way, quantised):
    layer = layer_of(64, 32, torch.float32, bias=False)
    x, dy = seeded(8, 64, dtype=torch.float32), seeded(8, 32, seed=3, dtype=torch.float32)
    before = layer(x).detach()
    for _ in range(3):
        run(layer, x, dy)
        with torch.inference_mode():
            layer(x)
    assert len(quantised) == 1
    change(layer, way)
    for _ in range(2):
        found = run(layer, x, dy)
    assert len(quantised) == 2 and not torch.equal(found[0], before)
    fresh = layer_of(64, 32, torch.float32, bias=False)
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found, run(fresh, x, dy), strict=True))


def test_first_quantised_while_sampling_they_serve_training(quantised):
    layer = layer_of(64, 32)
    with torch.inference_mode():
        layer(seeded(2, 64))
    run(layer, seeded(8, 64), seeded(8, 32, seed=3))
    assert len(quantised) == 1


def test_a_change_between_forward_and_backward_is_an_error():
    layer = layer_of(64, 32)
    y = layer(seeded(2, 64))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_of_quantised_weights_stays_in_place():
    """CUDA graphs read from there."""
    layer = layer_of(64, 32)
    layer.quantize_weights()
    copy_ = layer.quantized._copy
    with torch.no_grad():
        layer.weight.mul_(-1)
    layer.quantize_weights()
    assert layer.quantized._copy is copy_
    assert torch.equal(copy_.dequantize(), want.rounded_weight(layer.weight.detach()).float())


def test_without_keeping_them_results_are_the_same(quantised):
    kept, fresh = layer_of(64, 32), layer_of(64, 32, context=Fp8Context(keep_weights=False))
    x, dy = seeded(8, 64), seeded(8, 32, seed=3)
    pairs = zip(run(kept, x, dy), run(fresh, x, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and len(quantised) == 1 + 2


def test_a_copied_layer_goes_its_own_way():
    layer = layer_of(64, 32)
    x = seeded(8, 64)
    y = layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    layer(x)
    assert torch.equal(other(x), y) and other.context is not layer.context


def test_weights_are_rounded_as_their_bfloat16_export_is():
    layer = layer_of(64, 32, torch.float32, bias=False)
    with torch.no_grad():
        layer.weight.mul_(1 + 1e-3 * torch.rand(layer.weight.shape))
    export = layer_of(64, 32, bias=False)
    export.load_state_dict(layer.state_dict())
    x = seeded(8, 64)
    assert torch.equal(layer(x.float()).bfloat16(), export(x))
    assert torch.equal(multiplied_weight(layer).bfloat16(), multiplied_weight(export))
    direct = layer_of(64, 32, torch.float32, bias=False, context=Fp8Context(weight_rounding=None))
    direct.load_state_dict(layer.state_dict())
    assert not torch.equal(direct(x.float()).bfloat16(), export(x))


def test_weight_gradients_are_summed_in_float32_where_there_are_masters():
    layer = layer_of(64, 32, bias=False)
    master = layer.weight.detach().float()
    x, dy = seeded(130, 64), seeded(130, 32, seed=3)
    layer.weight.master = master
    for _ in range(3):
        layer(x).backward(dy)
    assert layer.weight.grad is None and master.grad.dtype == torch.float32
    _, _, exact = want.linear(x, layer.weight.detach(), dy)
    assert error(master.grad, 3 * exact) < 1e-6


def test_parts_are_multiplied_as_the_layer_does():
    layer, plain = layer_of(64, 32, torch.float32, bias=False), nn.Linear(64, 32)
    x = seeded(8, 64, dtype=torch.float32)
    assert error(multiplied_input(layer, x) @ multiplied_weight(layer).mT, layer(x)) < 1e-6
    assert multiplied_input(plain, x) is x and multiplied_weight(plain) is plain.weight


def test_a_split_of_the_tokens_at_tiles_changes_only_the_order_of_sums():
    """Elsewhere, weight gradients are those of other tiles; outputs and input gradients never differ."""
    layer = layer_of(96, 64, torch.float32, bias=False)
    x, dy = seeded(384, 96, dtype=torch.float32), seeded(384, 64, seed=3, dtype=torch.float32)
    y, dx, dw = run(layer, x, dy)
    for cut, bound in ((128, 1e-6), (256, 1e-6), (100, 0.05)):
        parts = [run(layer, x[rows], dy[rows]) for rows in (slice(cut), slice(cut, None))]
        assert error(torch.cat([p[0] for p in parts]), y) < 1e-6
        assert error(torch.cat([p[1] for p in parts]), dx) < 1e-6
        difference = error(parts[0][2] + parts[1][2], dw)
        assert difference < bound and (cut % 128 == 0 or difference > 1e-3)


def test_nan_stays_visible():
    layer = layer_of(256, 32, bias=False)
    x = seeded(4, 256)
    x[1, 3] = float("inf")
    y = layer(x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
