"""Token log-probabilities in chunks: values, entropies and gradients against full logits."""

from __future__ import annotations

import pytest
import torch

from rl.policy.logprobs import Head, token_logprobs

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 2.0},
    "bias and scale": {"bias": True, "scale": 0.4},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


def reference_logprobs(hidden, weight, bias, target, temperature, scale=1.0, softcap=None):
    """Full log_softmax in float64."""
    logits = scale * (hidden @ weight.t() + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    full = (logits / temperature).log_softmax(-1)
    return full.gather(-1, target[:, None])[:, 0], -(full.exp() * full).sum(-1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_logprobs_against_full_log_softmax(kind, temperature, dtype, monkeypatch):
    """Values, entropies and the gradients of hidden states, weight and bias, whatever the chunk and its pieces."""
    options = dict(HEADS[kind])
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = (0.5 * torch.randn(37, 16, generator=generator, dtype=torch.float64)).to(dtype)
    bias = torch.randn(37, generator=generator, dtype=torch.float64).to(dtype) if options.pop("bias", 0) else None
    target = torch.randint(37, (11,), generator=generator)
    upstream = torch.randn(11, generator=generator)
    leaves = [x for x in (hidden, weight, bias) if x is not None]

    exact = [x.double().requires_grad_() for x in leaves]
    want, want_entropy = reference_logprobs(
        exact[0], exact[1], exact[2] if bias is not None else None, target, temperature, **options
    )
    gradients = torch.autograd.grad((want * upstream).sum(), exact)

    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    row = 37 * hidden.element_size()
    for chunk, piece, kept in ((1, 64, 0), (3, 2, 7 * row), (7, 4, 2**20), (11, 1, 5 * row), (1024, 64, 2**20)):
        monkeypatch.setattr("rl.policy.logprobs.PIECE_ON_CPU", piece)
        monkeypatch.setattr("rl.policy.logprobs.KEPT_BYTES", kept)
        for x in leaves:
            x.requires_grad_().grad = None
        head = Head(weight, bias, **options)
        logp, entropy = token_logprobs(hidden, target, head, temperature=temperature, chunk=chunk)
        assert logp.dtype == torch.float32 and not entropy.requires_grad
        assert (logp - want).abs().max() < tolerance
        assert (entropy - want_entropy).abs().max() < tolerance
        loss = (logp * upstream).sum()
        torch.autograd.grad(loss, leaves, retain_graph=True)  # what was kept is used up by the first pass
        loss.backward()
        for x, gradient in zip(leaves, gradients, strict=True):
            assert x.grad.dtype == x.dtype
            assert (x.grad - gradient).norm() < tolerance * gradient.norm()


def test_token_logprobs_gradient_is_the_slope_of_the_values():
    """Central differences of the function itself, independent of any formula for the gradient."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 4, generator=generator).requires_grad_()
    weight = torch.randn(6, 4, generator=generator).requires_grad_()
    bias = torch.randn(6, generator=generator).requires_grad_()
    target, upstream = torch.tensor([0, 5, 2]), torch.tensor([1.0, -2.0, 0.5])

    def value() -> torch.Tensor:
        head = Head(weight, bias, scale=0.7, softcap=3.0)
        return (token_logprobs(hidden, target, head, temperature=0.9, chunk=2)[0] * upstream).sum()

    value().backward()
    step = 2e-2
    for x in (hidden, weight, bias):
        slopes = torch.zeros_like(x)
        for i in range(x.numel()):
            with torch.no_grad():
                kept = x.view(-1)[i].item()
                x.view(-1)[i] = kept + step
                above = value().item()
                x.view(-1)[i] = kept - step
                below = value().item()
                x.view(-1)[i] = kept
            slopes.view(-1)[i] = (above - below) / (2 * step)
        assert torch.allclose(x.grad, slopes, atol=2e-3)


def test_token_logprobs_of_extreme_logits_and_of_nothing():
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    hidden = torch.ones(2, 1, requires_grad=True)
    logp, entropy = token_logprobs(hidden, torch.tensor([0, 1]), Head(weight))
    assert logp.tolist() == [0.0, -2000.0]
    assert entropy.tolist() == [0.0, 0.0]
    logp.sum().backward()
    assert torch.isfinite(weight.grad).all() and torch.isfinite(hidden.grad).all()
    logp, entropy = token_logprobs(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), Head(weight))
    assert logp.shape == entropy.shape == (0,)
