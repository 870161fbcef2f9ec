"""LocalEngine against LocalSampler and plain forwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import EOS, tiny_model, token_lists, tokenizer

from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.local_engine import LocalEngine

PROMPTS = token_lists([3, 17, 1, 8, 5])
PARAMS = SamplingParams(n=3, max_tokens=12, seed=4, temperature=0.8)


def sampler(seed: int = 0) -> LocalSampler:
    return LocalSampler(tiny_model("llama", seed=seed), tokenizer(EOS), max_slots=4)


def drained(engine: LocalEngine) -> dict:
    groups: dict = {}
    while not engine.idle():
        for key, samples in engine.step():
            assert key not in groups
            groups[key] = samples
    return groups


def test_engine_gives_what_the_sampler_gives():
    engine = LocalEngine(sampler())
    for i, prompt in enumerate(PROMPTS):
        engine.submit(f"p{i}", prompt, PARAMS, stream=10 + i)
    groups = drained(engine)
    expected = sampler().generate(PROMPTS, PARAMS, streams=range(10, 15))
    assert [groups[f"p{i}"] for i in range(5)] == expected


def test_groups_come_out_as_they_end_and_newcomers_are_the_next_batch():
    engine = LocalEngine(sampler())
    two = SamplingParams(max_tokens=2, min_tokens=2, seed=1)
    engine.submit("first", PROMPTS[0], two, stream=0)
    engine.submit("other settings", PROMPTS[1], SamplingParams(max_tokens=3, min_tokens=3, seed=1), stream=1)
    first = engine.step()  # a batch of one request
    engine.submit("late", PROMPTS[2], two, stream=2)
    rest = []
    while not engine.idle():
        rest += [key for key, _ in engine.step()]
    assert [key for key, _ in first] + rest == ["first", "other settings", "late"]


def test_aborted_requests_never_come_out_and_the_rest_is_unchanged():
    engine = LocalEngine(sampler())
    for i, prompt in enumerate(PROMPTS):
        engine.submit(f"p{i}", prompt, PARAMS, stream=i)
    engine.abort("p1")  # waiting
    engine.step()
    engine.abort("p2")  # running
    engine.abort("nobody")
    expected = sampler().generate(PROMPTS, PARAMS)
    got = drained(engine)
    # In another batch: the same tokens, log-probabilities up to rounding.
    assert {k: [s.token_ids for s in row] for k, row in got.items()} == {
        f"p{i}": [s.token_ids for s in expected[i]] for i in (0, 3, 4)
    }
    engine.submit("again", PROMPTS[1], PARAMS, stream=1)
    engine.step()
    engine.abort("again")
    assert engine.idle()
    engine.score([[3, 4, 5]])  # the model is its own again


def test_score_is_the_plain_log_probability_under_the_new_weights():
    engine = LocalEngine(sampler())
    other = tiny_model("llama", seed=7)
    engine.update_weights(other.named_parameters(), version=3)
    assert engine.version == 3
    ids = torch.tensor([PROMPTS[1]])
    logp = other(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = logp.gather(-1, ids[0, 1:, None])[:, 0].tolist()
    assert engine.score([PROMPTS[1]])[0] == pytest.approx(expected, abs=1e-5)
    assert engine.score([[5]]) == [[]]


def test_weights_wait_for_the_end_of_a_batch_and_bad_prompts_are_refused():
    engine = LocalEngine(sampler())
    with pytest.raises(ValueError, match="empty"):
        engine.submit("a", [], PARAMS, stream=0)
    with pytest.raises(ValueError, match="vocabulary of 101"):
        engine.submit("a", [5, 101], PARAMS, stream=0)
    engine.submit("a", PROMPTS[0], PARAMS, stream=0)
    engine.step()
    with pytest.raises(RuntimeError, match="weights cannot change"):
        engine.update_weights((), 1)
    engine.close()
    assert engine.idle()
