"""rl.policy: packed log-probabilities, entropies and gradients against separate plain forwards."""

from __future__ import annotations

import random
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, documents, plain_logprobs, tiny_model, token_lists

from rl.policy.attention import PackedLayout, Segment
from rl.policy.load import load_model, load_tokenizer
from rl.policy.packing import Document, Pack, pack
from rl.policy.policy import Policy
from rl.recipe_model import ModelSpec, ScratchModel

BUDGETS = (60, 10_000)  # several packs, among them over-long documents' own; and all in one


def targets(document: Document) -> list[int]:
    """Offsets of the completion tokens in the loss."""
    mask = document.mask or [True] * len(document.completion_ids)
    return [t for t, kept in enumerate(mask) if kept]


def predictions(packs: list[Pack]) -> list[tuple[int, int]]:
    """(document, offset) of every prediction."""
    return [pair for p in packs for pair in zip(p.sequence_P.tolist(), p.offset_P.tolist(), strict=True)]


def weight_of(document: int, offset: int) -> float:
    """Some number of a token, to weigh its log-probability by."""
    return random.Random(f"{document}:{offset}").uniform(-1, 1)


# ---- values and gradients, all architectures ---------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_packed_equals_separate_forwards(family):
    """Log-probabilities, entropies and the gradient of every parameter, with prompts shared and not."""
    model = tiny_model(family)
    policy = Policy(model, temperature=0.8, logits_chunk=7)
    assert policy.packed == (family != "gpt2")
    docs = documents()
    expected = [plain_logprobs(model, d, 0.8) for d in docs]
    loss = sum(weight_of(d, t) * expected[d][0][t] for d in range(len(docs)) for t in targets(docs[d]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    total = torch.stack([g.norm() for g in wanted if g is not None]).norm()

    for share in (True, False):
        for budget in BUDGETS:
            packs = policy.pack(docs, budget, share)
            assert sorted(predictions(packs)) == [(d, t) for d in range(len(docs)) for t in targets(docs[d])]
            model.zero_grad(set_to_none=True)
            for batch in packs:
                logp, entropy = policy.logprobs(batch)
                assert logp.dtype == entropy.dtype == torch.float32
                pairs = predictions([batch])
                want = torch.stack([expected[d][0][t] for d, t in pairs]).detach()
                want_entropy = torch.stack([expected[d][1][t] for d, t in pairs])
                assert (logp - want).abs().max() < 1e-4
                assert (entropy - want_entropy).abs().max() < 1e-4
                assert not entropy.requires_grad
                (logp * torch.tensor([weight_of(d, t) for d, t in pairs])).sum().backward()
            for name, parameter, want in zip(names, parameters, wanted, strict=True):
                assert (parameter.grad is None) == (want is None), name
                if want is not None:
                    assert want.abs().max() > 0, name
                    assert (parameter.grad - want).norm() < 1e-4 * (want.norm() + 0.01 * total), name


def assert_packs(policy: Policy, docs: list[Document], budget: int, share: bool) -> None:
    expected = [plain_logprobs(policy.model, d)[0] for d in docs]
    for batch in policy.pack(docs, budget, share):
        want = torch.stack([expected[d][t] for d, t in predictions([batch])])
        assert (policy.logprobs(batch)[0] - want).abs().max() < 1e-4, batch.segments


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_equals_separate_forwards_for_random_shapes(family):
    """Many small batches of few different lengths: all the ways in which segments get sorted and padded."""
    policy = Policy(tiny_model(family, layers=2))
    for seed in range(60):
        draw = random.Random(seed)
        prompts = token_lists([draw.randint(1, 5) for _ in range(3)], seed=seed)
        docs = []
        for _ in range(draw.randint(1, 6)):
            group = draw.randrange(3)
            docs.append(Document(prompts[group], token_lists([draw.randint(1, 6)], seed=draw.random())[0], group=group))
        assert_packs(policy, docs, draw.choice([12, 25, 1000]), draw.random() < 0.7)


@torch.no_grad()
def test_a_pack_whose_sorting_undoes_itself():
    """Prompt, completion, lone document, four tokens each: the last two change places to be computed. Doing
    that twice gives the old order, so order and inverse are equal, without being the identity."""
    prompt, lone, long = token_lists([4, 2, 5])
    docs = [
        Document(prompt, long, group=0),
        Document(prompt, [7], group=0),
        Document(lone, [9, 8, 7], group=1),
    ]
    assert_packs(Policy(tiny_model("llama")), docs, 1000, True)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3", "olmo3"])
def test_the_sliding_window_is_shorter_than_the_documents(family):
    """Guards the test above: a wider window gives other numbers, so a window that is ignored would show."""
    document = documents()[4]
    narrow, wide = (plain_logprobs(tiny_model(family, sliding_window=w), document)[0] for w in (5, 64))
    assert (narrow - wide).abs().max() > 0.01


def test_documents_in_a_pack_are_isolated():
    """Other neighbours, the same numbers; and no gradient reaches the neighbours' tokens."""
    model = tiny_model("llama")
    policy = Policy(model)
    first, *others = documents(masks=False)
    for neighbour in others[:2]:
        (batch,) = pack([first, Document([9, 8], [7, 6, 5]), neighbour], tokens_per_microbatch=1000)
        seen = []
        hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        logp, _ = policy.logprobs(batch)
        hook.remove()
        own = batch.sequence_P == 0
        assert torch.allclose(logp[own], plain_logprobs(model, first)[0], atol=1e-5)
        (gradient,) = torch.autograd.grad(logp[own].sum(), seen[0])
        reached = batch.input_ids[gradient[0].abs().sum(-1) > 0].tolist()
        assert reached == [*first.prompt_ids, *first.completion_ids[:-1]]


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    """`model.gradient_checkpointing: true` must take effect: each layer runs again in the backward pass."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        spec = ModelSpec(
            scratch=ScratchModel(hidden_size=32, intermediate_size=48, layers=2),
            dtype="float32",
            gradient_checkpointing=checkpointing,
        )
        model = load_model(spec, load_tokenizer(spec), dtype=torch.float32)
        calls: list[int] = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        policy = Policy(model)
        for batch in policy.pack(documents(), 10_000):
            policy.logprobs(batch)[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        runs.append(len(calls))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert runs == [1, 2]


# ---- pack --------------------------------------------------------------------------------------------


def test_pack_by_hand():
    """Two completions of one prompt, and a lone document: tokens, positions, predictors and targets."""
    docs = [
        Document([10, 11, 12], [20, 21, 22], group=0),
        Document([13], [30, 31], [False, True], group=1),
        Document([10, 11, 12], [23], group=0),
    ]
    (batch,) = pack(docs, tokens_per_microbatch=100)
    assert batch.documents == [0, 2, 1]
    # A completion's last token predicts nothing, so it is not computed.
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 13, 30]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.tokens == 7
    assert batch.predictor_P.tolist() == [2, 3, 4, 2, 6]
    assert batch.target_P.tolist() == [20, 21, 22, 23, 31]
    assert batch.sequence_P.tolist() == [0, 0, 0, 2, 1]
    assert batch.offset_P.tolist() == [0, 1, 2, 0, 1]
    values = [[1.0, 2.0, 3.0], torch.tensor([4.0, 5.0]), [6.0]]
    assert batch.gather(values).tolist() == [1.0, 2.0, 3.0, 6.0, 5.0]
    assert batch.gather(values).dtype == torch.float32

    apart = pack(docs, tokens_per_microbatch=100, share_prompts=False)
    assert [p.input_ids.tolist() for p in apart] == [[10, 11, 12, 20, 21, 10, 11, 12, 13, 30]]
    padded = pack(docs, tokens_per_microbatch=100, padded=True)
    assert [p.documents for p in padded] == [[0], [1], [2]]
    assert [len(p.segments) for p in padded] == [1, 1, 1]


def test_documents_without_a_group_share_nothing():
    docs = [Document([5, 6], [7, 8]), Document([9, 4], [3, 2])]
    (batch,) = pack(docs, tokens_per_microbatch=100)
    assert batch.input_ids.tolist() == [5, 6, 7, 9, 4, 3]


@st.composite
def batches(draw):
    groups = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    members = draw(st.lists(st.tuples(st.integers(0, len(groups) - 1), st.integers(1, 40)), min_size=1, max_size=20))
    prompts = token_lists(groups)
    return [Document(prompts[g], [3 + i] * n, None, group=g) for i, (g, n) in enumerate(members)]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(batches(), st.integers(1, 150), st.booleans())
def test_pack_covers_every_document_once_within_the_budget(docs, budget, share):
    packs = pack(docs, tokens_per_microbatch=budget, share_prompts=share)
    counted = Counter(d for p in packs for d in p.documents)
    assert counted == Counter(range(len(docs)))
    everything = [(d, t) for d in range(len(docs)) for t in range(len(docs[d].completion_ids))]
    assert sorted(predictions(packs)) == everything
    for batch in packs:
        assert len(batch.input_ids) == len(batch.position_ids) == batch.tokens
        assert batch.tokens <= budget or len(batch.documents) == 1
        for d, t, target in zip(
            batch.sequence_P.tolist(), batch.offset_P.tolist(), batch.target_P.tolist(), strict=True
        ):
            assert target == docs[d].completion_ids[t]
        # The token that predicts offset t of a completion stands at position prompt + t - 1.
        positions = batch.position_ids[batch.predictor_P].tolist()
        want = [len(docs[d].prompt_ids) + t - 1 for d, t in predictions([batch])]
        assert positions == want
        values = [[100.0 * d + t for t in range(len(doc.completion_ids))] for d, doc in enumerate(docs)]
        assert batch.gather(values).tolist() == [100.0 * d + t for d, t in predictions([batch])]
    again = pack(docs, tokens_per_microbatch=budget, share_prompts=share)
    for a, b in zip(packs, again, strict=True):
        assert a.documents == b.documents and a.segments == b.segments
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.predictor_P, b.predictor_P)


def test_sharing_saves_the_prompt_and_packing_fills_the_budget():
    prompt = token_lists([50])[0]
    docs = [Document(prompt, [7] * 10, group=0) for _ in range(8)]
    (shared,) = pack(docs, tokens_per_microbatch=1000)
    assert shared.tokens == 50 + 8 * 9
    (apart,) = pack(docs, tokens_per_microbatch=1000, share_prompts=False)
    assert apart.tokens == 8 * 59
    assert len(pack(docs, tokens_per_microbatch=90)) == 2  # 50 + 4 x 10 each
    assert len(pack(docs, tokens_per_microbatch=120, share_prompts=False)) == 4


def test_a_pack_with_nothing_in_the_loss():
    model = tiny_model("llama")
    docs = [Document([5, 6], [7, 8], [False, False]), Document([5], [3], [False])]
    (batch,) = pack(docs, tokens_per_microbatch=100)
    logp, entropy = Policy(model).logprobs(batch)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


# ---- the check at start ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_check_packing_is_silent_when_all_is_well(family):
    policy = Policy(tiny_model(family), temperature=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.check_packing() < 1e-4
    assert policy.packed == (family != "gpt2")


def leaky(model):
    """A model whose tokens see the mean of all before them in the row: causal, but not isolated."""

    def mix_in(module, args, out):
        steps = torch.arange(1, out.shape[1] + 1)[:, None]
        return out + out.cumsum(1) / steps

    model.model.embed_tokens.register_forward_hook(mix_in)
    return model


def test_check_packing_falls_back_for_a_model_that_leaks():
    policy = Policy(leaky(tiny_model("llama")))
    with pytest.warns(UserWarning, match="packed llama differs from separate forwards by .* falling back"):
        difference = policy.check_packing()
    assert difference < 1e-4
    assert not policy.packed
    docs = documents()
    packs = policy.pack(docs, 10_000)
    assert [p.documents for p in packs] == [[d] for d in range(len(docs))]
    for batch in packs:
        if len(batch.target_P):
            want = plain_logprobs(policy.model, docs[batch.documents[0]])[0][batch.offset_P]
            assert torch.allclose(policy.logprobs(batch)[0], want, atol=1e-4)
    (several,) = pack(docs, tokens_per_microbatch=10_000)
    with pytest.raises(ValueError, match="cannot be packed"):
        policy.logprobs(several)


def test_check_packing_refuses_a_head_that_it_does_not_understand():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.3)
    policy = Policy(model)
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.raises(ValueError, match="head is not understood"),
    ):
        policy.check_packing()


def test_check_packing_notices_a_wrong_layout(monkeypatch):
    """Segments that run into each other, as a bug in packing would make them."""
    policy = Policy(tiny_model("llama"))
    monkeypatch.setattr(Pack, "layout", lambda batch: PackedLayout([Segment(0, batch.tokens)]))
    with pytest.warns(UserWarning, match="falling back"):
        policy.check_packing()
    assert not policy.packed
