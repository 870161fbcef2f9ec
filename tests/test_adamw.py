"""AdamW with float32 moments is torch's, bit for bit; with bfloat16 ones it is that up to rounding of the moments."""

from __future__ import annotations

import pytest
import torch

from rl.policy.adamw import AdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((7, 5), (3,), (2, 3, 4))]


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Gradients of steps first to last, over several orders of magnitude; the second parameter has none at times."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
            grad = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn(1, generator=generator)
            parameter.grad = None if i == 1 and step % 3 == 0 else grad
        optimizer.step()


def test_float32_moments_are_torchs_bit_for_bit():
    ours, theirs = parameters(), parameters()
    mine, reference = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, foreach=False, fused=False)
    for optimizer in (mine, reference):
        steps(optimizer, 0, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[a][name], reference.state[b][name])


def test_bfloat16_moments_differ_by_their_rounding():
    """The error of a moment is at most 2^-9 of each earlier value, and decays with it: 2^-9 / (1 - β) of its size."""
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, **SETTINGS, moments=torch.bfloat16)
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for optimizer in (mine, reference):
        steps(optimizer, 0, 20)
    for a, b in zip(ours, theirs, strict=True):
        state = mine.state[a]
        assert {state[n].dtype for n in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16} and a.dtype == torch.float32
        second, exact = state["exp_avg_sq"].float(), reference.state[b]["exp_avg_sq"]
        assert not torch.equal(second, exact)
        assert ((second - exact).abs() <= 2**-9 / (1 - 0.95) * exact * 1.01).all()
        assert not torch.equal(a, b)
    start = torch.cat([p.detach().flatten() for p in parameters()])
    found, exact = (torch.cat([p.detach().flatten() for p in group]) - start for group in (ours, theirs))
    assert float((found - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_resumed_it_goes_on_as_if_it_had_not_stopped(moments):
    whole, halves = parameters(), parameters()
    steps(AdamW(whole, **SETTINGS, moments=moments), 0, 10)
    first = AdamW(halves, **SETTINGS, moments=moments)
    steps(first, 0, 5)
    second = AdamW(halves, **SETTINGS, moments=moments)
    second.load_state_dict(first.state_dict())
    assert all(state["exp_avg"].dtype == moments for state in second.state.values())
    steps(second, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
