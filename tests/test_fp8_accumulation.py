"""Why sums are promoted to float32 every 128 of K (V3 report, section 3.5.2), on an emulated tensor core.

The emulation is the mildest reading of "retaining around 14 bits": one instruction adds 32 exact products to its sum,
and the sum is cut to 14 bits. Cutting every single product would make the error larger still.
"""

from __future__ import annotations

import torch

from model.fp8 import Quantized, quantize_activation

BITS = 14
INSTRUCTION = 32  # of K


def cut(x: torch.Tensor) -> torch.Tensor:
    """x with BITS bits, cut towards zero."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2.0**BITS) / 2.0**BITS, exponent)


def tensor_core(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T [M, N] with a sum of BITS bits."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], INSTRUCTION):
        part = slice(k, k + INSTRUCTION)
        total = cut(total + a[:, part] @ b[:, part].mT)
    return total


def relative_errors(k: int) -> tuple[float, float]:
    """The largest of a sum of BITS bits all through, and of one that is promoted every 128. Positive numbers, so that
    no sum is small by chance; all of one scale, so that it need not be applied in between."""
    generator = torch.Generator().manual_seed(0)
    a, b = (quantize_activation(torch.rand(16, k, generator=generator), power_of_two=True) for _ in range(2))
    x, y = scaled(a), scaled(b)
    exact = x @ y.mT
    promoted = torch.zeros(16, 16)
    for tile in range(0, k, 128):
        part = slice(tile, tile + 128)
        promoted += tensor_core(x[:, part], y[:, part]).float()
    found = tensor_core(x, y), promoted.double()
    return tuple(float(((total - exact) / exact).abs().max()) for total in found)


def scaled(q: Quantized) -> torch.Tensor:
    assert len(q.scales.unique()) == 1
    return q.dequantize(torch.float64)


def test_at_4096_only_promoted_sums_stay_exact():
    plain, promoted = zip(*map(relative_errors, (256, 1024, 4096)), strict=True)
    print([f"{p:.2%} {q:.3%}" for p, q in zip(plain, promoted, strict=True)])
    assert plain[1] > 2 * plain[0] and plain[2] > 2 * plain[1]  # grows with K
    assert plain[2] > 2e-3  # one-sided: it does not average out
    assert max(promoted) < 2 * promoted[0] and promoted[2] < plain[2] / 10
