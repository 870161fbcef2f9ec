"""rl.rollout against transformers' generate, plain forwards and exact probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sampler_cases import RAGGED, assert_logprobs, flat, logits_after, sampler_of, tokens
from scipy import stats
from tiny_models import DENSE, EOS, FAMILIES, processed, token_lists

from rl.rollout import SamplingParams
from rl.rollout.sampling import draw, stream_key, uniform

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
