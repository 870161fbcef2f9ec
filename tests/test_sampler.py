"""rl.rollout against transformers' generate, plain forwards and exact probabilities."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from scipy import stats
from tiny_models import DENSE, EOS, FAMILIES, endless, processed, tiny_model, token_lists, tokenizer

from rl.rollout import LocalSampler, Sample, SamplingParams
from rl.rollout.sampling import draw, stream_key, uniform

RAGGED = [3, 17, 1, 8, 5, 1, 12]
ENDLESS = SamplingParams(max_tokens=14, seed=3)  # for samplers without a stop token


def sampler_of(family: str, *, eos: int | None = EOS, supported: bool = True, max_slots: int = 64, **config):
    model = tiny_model(family, **config)
    if eos is None:
        endless(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = LocalSampler(model, tokenizer(eos), max_slots=max_slots)
    if not supported:
        sampler.supported = False  # the same model through transformers' generate
    return sampler


def flat(samples: list[list[Sample]]) -> list[Sample]:
    return [sample for row in samples for sample in row]


def tokens(samples: list[list[Sample]]) -> list[list[int]]:
    return [sample.token_ids for sample in flat(samples)]


@torch.no_grad()
def logits_after(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Logits [len(completion), V] of one plain forward, in float64."""
    ids = torch.tensor([[*prompt, *completion]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()


def assert_logprobs(model, prompt: list[int], sample: Sample, params: SamplingParams) -> None:
    """Every reported log-probability against a full plain forward, to 1e-4."""
    assert len(sample.logprobs) == len(sample.token_ids)
    narrowing = {"top_k": params.top_k, "top_p": params.top_p, "temperature": params.temperature}
    logits = logits_after(model, prompt, sample.token_ids)
    for row, token, logp in zip(logits, sample.token_ids, sample.logprobs, strict=True):
        assert logp == pytest.approx(math.log(processed(row, **narrowing)[token]), abs=1e-4)


# ---- greedy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family):
    """Ragged prompts through fewer rows than prompts, with and without an end of sequence."""
    sampler = sampler_of(family, eos=None, max_slots=3)
    prompts = token_lists(RAGGED)
    params = SamplingParams(temperature=0, max_tokens=12)
    got = tokens(sampler.generate(prompts, params))
    for prompt, completion in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        want = sampler.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert completion == want[0, len(prompt) :].tolist()
    assert len({token for completion in got for token in completion}) > 5  # not stuck on one token


@pytest.mark.parametrize("family", [*DENSE, "gpt2"])
def test_greedy_equals_transformers_generate_with_stop_tokens(family):
    sampler = sampler_of(family, eos=None, max_slots=2)
    prompts = token_lists(RAGGED)
    params = SamplingParams(temperature=0, max_tokens=12, n=2)
    free = sampler.generate(prompts, params)
    stop = free[1][0].token_ids[3]  # some token that is met on the way
    params = replace(params, stop_token_ids=(stop,))
    stopped = sampler.generate(prompts, params)
    reasons = set()
    for prompt, before, after in zip(prompts, free, stopped, strict=True):
        assert after[0].token_ids == after[1].token_ids
        want = before[0].token_ids
        want = want[: want.index(stop) + 1] if stop in want else want
        assert after[0].token_ids == want
        reasons.add(after[0].finish_reason)
        assert after[0].finish_reason == ("stop" if stop in want else "length")
        ids = torch.tensor([prompt])
        theirs = sampler.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            eos_token_id=stop,
        )
        assert after[0].token_ids == theirs[0, len(prompt) :].tolist()
    assert "stop" in reasons


# ---- log-probabilities -------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 1.8},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward(family):
    sampler = sampler_of(family, max_slots=4)
    prompts = token_lists(RAGGED)
    params = SamplingParams(n=2, max_tokens=14, seed=1)
    for prompt, row in zip(prompts, sampler.generate(prompts, params), strict=True):
        assert len(row) == 2
        for sample in row:
            assert_logprobs(sampler.model, prompt, sample, params)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_slots_that_grow(family):
    """Past two growths of the buffers; rows end at different lengths, others take their places."""
    sampler = sampler_of(family, eos=None, max_slots=3)
    prompts = token_lists([60, 3, 70, 1, 20])
    params = SamplingParams(temperature=0, max_tokens=75)
    for prompt, completion in zip(prompts, tokens(sampler.generate(prompts, params)), strict=True):
        ids = torch.tensor([prompt])
        want = sampler.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=75, pad_token_id=0
        )
        assert completion == want[0, len(prompt) :].tolist()


def test_sampling_more_rows_than_are_drawn_at_a_time():
    sampler = sampler_of("llama", max_slots=40)
    params = SamplingParams(n=40, max_tokens=3, seed=5)
    [row] = sampler.generate([[5, 6, 7]], params)
    assert len({tuple(sample.token_ids) for sample in row}) > 20
    for sample in row:
        assert_logprobs(sampler.model, [5, 6, 7], sample, params)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family,supported", [("llama", True), ("gemma2", True), ("llama", False), ("gpt2", False)])
def test_logprobs_are_of_the_processed_distribution(family, supported, setting):
    sampler = sampler_of(family, supported=supported, max_slots=4)
    prompts = token_lists([6, 2, 11])
    params = SamplingParams(n=2, max_tokens=10, seed=1, **SETTINGS[setting])
    for prompt, row in zip(prompts, sampler.generate(prompts, params), strict=True):
        for sample in row:
            assert_logprobs(sampler.model, prompt, sample, params)


def test_greedy_logprobs_are_plain_even_when_narrowed():
    """Sample: 'for greedy sampling those of the plain distribution', whatever top_k and top_p say."""
    sampler = sampler_of("llama")
    prompts = token_lists([6, 2])
    plain = sampler.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
    narrowed = sampler.generate(prompts, SamplingParams(temperature=0, max_tokens=6, top_k=3, top_p=0.5))
    assert tokens(plain) == tokens(narrowed)
    for a, b in zip(flat(plain), flat(narrowed), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_min_tokens_renormalises_without_the_stop_tokens():
    sampler = sampler_of("llama", vocabulary=7)
    params = SamplingParams(n=60, max_tokens=6, min_tokens=3, stop_token_ids=(5,), seed=2)
    prompt = [3, 4]
    early = 0
    for sample in flat(sampler.generate([prompt], params)):
        logits = logits_after(sampler.model, prompt, sample.token_ids)
        logits[:3, [EOS, 5]] = -math.inf
        want = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].tolist()
        assert sample.logprobs == pytest.approx(want, abs=1e-4)
        assert not {EOS, 5} & set(sample.token_ids[:3])
        early += len(sample.token_ids) == 4
    assert early  # a stop token may be drawn right after


# ---- the distribution --------------------------------------------------------------------------------


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of observed counts; cells expected fewer than 8 times are put together."""
    counts, probabilities = counts.double(), probabilities.double()
    total = float(counts.sum())
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities / probabilities.sum() * total
    rare = expected < 8
    observed = [*counts[~rare].tolist(), float(counts[rare].sum())]
    wanted = [*expected[~rare].tolist(), float(expected[rare].sum())]
    if wanted[-1] < 8:
        wanted[-2], observed[-2] = wanted[-2] + wanted[-1], observed[-2] + observed[-1]
        wanted.pop()
        observed.pop()
    return float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("setting", ["plain", "cold", "hot", "top-k", "top-p", "all"])
@pytest.mark.parametrize("supported", [True, False])
def test_tokens_follow_the_exact_distribution(setting, supported):
    """Pairs of tokens from one prompt: 9 x 9 cells, exact probabilities p(a) p(b | a)."""
    vocabulary, prompt = 9, [4, 3, 8]
    narrowing = dict(SETTINGS[setting])
    if "top_k" in narrowing:
        narrowing["top_k"] = 4
    sampler = sampler_of("llama", eos=None, vocabulary=vocabulary, supported=supported, max_slots=512, layers=2)
    params = SamplingParams(n=4000, max_tokens=2, seed=11, **narrowing)
    counts = torch.zeros(vocabulary, vocabulary)
    for sample in flat(sampler.generate([prompt], params)):
        counts[tuple(sample.token_ids)] += 1
    exact = torch.zeros(vocabulary, vocabulary)
    for a in range(vocabulary):
        after_prompt, after_a = logits_after(sampler.model, prompt, [a, 0])
        exact[a] = processed(after_prompt, **narrowing)[a] * processed(after_a, **narrowing)
    assert chi_square_p(counts.flatten(), exact.flatten()) > 0.01


@pytest.mark.parametrize("vocabulary,chunk", [(300, 64), (256, 256), (1000, 256), (5, 256), (7, 3)])
def test_draw_follows_the_probabilities(vocabulary, chunk):
    generator = torch.Generator().manual_seed(vocabulary)
    logp = (2 * torch.randn(vocabulary, generator=generator)).log_softmax(-1)
    numbers = torch.tensor([uniform(stream_key(vocabulary), i) for i in range(20_000)], dtype=torch.float64)
    counts = torch.zeros(vocabulary)
    for part in numbers.split(2000):
        counts += torch.bincount(draw(logp.exp().expand(len(part), -1), part, chunk), minlength=vocabulary)
    assert chi_square_p(counts, logp.exp()) > 0.01


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
