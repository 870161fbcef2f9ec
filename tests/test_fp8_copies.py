"""Copies of a converted model: which keep their quantised weights beside a sharded one, which can be captured."""

from __future__ import annotations

import pytest
import torch
from test_fp8_modules import small
from test_fp8_sampling import sampled
from tiny_models import tokenizer

from model.fp8 import reference
from model.fp8.backends import Backend
from model.fp8.context import Fp8Module, waits_for_host
from model.fp8.convert import to_fp8
from rl.policy.backend import WholeCopy
from rl.rollout import LocalSampler

CPU = torch.device("cpu")


@pytest.fixture
def quantised(monkeypatch):
    """A list that grows by one whenever a weight is quantised."""
    calls: list[int] = []
    real = reference.quantize_weight
    monkeypatch.setattr(reference, "quantize_weight", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def converted():
    """A model as it is before it is sharded, and the number of its weights in FP8."""
    model = small(num_nextn_predict_layers=1)
    to_fp8(model, keep_weights=False)
    return model, sum(len(m.in_fp8) for m in model.modules() if isinstance(m, Fp8Module))


def test_a_copy_to_sample_from_quantises_its_weights_once_an_update(quantised):
    model, weights = converted()
    copy = WholeCopy(model, torch.bfloat16, CPU, samples=True, reference=True).model
    first = sampled(copy)
    sampled(copy)
    assert len(quantised) == weights
    other = small(seed=1, num_nextn_predict_layers=1).bfloat16()
    LocalSampler(copy, tokenizer(eos=None)).update_weights(other.state_dict().items(), 1)
    assert sampled(copy) != first and len(quantised) == 2 * weights


def test_what_is_sharded_keeps_none(quantised):
    model, weights = converted()
    held = WholeCopy(model, torch.bfloat16, CPU, samples=True, reference=True)
    alone = WholeCopy(model, torch.bfloat16, CPU, samples=False, reference=True)
    for candidate in (model, held.for_reference(), alone.for_reference()):
        quantised.clear()
        ids = torch.arange(9)[None]
        with torch.no_grad():
            candidate(ids), candidate(ids)
        contexts = [m.context for m in candidate.modules() if isinstance(m, Fp8Module)]
        assert not any(context.keep_weights for context in contexts) and len(quantised) > weights
    assert all(m.context.keep_weights for m in held.model.modules() if isinstance(m, Fp8Module))


def small_in_fp8():
    model = small()
    to_fp8(model)
    return model


def test_only_the_reference_waits_for_the_host(monkeypatch):
    """So that a GPU that cannot run the kernels decodes it without CUDA graphs."""
    assert not waits_for_host(small(), CPU) and waits_for_host(small_in_fp8(), CPU)
    kernels = Backend("triton", "model.fp8.functions", lambda device: None)
    monkeypatch.setattr("model.fp8.context.choose", lambda name, device: kernels)
    assert not waits_for_host(small_in_fp8(), CPU)
