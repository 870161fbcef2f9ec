"""A sampler over a tiny model, and what its samples are compared with."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny_models import EOS, endless, processed, tiny_model, tokenizer

from rl.rollout import LocalSampler, Sample, SamplingParams

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
