"""VLLMEngine and VLLMSampler with the real vLLM; run inside its environment by test_vllm_engine.py.

One engine at a time, float32, tiny random models with heads of a size that vLLM's CPU attention knows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EOS, plain_logprobs, tiny_model, token_lists, tokenizer

from rl.policy.packing import Document
from rl.recipe_io import RecipeError
from rl.rollout import LocalSampler, Sample, SamplingParams, VLLMSampler, vllm_weights
from rl.rollout.engine import RestartNeeded
from rl.rollout.probe import ProbeFailed, check_probe, probe_tokens
from rl.rollout.vllm_engine import VLLMEngine

VOCABULARY = 101
PROMPTS = token_lists([3, 17, 1, 8, 5, 1, 12])
SHAPE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
TOLERANCE = 1e-4  # nats, float32 on both sides


def llama(seed: int = 0, tied: bool = True) -> Any:
    return tiny_model("llama", vocabulary=VOCABULARY, layers=2, seed=seed, tie_word_embeddings=tied, **SHAPE)


def named(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., VLLMEngine]]:
    """Makes an engine of a model, and closes the one before: each fills a cache of its own."""
    alive: list[VLLMEngine] = []

    def start(model: Any, **settings: Any) -> VLLMEngine:
        stop()
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        settings = {"dtype": "float32", "max_model_len": 64, "max_slots": 8, **settings}
        settings["extra"] = {"kv_cache_memory_bytes": 1 << 26, **settings.get("extra", {})}
        alive.append(VLLMEngine(str(folder), **settings))
        return alive[0]

    def stop() -> None:
        for engine in alive:
            engine.close()
        alive.clear()
        gc.collect()

    yield start
    stop()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def engine(engines: Callable[..., VLLMEngine], model: Any) -> VLLMEngine:
    """With the weights of `model`, which every test that changes them puts back."""
    return engines(model)


def flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def scores_of(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    return [plain_logprobs(model, Document(s[:1], s[1:]))[0].tolist() for s in sequences]


def worst(a: list[list[float]], b: list[list[float]]) -> float:
    assert [len(x) for x in a] == [len(x) for x in b]
    return max((abs(p - q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)), default=0.0)


def assert_logprobs(model: Any, prompt: list[int], sample: Sample, temperature: float = 1.0) -> None:
    want = plain_logprobs(model, Document(prompt, sample.token_ids), temperature)[0].tolist()
    assert sample.logprobs == pytest.approx(want, abs=TOLERANCE)


# ---- sampling ----------------------------------------------------------------------------------------


def test_greedy_equals_the_local_sampler(engine: VLLMEngine, model: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, n=2)
    got = flat(VLLMSampler(engine).generate(PROMPTS, params))
    want = flat(LocalSampler(model, tokenizer()).generate(PROMPTS, params))
    assert [(s.token_ids, s.finish_reason) for s in got] == [(s.token_ids, s.finish_reason) for s in want]
    assert worst([s.logprobs for s in got], [s.logprobs for s in want]) < TOLERANCE
    assert len({token for s in got for token in s.token_ids}) > 5  # not stuck on one token


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"temperature": 1.8}])
def test_logprobs_are_of_the_processed_distribution(engine: VLLMEngine, model: Any, setting: dict[str, Any]) -> None:
    params = SamplingParams(n=3, max_tokens=10, seed=1, **setting)
    for prompt, group in zip(PROMPTS, VLLMSampler(engine).generate(PROMPTS, params), strict=True):
        assert len(group) == 3
        for sample in group:
            assert_logprobs(model, prompt, sample, params.temperature)


def test_narrowed_distributions(engine: VLLMEngine, model: Any) -> None:
    """Top-k, then top-p, renormalised, as LocalSampler does: its probability of vLLM's tokens is vLLM's."""
    from rl.rollout.sampling import process_logits

    params = SamplingParams(n=4, max_tokens=6, seed=2, temperature=0.8, top_k=20, top_p=0.8)
    for prompt, group in zip(PROMPTS, VLLMSampler(engine).generate(PROMPTS, params), strict=True):
        for sample in group:
            ids = torch.tensor([[*prompt, *sample.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logp = process_logits(logits, params.temperature, params.top_k, params.top_p).log_softmax(-1)
            want = logp.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].tolist()
            assert sample.logprobs == pytest.approx(want, abs=TOLERANCE)


def test_stop_tokens_end_a_sample_and_stay_in_it(engine: VLLMEngine) -> None:
    params = SamplingParams(n=16, max_tokens=9, seed=1, stop_token_ids=tuple(range(60, 80)))
    stops = {EOS, *params.stop_token_ids}
    assert engine.stop_ids == (EOS,)  # from the folder
    reasons = set()
    for sample in flat(VLLMSampler(engine).generate(PROMPTS, params)):
        assert not stops & set(sample.token_ids[:-1])
        assert sample.finish_reason == ("stop" if sample.token_ids[-1] in stops else "length")
        assert len(sample.token_ids) == 9 or sample.finish_reason == "stop"
        assert len(sample.logprobs) == len(sample.token_ids)
        reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}


def test_min_tokens_renormalises_without_the_stop_tokens(engine: VLLMEngine, model: Any) -> None:
    params = SamplingParams(n=8, max_tokens=6, min_tokens=3, seed=3, stop_token_ids=tuple(range(40, 80)))
    stops = sorted({EOS, *params.stop_token_ids})
    lengths = set()
    for prompt, group in zip(PROMPTS, VLLMSampler(engine).generate(PROMPTS, params), strict=True):
        for sample in group:
            ids = torch.tensor([[*prompt, *sample.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logits[:3, stops] = -torch.inf
            want = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].tolist()
            assert sample.logprobs == pytest.approx(want, abs=TOLERANCE)
            assert not set(stops) & set(sample.token_ids[:3])
            lengths.add(len(sample.token_ids))
    assert 4 in lengths  # a stop token may be drawn right after


def test_samples_depend_on_their_streams_only(engine: VLLMEngine) -> None:
    sampler = VLLMSampler(engine)
    params = SamplingParams(n=3, max_tokens=8, seed=17)
    streams = [40, 7, 1000, 3, 2, 90, 5]
    together = [s.token_ids for s in flat(sampler.generate(PROMPTS, params, streams=streams))]
    assert len({tuple(ids) for ids in together}) > 15  # samples and prompts differ
    backwards = sampler.generate(PROMPTS[::-1], params, streams=streams[::-1])[::-1]
    assert [s.token_ids for s in flat(backwards)] == together
    fewer = sampler.generate(PROMPTS[1:2], replace(params, n=1), streams=streams[1:2])
    assert fewer[0][0].token_ids == together[3]
    other = sampler.generate(PROMPTS, replace(params, seed=18), streams=streams)
    assert [s.token_ids for s in flat(other)] != together


def test_requests_that_cannot_be_served(engine: VLLMEngine) -> None:
    params = SamplingParams(max_tokens=8)
    for prompt, changes, message in [
        ([], {}, "the prompt is empty"),
        ([3, VOCABULARY], {}, "outside the model's vocabulary"),
        ([3, -1], {}, "outside the model's vocabulary"),
        ([3] * 57, {}, "max_model_len of 64"),
        ([3], {"temperature": 2.5}, "temperatures of 0.01 to 2.0"),
        ([3], {"temperature": 0.001}, "temperatures of 0.01 to 2.0"),
        ([3], {"stop_token_ids": (VOCABULARY,)}, "stop_token_ids: token 101"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit("bad", prompt, replace(params, **changes), 0)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        engine.score([[3], []])
    assert engine.idle()


def test_requests_come_and_go(engine: VLLMEngine) -> None:
    """One by one, with a score in between; an aborted one leaves nothing."""
    params = SamplingParams(n=2, max_tokens=8, min_tokens=8, seed=4)
    want = VLLMSampler(engine).generate(PROMPTS[:3], params, streams=[0, 1, 2])
    done = {}
    engine.submit("a", PROMPTS[0], params, 0)
    with pytest.raises(ValueError, match="key 'a'"):
        engine.submit("a", PROMPTS[0], params, 0)
    engine.submit("gone", PROMPTS[3], params, 3)
    done.update(engine.step())
    engine.submit("b", PROMPTS[1], params, 1)
    engine.abort("gone")
    engine.abort("unknown")
    assert len(engine.score([PROMPTS[1]])[0]) == len(PROMPTS[1]) - 1
    while "a" not in done:
        done.update(engine.step())
    engine.submit("c", PROMPTS[2], params, 2)
    while not engine.idle():
        done.update(engine.step())
    assert set(done) == {"a", "b", "c"}
    assert [[s.token_ids for s in done[key]] for key in "abc"] == [[s.token_ids for s in group] for group in want]
    assert engine.step() == []


def test_scores_are_the_models_logprobs(engine: VLLMEngine, model: Any) -> None:
    sequences = [*PROMPTS, probe_tokens(VOCABULARY, 63)]
    assert worst(engine.score(sequences), scores_of(model, sequences)) < TOLERANCE


def test_progress_is_told_and_an_error_leaves_nothing_behind(engine: VLLMEngine) -> None:
    told: list[tuple[int, int]] = []
    sampler = VLLMSampler(engine, progress=lambda done, total: told.append((done, total)))
    sampler.generate(PROMPTS, SamplingParams(n=2, max_tokens=3, seed=0))
    assert told[-1] == (14, 14) and told == sorted(told)
    with pytest.raises(ValueError, match="empty"):
        sampler.generate([[3], []], SamplingParams(max_tokens=3))
    assert engine.idle()
    with pytest.raises(ValueError, match="1 streams for 7 prompts"):
        sampler.generate(PROMPTS, SamplingParams(max_tokens=3), streams=[1])
    sampler.release()  # nothing to give back on CPU
    assert sampler.generate([], SamplingParams(max_tokens=3)) == []


# ---- weights -----------------------------------------------------------------------------------------


def test_an_update_replaces_all_weights(engine: VLLMEngine, model: Any) -> None:
    """The same prompts before and after: a prefix cache that is kept would answer with old keys and values."""
    sampler, probe = VLLMSampler(engine), probe_tokens(VOCABULARY, 40)
    params = SamplingParams(temperature=0, max_tokens=8)
    long = token_lists([50], seed=3)
    sampler.generate(long, params)
    other = llama(seed=5)
    sampler.update_weights(named(other), 12)
    assert sampler.version == 12
    got = sampler.generate([*long, *PROMPTS], params)
    want = LocalSampler(other, tokenizer()).generate([*long, *PROMPTS], params)
    assert [s.token_ids for s in flat(got)] == [s.token_ids for s in flat(want)]
    assert worst([s.logprobs for s in flat(got)], [s.logprobs for s in flat(want)]) < TOLERANCE
    assert {(s.weights_version, s.newest_version) for s in flat(got)} == {(12, None)}
    assert check_probe(scores_of(other, [probe])[0], engine.score([probe])[0], TOLERANCE, 12) < TOLERANCE
    with pytest.raises(ProbeFailed, match="after update 12"):
        check_probe(scores_of(model, [probe])[0], engine.score([probe])[0], 0.05, 12)
    engine.update_weights(named(model), 0)


def test_the_version_may_be_set(engine: VLLMEngine) -> None:
    """An engine that was started from a checkpoint of a later version."""
    engine.version = 31
    (sample,) = flat(VLLMSampler(engine).generate([[3, 4]], SamplingParams(max_tokens=2, seed=0)))
    assert (sample.weights_version, sample.newest_version) == (31, None)
    engine.version = 0


def test_the_probe_sees_a_stale_tied_head(engine: VLLMEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other, probe = llama(seed=6), probe_tokens(VOCABULARY, 40)
    trainer = scores_of(other, [probe])[0]
    with monkeypatch.context() as patch:
        patch.setattr(vllm_weights, "repack_tied_head", lambda model: None)
        engine.update_weights(named(other), 1)
        with pytest.raises(ProbeFailed, match="tied to the embedding"):
            check_probe(trainer, engine.score([probe])[0], 0.05, 1)
    engine.update_weights(named(other), 2)
    assert check_probe(trainer, engine.score([probe])[0], TOLERANCE, 2) < TOLERANCE
    engine.update_weights(named(model), 0)


def test_the_mismatch_does_not_grow_with_updates(engine: VLLMEngine, model: Any) -> None:
    """Learning rate 0: the same weights again and again."""
    sequences = [*PROMPTS, probe_tokens(VOCABULARY, 40)]
    first = engine.score(sequences)
    for version in range(1, 6):
        engine.update_weights(named(model), version)
        assert engine.score(sequences) == first
    assert worst(first, scores_of(model, sequences)) < TOLERANCE
    engine.update_weights((), 0)  # nothing has changed: only the number
    assert engine.version == 0 and engine.score(sequences) == first


def test_an_update_while_sampling(engine: VLLMEngine, model: Any) -> None:
    """Tokens before it are the old weights', tokens after it the new ones' over the whole prefix."""
    other = llama(seed=7)
    params = SamplingParams(n=2, max_tokens=16, min_tokens=16, seed=5)
    engine.submit("spans", PROMPTS[1], params, 0)
    for _ in range(6):
        assert engine.step() == []
    engine.update_weights(named(other), 8)
    engine.submit("new", PROMPTS[2], params, 1)
    done: dict[str, list[Sample]] = {}
    while not engine.idle():
        done.update(engine.step())
    engine.update_weights(named(model), 0)
    assert {(s.weights_version, s.newest_version) for s in done["spans"]} == {(0, 8)}
    assert {(s.weights_version, s.newest_version) for s in done["new"]} == {(8, None)}
    for sample in done["spans"]:
        old, new = (without_eos(m, PROMPTS[1], sample.token_ids) for m in (model, other))
        splits = [k for k in range(17) if sample.logprobs == pytest.approx([*old[:k], *new[k:]], abs=TOLERANCE)]
        assert splits and all(0 < k < 16 for k in splits)


def test_a_score_does_not_wait_for_a_free_slot(engine: VLLMEngine, model: Any) -> None:
    """More samples than slots, each of them long: the score comes within a step, and they go on."""
    params, probe = SamplingParams(n=4, max_tokens=24, min_tokens=24, seed=6), probe_tokens(VOCABULARY, 40)
    for key in "abcd":
        engine.submit(key, PROMPTS[1], params, ord(key))
    for _ in range(6):
        assert engine.step() == []
    assert worst(engine.score([probe]), scores_of(model, [probe])) < TOLERANCE
    other = llama(seed=7)
    engine.update_weights(named(other), 1)
    assert worst(engine.score([probe]), scores_of(other, [probe])) < TOLERANCE
    assert engine.takes_weights_midway and not engine._ready  # none has come to its end meanwhile
    done: dict[str, list[Sample]] = {}
    while not engine.idle():
        done.update(engine.step())
    engine.update_weights(named(model), 0)
    assert sorted(done) == list("abcd") and all(len(s.token_ids) == 24 for s in flat(list(done.values())))
    assert {s.newest_version or s.weights_version for s in flat(list(done.values()))} == {1}


def without_eos(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probabilities of a completion in which EOS could not be drawn."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits[:, EOS] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()


def test_parts_of_layers_are_refused_and_whole_layers_taken(engine: VLLMEngine, model: Any) -> None:
    """vLLM itself would fill the missing part of a fused layer with whatever is in memory."""
    other, sequences = llama(seed=8), PROMPTS
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.k_proj\.weight"):
        engine.update_weights([(n, t) for n, t in named(other) if "q_proj" in n], 1)
    for use in (lambda: engine.score(sequences), engine.step, lambda: engine.submit("x", [3], SamplingParams(), 0)):
        with pytest.raises(RuntimeError, match="update to version 1 broke off"):
            use()
    with pytest.raises(ValueError, match="the update lacks"):  # only all of it repairs
        engine.update_weights([(n, t) for n, t in named(other) if "layers.0" in n], 2)
    engine.update_weights(named(model), 3)
    assert engine.version == 3
    assert worst(engine.score(sequences), scores_of(model, sequences)) < TOLERANCE

    mixed = llama()
    changed = {n: t for n, t in named(other) if "self_attn" in n or "layers.1.mlp" in n}
    mixed.load_state_dict({**model.state_dict(), **changed})
    engine.update_weights(changed.items(), 4)
    assert worst(engine.score(sequences), scores_of(mixed, sequences)) < TOLERANCE
    engine.update_weights(named(model), 0)


@pytest.mark.parametrize(
    "name,tensor,message",
    [
        ("model.nothing.weight", torch.zeros(1), "no weight named 'model.nothing.weight'"),
        ("model.norm.weight", torch.zeros(1), r"model.norm.weight: shape \(1,\), expected \(64,\)"),
    ],
)
def test_wrong_names_and_shapes(engine: VLLMEngine, model: Any, name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        engine.update_weights([*named(model), (name, tensor)], 1)
    assert engine.version == 0
    engine.update_weights(named(model), 0)
    assert worst(engine.score(PROMPTS), scores_of(model, PROMPTS)) < TOLERANCE


def test_a_tied_head_may_be_sent_by_its_own_name(engine: VLLMEngine, model: Any) -> None:
    other = llama(seed=9)
    assert "lm_head.weight" in other.state_dict()
    engine.update_weights(other.state_dict().items(), 1)
    assert worst(engine.score(PROMPTS), scores_of(other, PROMPTS)) < TOLERANCE
    engine.update_weights(named(model), 0)


# ---- other engines: each closes the one before, so they come last -------------------------------------


def test_updated_equals_freshly_loaded(engines: Callable[..., VLLMEngine]) -> None:
    """A model whose head is its own, after an update, against an engine started from those weights."""
    first, second = llama(seed=1, tied=False), llama(seed=2, tied=False)
    params, probe = SamplingParams(temperature=0, max_tokens=12), [probe_tokens(VOCABULARY, 40)]
    updated = engines(first)
    updated.update_weights(named(second), 1)
    after = flat(VLLMSampler(updated).generate(PROMPTS, params))
    scores = updated.score(probe)
    fresh = engines(second, version=1)
    want = flat(VLLMSampler(fresh).generate(PROMPTS, params))
    assert [s.token_ids for s in after] == [s.token_ids for s in want]
    assert after == want  # log-probabilities too: the same kernels on the same numbers
    assert scores == fresh.score(probe)


def test_an_empty_engine_waits_for_all_weights(
    engines: Callable[..., VLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap again: here the stale head is not an older one, but noise."""
    model, probe = llama(seed=3), probe_tokens(VOCABULARY, 40)
    engine = engines(model, empty=True)
    with pytest.raises(RuntimeError, match="started empty"):
        engine.score([probe])
    with pytest.raises(ValueError, match="the update lacks"):
        engine.update_weights([(n, t) for n, t in named(model) if "layers.0" in n], 1)
    trainer = scores_of(model, [probe])[0]
    with monkeypatch.context() as patch:
        patch.setattr(vllm_weights, "repack_tied_head", lambda model: None)
        engine.update_weights(named(model), 1)
        with pytest.raises(ProbeFailed):
            check_probe(trainer, engine.score([probe])[0], 0.2, 1)
    engine.update_weights(named(model), 2)
    assert check_probe(trainer, engine.score([probe])[0], TOLERANCE, 2) < TOLERANCE


def test_prompts_beyond_one_batch_wait_whole(engines: Callable[..., VLLMEngine]) -> None:
    """A seeded request whose prompt is computed in parts ends vLLM on CPU."""
    model = llama()
    engine = engines(model, extra={"max_num_batched_tokens": 64})
    prompts = token_lists([40, 45, 20, 50, 33])
    groups = VLLMSampler(engine).generate(prompts, SamplingParams(n=2, max_tokens=8, seed=3))
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            assert_logprobs(model, prompt, sample)


def test_options(engines: Callable[..., VLLMEngine]) -> None:
    threads = torch.set_num_threads
    with pytest.raises(RecipeError, match="max_num_seq: vLLM .* has none; did you mean 'max_num_seqs'"):
        engines(llama(), extra={"max_num_seq": 3})
    with pytest.raises(RecipeError, match="logprobs_mode: the engine sets it itself"):
        engines(llama(), extra={"logprobs_mode": "raw_logprobs"})
    with pytest.raises(RecipeError, match="one engine is one replica"):
        engines(llama(), extra={"data_parallel_size": 2})
    engine = engines(llama(), stop_token_ids=[7, 9, 10**6], extra={"max_model_len": 32, "tensor_parallel_size": 1})
    assert engine.stop_ids == (7, 9) and engine.max_model_len == 32
    assert torch.set_num_threads is threads


def test_experts_on_cpu_need_a_restart(engines: Callable[..., VLLMEngine]) -> None:
    moe = tiny_model("qwen3_moe", vocabulary=VOCABULARY, layers=2, tie_word_embeddings=False, **SHAPE)
    engine = engines(moe)
    assert worst(engine.score(PROMPTS), scores_of(moe, PROMPTS)) < TOLERANCE
    with pytest.raises(RestartNeeded, match="experts"):
        engine.update_weights(named(moe), 1)
    assert engine.version == 0 and not engine.takes_weights_midway
    assert worst(engine.score(PROMPTS), scores_of(moe, PROMPTS)) < TOLERANCE  # untouched
    loaded = engines(moe, empty=True, record_routing=True)  # neither can be had: it starts as it can
    assert worst(loaded.score(PROMPTS), scores_of(moe, PROMPTS)) < TOLERANCE
    assert flat(VLLMSampler(loaded).generate(PROMPTS, SamplingParams(max_tokens=2, seed=0)))[0].routed_experts is None


def test_without_tokenizer_files_the_generation_config_decides(tmp_path: Path) -> None:
    from rl.rollout.vllm_arguments import folder_stop_ids

    model = llama()
    model.generation_config.eos_token_id = [EOS, 7]
    model.save_pretrained(tmp_path)
    assert folder_stop_ids(str(tmp_path)) == (EOS, 7)
