"""The experts that vLLM's tokens met, on their way into training. vLLM records on a GPU; here are records like its."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_moe import model_of

from recipes import grpo
from rl.check_rollout import check_rollout
from rl.policy.moe import ExpertTraining
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.recipe import MoESpec
from rl.recipe_io import RecipeError, validate
from rl.rollout.make import _options
from rl.rollout.types import Sample
from rl.rollout.vllm_arguments import engine_config
from rl.rollout.vllm_engine import VLLMEngine
from rl.rollout.vllm_routing import expert_layers, of_expert_layers

TOKENS, EXPERTS, CHOSEN = 7, 16, 4


def record(layers: int, with_experts: list[int], experts: int = EXPERTS, seed: int = 0) -> np.ndarray:
    """As vLLM gives it: [tokens, all layers, K], zeros where a layer has no experts."""
    draw = np.random.default_rng(seed)
    routed = np.zeros((TOKENS, layers, CHOSEN), dtype=np.uint8 if experts <= 256 else np.uint16)
    for token in range(TOKENS):
        for layer in with_experts:
            routed[token, layer] = draw.permutation(experts)[:CHOSEN]
    return routed


# ---- which layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("olmoe", {}),
    ],
)
def test_layers_with_experts_are_those_of_the_model(family: str, settings: dict[str, Any]) -> None:
    model = tiny_model(family, layers=5, **settings)
    found = [i for i, layer in enumerate(model.base_model.layers) if hasattr(layer.mlp, "experts")]
    assert expert_layers(model.config) == found and found


def test_layers_between_dense_ones() -> None:
    config = SimpleNamespace(model_type="deepseek_v2", num_hidden_layers=7, first_k_dense_replace=1, moe_layer_freq=2)
    assert expert_layers(config) == [2, 4, 6]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(RecipeError, match="which layers of a novel_moe have experts is not known"):
        expert_layers(SimpleNamespace(model_type="novel_moe", num_hidden_layers=2))


# ---- the record --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (300, np.int16)])
def test_a_record_is_cut_to_the_layers_with_experts(experts: int, dtype: type) -> None:
    routed = record(6, [3, 5], experts)
    kept = of_expert_layers(routed, [3, 5], TOKENS)
    assert kept.dtype == dtype and kept.shape == (TOKENS, 2, CHOSEN)
    assert (kept[:, 0] == routed[:, 3]).all() and (kept[:, 1] == routed[:, 5]).all()
    assert torch.from_numpy(kept).long().max() == routed.max()


@pytest.mark.parametrize("believed", [[2, 3], [3], [2, 3, 5]])
def test_a_record_of_other_layers_is_refused(believed: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"in the layers \[3, 5\]; by the model's config"):
        of_expert_layers(record(6, [3, 5]), believed, TOKENS)


def test_a_record_of_other_tokens_or_none_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape \(7, 6, 4\); expected 8 tokens"):
        of_expert_layers(record(6, [3, 5]), [3, 5], 8)
    with pytest.raises(RuntimeError, match="layers up to 6"):
        of_expert_layers(record(6, [3, 5]), [3, 6], TOKENS)
    with pytest.raises(RuntimeError, match="gave none"):
        of_expert_layers(None, [3], TOKENS)


def sampled(routed: Any, layers: list[int] | None) -> Sample:
    """What the engine makes of a completion of 3 tokens to a prompt of 5."""
    engine = VLLMEngine.__new__(VLLMEngine)
    engine._expert_layers, engine._version = layers, 4
    completion = SimpleNamespace(
        token_ids=[5, 6, 2], logprobs=SimpleNamespace(logprobs=[-1.0, -2.0, -3.0]), finish_reason="stop",
        weight_versions=[], routed_experts=routed,
    )  # fmt: skip
    return engine._sample(completion, 5)


def test_samples_carry_what_training_reads() -> None:
    routed = record(4, [1, 2, 3])
    sample = sampled(routed, [1, 2, 3])
    assert sample.token_ids == [5, 6, 2] and (sample.routed_experts == routed[:, 1:]).all()
    assert sampled(None, None).routed_experts is None


# ---- whether vLLM records ----------------------------------------------------------------------------


class Arguments:
    """vLLM's, as far as they matter here; on a CPU it refuses to record."""

    refuses = False

    def __init__(self, **arguments: Any):
        self.arguments = arguments

    def create_engine_config(self) -> dict[str, Any]:
        if self.refuses and self.arguments.get("enable_return_routed_experts"):
            raise ValueError("AuxOutput Connector requires Model Runner V2")
        return self.arguments


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Arguments]:
    arguments = type("EngineArgs", (Arguments,), {})
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=arguments))  # type: ignore[arg-type]
    return arguments


def test_vllm_records_where_it_can(vllm: type[Arguments]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, recording = engine_config({"model": "m"}, record_routing=True)
        assert recording and config == {"model": "m", "enable_return_routed_experts": True}
        assert engine_config({"model": "m"}, record_routing=False) == ({"model": "m"}, False)
        for wish in (True, False):  # the user's own word
            given = {"enable_return_routed_experts": wish}
            assert engine_config(given, record_routing=True) == (given, wish)


def test_where_vllm_cannot_record_it_samples_without(vllm: type[Arguments]) -> None:
    vllm.refuses = True
    with pytest.warns(UserWarning, match="does not record the experts that tokens meet: AuxOutput Connector requires"):
        assert engine_config({"model": "m"}, record_routing=True) == ({"model": "m"}, False)
    with pytest.raises(ValueError, match="AuxOutput"):
        engine_config({"enable_return_routed_experts": True}, record_routing=True)


# ---- the recipe --------------------------------------------------------------------------------------


def recipe_of(tmp_path: Any, **rollout: Any) -> Any:
    moe = {"scratch": {"preset": "tiny"}, "dtype": "float32"}
    changes = {f"rollout__{name}": value for name, value in rollout.items()}
    return validate(grpo(tmp_path, model=moe, moe={"replay_routing": True}, **changes))


def test_engines_that_the_recipe_starts_are_empty_and_record(tmp_path: Any) -> None:
    """Random until the first update: a weight that never arrives is noise, which the probe sees."""
    for mode in ({"mode": "colocate"}, {"mode": "server", "workers": {"count": 1}}):
        options = _options(recipe_of(tmp_path, engine="vllm", **mode), True, 0)
        assert options["empty"] is True and options["record_routing"] is True
    options = {"empty": False, "record_routing": False}
    given = recipe_of(tmp_path, engine="vllm", mode="server", workers={"count": 1, "options": options})
    assert _options(given, True, 0).items() >= options.items()
    local = _options(recipe_of(tmp_path, mode="server", workers={"count": 1}), True, 0)
    assert "empty" not in local and local["record_routing"] is True


def test_rl_check_says_where_nothing_will_be_recorded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(**rollout: Any) -> list[str]:
        return [w for w in check_rollout(recipe_of(tmp_path, **rollout)) if "record" in w or "replay" in w]

    def workers(**options: Any) -> dict[str, Any]:
        return {"engine": "vllm", "mode": "server", "workers": {"count": 1, "options": options}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not warned() and not warned(**workers())
    for name in ("record_routing", "enable_return_routed_experts"):
        (warning,) = warned(**workers(**{name: False}))
        assert warning.startswith(f"rollout.workers.options.{name}: false")
    (warning,) = warned(**workers(pipeline_parallel_size=2))
    assert "pipeline_parallel_size: with it vLLM records no routing" in warning
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    urls = {"urls": ["http://127.0.0.1:1"], "secret_file": str(secret)}
    (warning,) = warned(engine="vllm", mode="server", workers=urls)
    assert "started them with record_routing=true" in warning
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (warning,) = warned(**workers())
    assert "on a GPU only" in warning
    dense = validate(grpo(tmp_path, **{f"rollout__{name}": value for name, value in workers().items()}))
    assert not [w for w in check_rollout(dense) if "routing" in w]


# ---- the replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "number", "message"),
    [
        ((2, 4), 0, "4 experts a token in 2 layers"),
        ((3, 3), 0, "3 experts a token in 3 layers"),
        ((3, 4), 16, "numbered up to 16"),
    ],
)
def test_routing_of_another_model_is_refused(shape: tuple[int, int], number: int, message: str) -> None:
    model = model_of()  # four layers, the first dense; 4 of 16 experts a token
    assert len(model.model.expert_layers) == 3
    policy = Policy(model, experts=ExpertTraining(model, MoESpec(sequence_loss=0), 1))
    routed = torch.full((6, *shape), number, dtype=torch.uint8)
    (pack,) = policy.pack([Document([5, 6, 7], [8, 9, 10, 11], routed=routed)], 100)
    with pytest.raises(RecipeError, match=f"moe.replay_routing: the sampler recorded .*{message}"):
        policy.logprobs(pack)


def test_a_layer_refuses_routing_of_other_tokens() -> None:
    model = model_of()
    routing = {layer: torch.zeros(3, 4, dtype=torch.long) for layer in model.model.expert_layers}
    with pytest.raises(ValueError, match=r"layer 1: routing of shape \(3, 4\) for 5 tokens of 4 experts each"):
        model(torch.arange(5)[None], routing=routing)
