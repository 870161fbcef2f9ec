"""Divergences in chunks: values, gradients and what is told along with them, against full distributions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rl.objective.divergence import divergence, slope, token_divergence
from rl.policy.logprobs import Head
from rl.policy.vocabulary import check_rows, restricted, shared_vocabulary
from rl.recipe_io import RecipeError

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
HEADS = {
    "plain": {},
    "bias and scale": {"bias": True, "scale": 0.4},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


def full_logits(hidden, weight, bias, scale=1.0, softcap=None):
    logits = scale * (hidden @ weight.t() + (0 if bias is None else bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def naive(z, u, kind, beta):
    """Straight from the definitions, on probabilities: p the student, q the teacher."""
    p, q = z.softmax(-1), u.softmax(-1)
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if kind == "forward":
        return kl(q, p)
    if kind == "reverse":
        return kl(p, q)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def made(shape, seed, dtype, size=1.0):
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("kind,beta", KINDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_full_distributions(kind, beta, head, temperature, dtype, monkeypatch):
    """Values, entropies, agreement and all gradients, whatever the chunk and its pieces; another width for each."""
    options = dict(HEADS[head])
    biased = options.pop("bias", False)
    hidden, weight = made((11, 16), 1, dtype), made((37, 16), 2, dtype, 0.5)
    bias = made((37,), 3, dtype) if biased else None
    taught, teacher_head = made((11, 24), 4, dtype), Head(made((37, 24), 5, dtype, 0.4), made((37,), 6, dtype), 0.8)
    upstream = made((11,), 7, torch.float32)
    leaves = [x for x in (hidden, weight, bias) if x is not None]

    exact = [x.double().requires_grad_() for x in leaves]
    z = full_logits(exact[0], exact[1], exact[2] if biased else None, **options) / temperature
    u = full_logits(taught.double(), teacher_head.weight.double(), teacher_head.bias.double(), 0.8) / temperature
    want = naive(z, u, kind, beta)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    gradients = torch.autograd.grad((want * upstream).sum(), exact)

    tolerance = 0.05 if dtype == torch.bfloat16 else 2e-5
    for chunk, piece in ((1, 64), (3, 2), (7, 4), (1024, 64)):
        monkeypatch.setattr("rl.policy.logprobs.PIECE_ON_CPU", piece)
        for x in leaves:
            x.requires_grad_().grad = None
        found = token_divergence(
            hidden, Head(weight, bias, **options), taught, teacher_head,
            kind=kind, beta=beta, temperature=temperature, chunk=chunk,
        )  # fmt: skip
        assert found.value.dtype == torch.float32 and not found.entropy.requires_grad
        assert (found.value - want).abs().max() < tolerance * max(1.0, float(want.detach().abs().max()))
        assert (found.entropy - entropy).abs().max() < tolerance
        if dtype != torch.bfloat16:  # where rounding may swap the two likeliest
            assert torch.equal(found.agrees, z.argmax(-1) == u.argmax(-1))
        (found.value * upstream).sum().backward()
        for x, gradient in zip(leaves, gradients, strict=True):
            assert x.grad.dtype == x.dtype
            assert (x.grad - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize("kind,beta", KINDS)
def test_slope_is_the_gradient_of_the_divergence(kind, beta):
    """By finite differences in float64, of the functions that the chunks are made of."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, logq):
            ctx.save_for_backward(z.log_softmax(-1), logq)
            return divergence(z.log_softmax(-1), logq, kind, beta)

        @staticmethod
        def backward(ctx, grad):
            return grad[:, None] * slope(*ctx.saved_tensors, kind, beta), None

    z = made((4, 9), 1, torch.float64, 2.0).requires_grad_()
    logq = made((4, 9), 2, torch.float64, 2.0).log_softmax(-1)
    assert torch.autograd.gradcheck(Through.apply, (z, logq))


def test_limits_of_jsd():
    """Near 0 beta times the forward KL, near 1 (1 - beta) times the reverse; symmetric at a half; at most log 2."""
    logp = made((5, 13), 1, torch.float64, 2.0).log_softmax(-1)
    logq = made((5, 13), 2, torch.float64, 2.0).log_softmax(-1)
    small = 1e-7
    assert torch.allclose(divergence(logp, logq, "jsd", small) / small, divergence(logp, logq, "forward", 0), rtol=1e-4)
    close = divergence(logp, logq, "jsd", 1 - small) / small
    assert torch.allclose(close, divergence(logp, logq, "reverse", 0), rtol=1e-4)
    half = divergence(logp, logq, "jsd", 0.5)
    assert torch.allclose(half, divergence(logq, logp, "jsd", 0.5)) and float(half.max()) < math.log(2)


@pytest.mark.parametrize("kind,beta", KINDS)
def test_equal_extreme_and_no_distributions(kind, beta):
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    hidden = torch.ones(2, 1, requires_grad=True)
    same = token_divergence(hidden, Head(weight), torch.ones(2, 1), Head(weight.detach()), kind=kind, beta=beta)
    assert same.value.tolist() == pytest.approx([0.0, 0.0], abs=1e-7) and same.agrees.all()
    apart = token_divergence(hidden, Head(weight), -torch.ones(2, 1), Head(weight.detach()), kind=kind, beta=beta)
    assert apart.value[0] > 0.3 and not apart.agrees.any()
    (same.value + apart.value).sum().backward()
    assert all(torch.isfinite(x).all() for x in (apart.value, weight.grad, hidden.grad))
    nothing = torch.zeros(0, 1)
    found = token_divergence(nothing, Head(weight), nothing, Head(weight.detach()), kind=kind, beta=beta)
    assert found.value.shape == found.entropy.shape == found.agrees.shape == (0,)


# ---- vocabularies ------------------------------------------------------------------------------------


class Vocabulary(dict):
    def get_vocab(self):
        return dict(self)


def test_vocabularies_must_map_the_same_strings_to_the_same_ids():
    mine = Vocabulary({"a": 0, "b": 1, "<s>": 2, "<box>": 4})
    assert shared_vocabulary(mine, Vocabulary(reversed(mine.items()))) == 5
    theirs = Vocabulary({"a": 0, "b": 1, "<s>": 2, "<think>": 4, "</think>": 5})
    with pytest.raises(RecipeError) as error:
        shared_vocabulary(mine, theirs)
    for part in ("2 of 5 ids", "4 tokens", "the teacher 5", "4: '<box>' and '<think>'", "5: nothing and '</think>'"):
        assert part in str(error.value)
    swapped = Vocabulary({f"t{i}": 9 - i for i in range(10)})
    with pytest.raises(RecipeError, match="10 of 10 ids") as error:
        shared_vocabulary(Vocabulary({f"t{i}": i for i in range(10)}), swapped)
    assert "'t2'" in str(error.value) and "'t3' and" not in str(error.value)  # only the first three


def test_padding_rows_are_left_out_on_both_sides():
    """Embeddings of 30 and 34 rows for a tokenizer of 27 ids: as if both models had 27."""
    hidden, taught = made((5, 8), 1, torch.float32), made((5, 6), 2, torch.float32)
    weight, bias = made((30, 8), 3, torch.float32).requires_grad_(), made((30,), 4, torch.float32).requires_grad_()
    teacher = Head(made((34, 6), 5, torch.float32))
    found = token_divergence(hidden, restricted(Head(weight, bias), 27), taught, restricted(teacher, 27))
    z, u = (hidden @ weight.t() + bias)[:, :27], (taught @ teacher.weight.t())[:, :27]
    assert torch.allclose(found.value, naive(z.double(), u.double(), "reverse", 0).float(), atol=1e-5)
    found.value.sum().backward()
    assert weight.grad.shape == weight.shape and weight.grad[:27].abs().sum() > 0
    assert not weight.grad[27:].any() and not bias.grad[27:].any()
    with pytest.raises(ValueError, match="30 and 34 tokens"):
        token_divergence(hidden, Head(weight), taught, teacher)
    check_rows(teacher, 34, "teacher")
    with pytest.raises(RecipeError, match="teacher: the model knows 34 ids, its tokenizer 35"):
        check_rows(teacher, 35, "teacher")
