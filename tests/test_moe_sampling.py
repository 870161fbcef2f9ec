"""The latent cache and speculative decoding of our mixture of experts in `LocalSampler`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy import stats
from tiny_models import endless, plain_logprobs, processed, tiny_model, token_lists, tokenizer
from tiny_moe import model_of

from rl.policy.attention import PackedLayout, Segment, packed_attention
from rl.policy.packing import Document
from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.slots import DecodeLayout, Slots
from rl.rollout.speculative import acceptance_rates, verify

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def sampler_of(model, **options) -> LocalSampler:
    return LocalSampler(endless(model).eval(), tokenizer(eos=None), **options)


def greedy_by_hand(model, prompt: list[int], count: int) -> list[int]:
    """By the model's own whole forward, once a token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"rope_parameters": YARN, "max_position_embeddings": 256}], ids=str
)
def test_absorbed_decoding_equals_the_expanded_form(changes):
    """Logits of the last token after a cache of latents, against one whole forward, within 1e-5 of their size."""
    model = model_of(**changes).eval()
    lengths, width = [5, 40, 17], 2
    sequences = [torch.tensor(ids) for ids in token_lists([n + width for n in lengths], vocabulary=512)]
    segments = [Segment(sum(lengths[:i]), n) for i, n in enumerate(lengths)]
    recorded, slots = {}, Slots(3, 64)
    with torch.no_grad():
        expected = torch.stack([model(ids[None], use_cache=False).logits[0, -width:] for ids in sequences])
        with packed_attention(model):
            ids = torch.cat([s[:n] for s, n in zip(sequences, lengths, strict=True)])
            positions = torch.cat([torch.arange(n) for n in lengths])
            model(ids[None], position_ids=positions[None], layout=PackedLayout(segments, recorded), use_cache=False)
            for row, segment in enumerate(segments):
                slots.fill([row], recorded, segment.start, segment.length)
            layout = DecodeLayout(slots, torch.tensor(lengths), 64, width)
            new = torch.cat([s[-width:] for s in sequences])
            got = model(
                new[None], position_ids=layout.positions_BW.reshape(1, -1), layout=layout, use_cache=False
            ).logits[0]
    assert float((got - expected.flatten(0, 1)).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_the_cache_holds_latents_only():
    model = model_of(num_nextn_predict_layers=1)
    sampler = sampler_of(model, draft_tokens=1)
    seen = {}
    buffers = sampler._buffers
    sampler._buffers = lambda *a: seen.setdefault("slots", buffers(*a))
    sampler.generate(token_lists([6, 9], vocabulary=512), SamplingParams(n=2, max_tokens=3, seed=0))
    slots, config = seen["slots"][0], model.config
    assert sorted(slots.layers) == list(range(config.num_hidden_layers + 1))
    values = config.kv_lora_rank + config.qk_rope_head_dim
    assert config.latent_values_per_token == values
    for tensors in slots.layers.values():
        assert [(t.shape[1], t.shape[3], t.dtype) for t in tensors] == [(1, values, torch.float32)]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_greedy_equals_whole_forwards_and_logprobs_are_right(drafts):
    model = model_of(num_nextn_predict_layers=1)
    sampler = sampler_of(model, max_slots=3, draft_tokens=drafts)
    prompts = token_lists([3, 11, 1, 7, 20], vocabulary=512)
    samples = sampler.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        assert sample.token_ids == greedy_by_hand(model, prompt, 12)
        expected, _ = plain_logprobs(model, Document(prompt, sample.token_ids))
        assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)


def copying_model():
    """Its module often guesses right: it reads the state of a model without layers to speak of."""
    model = model_of(num_nextn_predict_layers=1)
    with torch.no_grad():
        for layer in model.model.layers[: model.config.num_hidden_layers]:
            layer.self_attn.o_proj.weight.mul_(0.2)
    return model


def test_speculation_changes_no_greedy_token_of_200_prompts():
    model = copying_model()
    prompts = token_lists([1 + i % 13 for i in range(200)], vocabulary=512)
    params = SamplingParams(temperature=0, max_tokens=16, stop_token_ids=(7, 99, 300))
    plain = sampler_of(model).generate(prompts, params)
    for drafts in (1, 2):
        sampler = sampler_of(model, draft_tokens=drafts)
        found = sampler.generate(prompts, params)
        assert [s[0].token_ids for s in found] == [s[0].token_ids for s in plain]
        assert [s[0].finish_reason for s in found] == [s[0].finish_reason for s in plain]
        assert len({s[0].finish_reason for s in plain}) == 2
        rates = acceptance_rates(sampler.acceptance.sums())
        assert 0 < rates["accepted/1"] < 1  # both branches were taken
        assert rates["tokens_per_step"] == pytest.approx(1 + sum(v for k, v in rates.items() if "accepted" in k))


@pytest.mark.parametrize("narrowing", [{}, {"temperature": 3.0, "top_k": 6, "top_p": 0.9}], ids=str)
def test_speculation_leaves_the_distribution_as_it_is(narrowing):
    """Chi-square of the first three tokens after a prompt against plain sampling's exact probabilities."""
    model = model_of(vocab_size=8, num_nextn_predict_layers=1, initializer_range=0.3)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **narrowing}
    prompt, count = [3, 1, 5], 3000
    sampler = sampler_of(model, max_slots=256, draft_tokens=2)
    samples = sampler.generate([prompt], SamplingParams(n=count, max_tokens=3, seed=1, **options))[0]
    exact = exact_distribution(model, prompt, 3, options)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    seen = Counter(tuple(s.token_ids) for s in samples)
    assert set(seen) <= set(exact)
    likely = [ids for ids, p in exact.items() if p * count >= 5]
    expected = [exact[ids] * count for ids in likely]
    found = [seen[ids] for ids in likely]
    assert len(likely) > 10
    found[0] += count - sum(found)  # the rare ones join the first
    expected[0] += count - sum(expected)
    assert stats.chisquare(found, expected).pvalue > 1e-3
    assert 0.05 < acceptance_rates(sampler.acceptance.sums())["accepted/1"] < 1
    sample = max(samples, key=lambda s: s.logprobs[1])
    assert sum(sample.logprobs) == pytest.approx(torch.tensor(exact[tuple(sample.token_ids)]).log().item(), abs=1e-3)


def exact_distribution(model, prompt, count, options) -> dict[tuple[int, ...], float]:
    """Probability of every continuation, by whole forwards."""
    found = {(): 1.0}
    for _ in range(count):
        longer = {}
        for ids, probability in found.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1]
            for token, p in enumerate(processed(logits, **options).tolist()):
                if p > 0:
                    longer[*ids, token] = probability * p
        found = longer
    return found


def test_samples_do_not_depend_on_their_neighbours_with_drafts():
    model = copying_model()
    prompts = token_lists([4, 9, 2, 6], vocabulary=512)
    params = SamplingParams(n=3, max_tokens=10, seed=5)
    together = sampler_of(model, draft_tokens=1).generate(prompts, params)
    alone = sampler_of(model, max_slots=1, draft_tokens=1).generate(prompts[2:3], params, streams=[2])
    assert [s.token_ids for s in alone[0]] == [s.token_ids for s in together[2]]


def test_min_tokens_hold_with_drafts():
    model = copying_model()
    stops = tuple(range(0, 512, 2))
    params = SamplingParams(n=8, max_tokens=12, min_tokens=5, seed=2, stop_token_ids=stops)
    samples = sampler_of(model, draft_tokens=2).generate(token_lists([4], vocabulary=512), params)[0]
    for sample in samples:
        assert not set(sample.token_ids[:5]) & set(stops)
    assert any(s.finish_reason == "stop" for s in samples)


def test_verify_keeps_drafts_by_table():
    """p = (.5, .3, .2): a draft from q is kept below p/q, else the token comes from max(p - q, 0)."""
    p = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 2, 3)
    q = torch.tensor([[[0.2, 0.6, 0.2]]])
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def run(draft, accept, uniform):
        numbers = torch.tensor([[uniform, uniform]], dtype=torch.float64)
        kept, token, logps = verify(p, torch.tensor([[draft]]), q, torch.tensor([[accept]]), numbers, **options)
        return int(kept), int(token), logps[0, : int(kept) + 1].exp().tolist()

    assert run(0, 0.99, 0.6) == (1, 1, pytest.approx([0.5, 0.3]))  # p > q: always kept; the next from p
    assert run(1, 0.49, 0.9) == (1, 2, pytest.approx([0.3, 0.2]))  # kept with probability 0.3 / 0.6
    assert run(1, 0.51, 0.99) == (0, 0, pytest.approx([0.5]))  # p - q is positive for token 0 alone
    assert run(2, 0.99, 0.0) == (1, 0, pytest.approx([0.2, 0.5]))


@pytest.mark.parametrize("drafts", [0, 2])
def test_routing_is_recorded_for_every_token_that_was_read(drafts):
    model = model_of(num_nextn_predict_layers=1)
    sampler = sampler_of(model, max_slots=2, draft_tokens=drafts, record_routing=True)
    prompts = token_lists([5, 2, 9], vocabulary=512)
    samples = sampler.generate(prompts, SamplingParams(n=2, max_tokens=7, seed=3, stop_token_ids=tuple(range(60))))
    layers = range(model.config.first_k_dense_replace, model.config.num_hidden_layers)
    for prompt, rows in zip(prompts, samples, strict=True):
        for sample in rows:
            ids = torch.tensor([[*prompt, *sample.token_ids[:-1]]])
            routing = model.model(ids, use_cache=False).routing
            expected = torch.stack([routing[layer] for layer in layers], 1)
            assert sample.routed_experts.shape == expected.shape
            assert torch.equal(torch.from_numpy(sample.routed_experts).long().sort(-1).values, expected.sort(-1).values)


def test_drafts_and_routing_are_refused_where_they_cannot_be_had():
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        sampler_of(model_of(), draft_tokens=1)
    with pytest.raises(ValueError, match="no multi-token prediction module"):
        LocalSampler(tiny_model("llama"), tokenizer(), draft_tokens=1)
    with pytest.raises(ValueError, match="which experts"):
        LocalSampler(tiny_model("qwen3_moe"), tokenizer(), record_routing=True)
