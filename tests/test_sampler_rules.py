"""rl.rollout: random streams, ends of samples, parameters, new weights, and the way around through `generate`."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from sampler_cases import ENDLESS, RAGGED, assert_logprobs, flat, sampler_of, tokens
from tiny_models import EOS, tiny_model, token_lists, tokenizer

from rl.rollout import LocalSampler, SamplingParams

# ---- streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family,supported", [("llama", True), ("gemma3_text", True), ("llama", False)])
def test_a_sample_depends_only_on_its_stream(family, supported):
    """(seed, stream, index) gives the same tokens alone, in any order, among others, with any max_slots."""
    prompts = token_lists(RAGGED)
    streams = [40, 7, 1000, 3, 2, 90, 5]
    params = SamplingParams(n=3, max_tokens=10, seed=17)
    sampler = sampler_of(family, supported=supported)
    together = tokens(sampler.generate(prompts, params, streams=streams))
    assert len({tuple(t) for t in together}) > 15  # samples and prompts differ
    for max_slots in (1, 2, 5, 30):
        sampler = sampler_of(family, supported=supported, max_slots=max_slots)
        assert tokens(sampler.generate(prompts, params, streams=streams)) == together
    backwards = sampler.generate(prompts[::-1], params, streams=streams[::-1])
    assert tokens(backwards[::-1]) == together
    for i in (0, 2, 6):
        alone = sampler.generate([prompts[i]], params, streams=[streams[i]])
        assert tokens(alone) == together[3 * i : 3 * i + 3]
        fewer = sampler.generate([prompts[i]], replace(params, n=1), streams=[streams[i]])
        assert tokens(fewer) == together[3 * i : 3 * i + 1]
        neighbours = sampler.generate([*token_lists([9, 4], seed=8), prompts[i]], params, streams=[1, 2, streams[i]])
        assert tokens(neighbours[2:]) == together[3 * i : 3 * i + 3]


def test_prefill_in_parts_changes_nothing():
    prompts = token_lists(RAGGED)
    model = tiny_model("mistral")
    params = SamplingParams(n=2, max_tokens=9, seed=5)
    whole = LocalSampler(model, tokenizer()).generate(prompts, params)
    for budget in (1, 13, 20):
        parts = LocalSampler(model, tokenizer(), prefill_tokens=budget, max_slots=6).generate(prompts, params)
        assert tokens(parts) == tokens(whole)
        for a, b in zip(flat(parts), flat(whole), strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_seed_streams_and_defaults():
    sampler = sampler_of("llama", eos=None)
    prompts = token_lists([5, 5, 5])
    same = [prompts[0]] * 3
    first = tokens(sampler.generate(same, ENDLESS))
    assert first == tokens(sampler.generate(same, ENDLESS))
    assert len({tuple(t) for t in first}) == 3  # the default stream is the prompt's place
    assert first == tokens(sampler.generate(same, ENDLESS, streams=[0, 1, 2]))
    equal = tokens(sampler.generate(same, ENDLESS, streams=[4, 4, 4]))
    assert equal[0] == equal[1] == equal[2]
    assert first != tokens(sampler.generate(same, replace(ENDLESS, seed=4)))
    unseeded = replace(ENDLESS, seed=None)
    assert tokens(sampler.generate(same, unseeded)) != tokens(sampler.generate(same, unseeded))
    with pytest.raises(ValueError, match="2 streams for 3 prompts"):
        sampler.generate(prompts, ENDLESS, streams=[1, 2])


def test_a_smaller_call_after_a_larger_one_sees_no_old_keys():
    """Slots are kept between calls; what a former sequence left there must not be read."""
    sampler = sampler_of("qwen3", max_slots=4)
    small = token_lists([2, 3], seed=9)
    fresh = sampler_of("qwen3", max_slots=4).generate(small, ENDLESS)
    sampler.generate(token_lists([30, 25, 28, 31]), replace(ENDLESS, max_tokens=20))
    again = sampler.generate(small, ENDLESS)
    assert tokens(again) == tokens(fresh)
    sampler.release()
    assert tokens(sampler.generate(small, ENDLESS)) == tokens(fresh)


# ---- lengths and stops -------------------------------------------------------------------------------


@pytest.mark.parametrize("supported", [True, False])
def test_stop_tokens_end_a_sample_and_stay_in_it(supported):
    sampler = sampler_of("llama", vocabulary=8, supported=supported, max_slots=7)
    params = SamplingParams(n=80, max_tokens=9, seed=1, stop_token_ids=(6,))
    lengths = set()
    for sample in flat(sampler.generate([[3, 4], [5]], params)):
        body, last = sample.token_ids[:-1], sample.token_ids[-1]
        assert not {EOS, 6} & set(body)
        assert sample.finish_reason == ("stop" if last in (EOS, 6) else "length")
        assert len(sample.token_ids) == 9 or sample.finish_reason == "stop"
        assert len(sample.token_ids) == len(sample.logprobs) <= 9
        lengths.add(len(sample.token_ids))
    assert {1, 2, 9} <= lengths


@pytest.mark.parametrize("supported", [True, False])
def test_max_tokens_one(supported):
    sampler = sampler_of("llama", vocabulary=8, supported=supported, max_slots=7)
    samples = flat(sampler.generate([[3, 4], [5]], SamplingParams(n=30, max_tokens=1, seed=1)))
    assert all(len(s.token_ids) == len(s.logprobs) == 1 for s in samples)
    assert {(s.token_ids[0] == EOS, s.finish_reason) for s in samples} == {(True, "stop"), (False, "length")}


@pytest.mark.parametrize("supported", [True, False])
def test_min_tokens(supported):
    sampler = sampler_of("llama", vocabulary=8, supported=supported)
    params = SamplingParams(n=60, max_tokens=7, min_tokens=4, stop_token_ids=(5, 6), seed=1)
    samples = flat(sampler.generate([[3, 4]], params))
    assert {len(s.token_ids) for s in samples} == {5, 6, 7}
    samples = flat(sampler.generate([[3, 4]], SamplingParams(n=20, max_tokens=4, min_tokens=4, seed=1)))
    assert all(len(s.token_ids) == 4 and s.finish_reason == "length" for s in samples)


@pytest.mark.parametrize("supported", [True, False])
def test_min_tokens_without_any_stop_token(supported):
    sampler = sampler_of("llama", eos=None, supported=supported)
    (row,) = sampler.generate([[3, 4]], SamplingParams(max_tokens=5, min_tokens=2, seed=1))
    assert len(row[0].token_ids) == 5


def test_every_eos_of_the_model_stops():
    model = tiny_model("llama", vocabulary=8)
    model.generation_config.eos_token_id = [EOS, 7]
    sampler = LocalSampler(model, tokenizer(5))
    samples = flat(sampler.generate([[3, 4]], SamplingParams(n=120, max_tokens=4, seed=1)))
    assert {s.token_ids[-1] for s in samples if s.finish_reason == "stop"} == {EOS, 5, 7}
    assert all(s.token_ids[-1] not in (EOS, 5, 7) for s in samples if s.finish_reason == "length")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_prompts_and_empty_prompts(family):
    sampler = sampler_of(family)
    assert sampler.generate([], SamplingParams(max_tokens=3)) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.generate([[3], []], SamplingParams(max_tokens=3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 9, "max_tokens": 8},
    ],
)
def test_params_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_progress_and_training_mode():
    sampler = sampler_of("llama", max_slots=2)
    calls: list[tuple[int, int]] = []
    sampler.progress = lambda done, total: calls.append((done, total))
    sampler.model.train()
    sampler.generate([[3], [4, 5]], SamplingParams(n=2, max_tokens=4, seed=0))
    assert sampler.model.training
    assert calls[-1] == (4, 4) and calls == sorted(calls)
    assert sampler.model.config._attn_implementation == "eager"  # as it was


# ---- weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_update_weights(family):
    sampler = sampler_of(family)
    prompts = token_lists(RAGGED)
    before = sampler.generate(prompts, ENDLESS)
    assert {s.weights_version for s in flat(before)} == {0}
    other = tiny_model(family, seed=5)
    sampler.update_weights(((n, p.detach()) for n, p in other.named_parameters()), 12)
    after = sampler.generate(prompts, ENDLESS)
    assert tokens(after) != tokens(before)
    assert {s.weights_version for s in flat(after)} == {12}
    for prompt, row in zip(prompts, after, strict=True):
        assert_logprobs(other, prompt, row[0], ENDLESS)
    sampler.update_weights((), 13)  # shared with the trainer: only the number changes
    again = sampler.generate(prompts, ENDLESS)
    assert tokens(again) == tokens(after) and {s.weights_version for s in flat(again)} == {13}


def test_update_weights_refuses_unknown_names_and_other_shapes():
    sampler = sampler_of("llama")
    before = sampler.generate([[3, 4]], ENDLESS)
    with pytest.raises(KeyError, match=r"model\.nothing"):
        sampler.update_weights([("model.nothing", torch.zeros(1))], 1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: shape \(1,\), expected \(32,\)"):
        sampler.update_weights([("model.norm.weight", torch.zeros(1))], 1)  # copy_ would broadcast it
    assert sampler.version == 0
    assert tokens(sampler.generate([[3, 4]], ENDLESS)) == tokens(before)


# ---- the fallback ------------------------------------------------------------------------------------


def test_fallback_is_announced_once():
    model = tiny_model("gpt2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = LocalSampler(model, tokenizer())
        sampler.generate([[3, 4]], ENDLESS)
        sampler.generate([[3, 4]], ENDLESS)
    assert [str(w.message) for w in caught if "gpt2" in str(w.message)] == [
        "no slot decoding for model type 'gpt2': using transformers' generate"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalSampler(tiny_model("llama"), tokenizer())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9},
        {"min_tokens": 3, "stop_token_ids": tuple(range(60, 80))},
    ],
)
def test_fallback_gives_what_the_slots_give(family, settings):
    prompts = token_lists(RAGGED)
    params = SamplingParams(n=2, max_tokens=9, seed=23, **settings)
    streams = [5, 3, 8, 1, 0, 77, 6]
    slots = sampler_of(family, max_slots=5).generate(prompts, params, streams=streams)
    fallback = sampler_of(family, max_slots=5, supported=False).generate(prompts, params, streams=streams)
    assert tokens(fallback) == tokens(slots)
    for a, b in zip(flat(fallback), flat(slots), strict=True):
        assert (a.finish_reason, a.weights_version) == (b.finish_reason, b.weights_version)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_fallback_on_an_unsupported_architecture():
    """Streams and log-probabilities of gpt2: ragged prompts are padded on the left for it."""
    prompts = token_lists(RAGGED)
    sampler = sampler_of("gpt2", max_slots=4)
    params = SamplingParams(n=2, max_tokens=9, seed=4)
    together = sampler.generate(prompts, params)
    for prompt, row in zip(prompts, together, strict=True):
        for sample in row:
            assert_logprobs(sampler.model, prompt, sample, params)
    assert tokens(sampler.generate(prompts[2:3], params, streams=[2])) == tokens(together[2:3])
    assert tokens(sampler_of("gpt2", max_slots=1).generate(prompts, params)) == tokens(together)


def test_fallback_ignores_the_generation_config():
    """A repetition penalty that comes with a checkpoint (Qwen's, say) is not part of the policy."""
    sampler = sampler_of("gpt2")
    prompts = token_lists([5, 2])
    params = SamplingParams(n=2, max_tokens=9, seed=4)
    want = sampler.generate(prompts, params)
    sampler.model.generation_config.update(repetition_penalty=1.7, no_repeat_ngram_size=1, suppress_tokens=[9, 10])
    got = sampler.generate(prompts, params)
    assert tokens(got) == tokens(want)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
