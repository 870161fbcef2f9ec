"""What surrounds vLLM and runs without it: checks of an update, the probe, the sampler over any engine, warnings."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_lists, tokenizer

from rl.rollout import LocalSampler, SamplingParams, VLLMSampler
from rl.rollout.local_engine import LocalEngine
from rl.rollout.probe import ProbeFailed, check_probe, probe_tokens
from rl.rollout.vllm_arguments import may_start_empty
from rl.rollout.vllm_weights import (
    checked,
    checkpoint_shapes,
    fused_module,
    spooled,
    spooled_tensors,
    together,
    unread,
)

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def state(**changes: Any) -> dict[str, torch.Tensor]:
    return dict(tiny_model("qwen2", layers=2, **changes).named_parameters())


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ---- updates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,module",
    [
        ("model.layers.3.self_attn.k_proj.bias", "model.layers.3.self_attn.qkv_proj"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_up_proj"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3.mlp.experts"),
        ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate"),
        ("lm_head.weight", "lm_head"),
        ("weight", ""),
    ],
)
def test_where_vllm_keeps_a_tensor(name: str, module: str) -> None:
    assert fused_module(name, FUSED) == module


def test_what_has_to_come_together() -> None:
    names = list(state())
    attention = {n for n in names if "layers.1.self_attn" in n and "o_proj" not in n}
    assert len(attention) == 6  # weights and biases
    assert together(["model.layers.1.self_attn.v_proj.weight"], names, FUSED) == attention
    assert together(["model.norm.weight"], names, FUSED) == {"model.norm.weight"}
    assert together([], names, FUSED) == set()


def test_whole_updates_and_whole_layers_pass_unchanged() -> None:
    tensors = state()
    shapes = shapes_of(tensors)
    passed = list(checked(tensors.items(), shapes, FUSED, tied=True, whole=True))
    assert [n for n, _ in passed] == list(tensors) and all(t is tensors[n] for n, t in passed)
    some = {n: t for n, t in tensors.items() if "layers.1.mlp" in n or "norm" in n}
    assert dict(checked(some.items(), shapes, FUSED, tied=True, whole=False)) == some
    with pytest.raises(ValueError, match="the update lacks .*started empty.*`empty: false`"):
        list(checked(some.items(), shapes, FUSED, tied=True, whole=True))


def test_what_is_wrong_with_an_update_is_named() -> None:
    tensors = state()
    shapes = shapes_of(tensors)

    def run(changed: dict[str, torch.Tensor], tied: bool = True) -> None:
        list(checked(changed.items(), shapes, FUSED, tied=tied, whole=False))

    lacking = {n: t for n, t in tensors.items() if n != "model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight \(1 tensors\)"):
        run(lacking)
    with pytest.raises(KeyError, match="no weight named 'lm_head.weight'"):
        run({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tied=False)
    run({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: shape \(3,\), expected \(32,\)"):
        run({**tensors, "model.norm.weight": torch.zeros(3)})


def test_a_tensor_that_comes_twice_is_refused() -> None:
    """Of a layer that is complete vLLM drops what comes after, without a word."""
    tensors = state()
    twice = [*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"] + 1)]
    with pytest.raises(ValueError, match=r"model\.norm\.weight was sent twice"):
        list(checked(twice, shapes_of(tensors), FUSED, tied=True, whole=False))


def test_what_vllm_passes_over_need_not_come() -> None:
    tensors = state()
    spare = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
        "model.layers.2.eh_proj.weight": (8, 16),  # of a prediction module, behind the two layers
        "mtp.norm.weight": (8,),
    }
    shapes = {**shapes_of(tensors), **spare}
    assert unread(shapes, 2) == set(spare)
    passed = checked(tensors.items(), shapes, FUSED, tied=True, whole=True, unread=unread(shapes, 2))
    assert dict(passed) == tensors


def test_the_stream_is_not_read_ahead() -> None:
    """Each tensor may be made when it is asked for, and is not held."""
    tensors, asked = state(), []

    def stream() -> Any:
        for name, tensor in tensors.items():
            asked.append(name)
            yield name, tensor

    for count, _ in enumerate(checked(stream(), shapes_of(tensors), FUSED, tied=True, whole=True), 1):
        assert len(asked) == count


def test_shapes_from_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("qwen2", layers=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert checkpoint_shapes(str(tmp_path)) == shapes_of(dict(model.named_parameters()))
    assert checkpoint_shapes(str(tmp_path / "..")) == {}  # no safetensors files there: nothing to compare with


def test_tensors_by_way_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.rollout.vllm_weights.SPOOL_BYTES", 5000)
    tensors = {**state(), "half": torch.randn(3, 5).bfloat16(), "view": torch.randn(8, 4).t()}
    with spooled(tensors.items()) as folder:
        assert len(os.listdir(folder)) > 2
        back = dict(spooled_tensors(folder))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    assert not Path(folder).exists()


def test_quantised_engines_and_those_told_how_load_their_weights() -> None:
    plain, quantised = SimpleNamespace(quantization=None), SimpleNamespace(quantization="fp8")
    assert may_start_empty(plain, {"dtype": "bfloat16"})
    assert not may_start_empty(quantised, {})
    assert not may_start_empty(plain, {"load_format": "runai_streamer"})


# ---- the probe ---------------------------------------------------------------------------------------


def test_probe_within_and_beyond_its_tolerance() -> None:
    trainer = [-1.0, -2.0, -3.0, -4.0]
    assert check_probe(trainer, [-1.1, -1.9, -3.1, -3.9], 0.11, 3) == pytest.approx(0.1)
    with pytest.raises(ProbeFailed) as failed:
        check_probe(trainer, [-1.5, -2.0, -3.0, -5.5], 0.3, 3)
    for part in ("update 3", "-2.5000", "-3.0000", "difference| 0.5 nats", "largest 1.5", "tolerance 0.3"):
        assert part in str(failed.value)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_probe_fails_on_numbers_that_are_not_finite(wrong: float) -> None:
    with pytest.raises(ProbeFailed):
        check_probe([-1.0, -2.0], [-1.0, wrong], 1e9, 1)
    with pytest.raises(ProbeFailed):
        check_probe([-1.0, wrong], [-1.0, -2.0], 1e9, 1)


def test_probe_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 log-probabilities by the trainer, 1 by the sampler"):
        check_probe([-1.0, -2.0], [-1.0], 0.1, 1)
    with pytest.raises(ValueError, match="0 log-probabilities"):
        check_probe([], [], 0.1, 1)


def test_probe_tokens() -> None:
    tokens = probe_tokens(50_000)
    assert tokens == probe_tokens(50_000) and len(set(tokens)) == 64
    assert min(tokens) >= 0 and 25_000 < max(tokens) < 50_000
    assert set(probe_tokens(3, 100)) == {0, 1, 2}


# ---- the sampler over an engine ----------------------------------------------------------------------


def test_the_sampler_gives_what_its_engine_gives() -> None:
    """LocalEngine in vLLM's place: same streams, so the same samples as LocalSampler's, in the prompts' order."""
    model, prompts = tiny_model("llama"), token_lists([3, 9, 1, 5])
    sampler = VLLMSampler(LocalEngine(LocalSampler(model, tokenizer(), version=4)))
    told: list[tuple[int, int]] = []
    sampler.progress = lambda done, total: told.append((done, total))
    params, streams = SamplingParams(n=2, max_tokens=6, seed=3), [7, 2, 90, 4]
    assert sampler.generate(prompts, params, streams=streams) == LocalSampler(model, tokenizer(), version=4).generate(
        prompts, params, streams=streams
    )
    assert sampler.generate(prompts, params) == sampler.generate(prompts, params, streams=range(4))
    assert told[-1] == (8, 8)
    assert sampler.version == 4
    sampler.update_weights(tiny_model("llama", seed=5).named_parameters(), 5)
    assert {s.weights_version for g in sampler.generate(prompts, params) for s in g} == {5}
    with pytest.raises(ValueError, match="the prompt is empty"):
        sampler.generate([[3], []], params)
    assert sampler.engine.idle()
    sampler.release()
    sampler.close()
