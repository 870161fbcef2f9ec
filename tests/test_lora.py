"""Adapters: what they change, what they leave alone, and what is written of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, token_lists
from transformers import AutoModelForCausalLM

from recipes import SCRATCH, grpo, metrics
from rl.grpo import GRPO
from rl.policy.lora import adapters_off, add_adapters, block_of, merged, write_adapter
from rl.policy.processes import Processes
from rl.recipe_io import RecipeError, validate
from rl.recipe_model import LoRASpec

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def adapted(family: str, **spec):
    """A tiny model, what it was, and the same with adapters that do something."""
    base = tiny_model(family).requires_grad_(True)
    model = tiny_model(family)
    add_adapters(model, LoRASpec(**spec), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return base, model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.tensor(token_lists([17])), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_merged_weights_and_the_written_adapter_are_the_adapted_model(family, tmp_path):
    base, model = adapted(family, r=3, alpha=6.0)
    whole = dict(merged(model, ((n, p.detach()) for n, p in model.named_parameters())))
    assert whole.keys() == dict(base.named_parameters()).keys()
    want = logits(model)
    assert (want - logits(base)).abs().max() > 0.05
    base.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", model, model.named_parameters(), str(tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    assert (logits(peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))) - want).abs().max() < 1e-4
    base.load_state_dict(whole, strict=False)
    assert (logits(base) - want).abs().max() < 1e-4


def test_off_it_is_the_model_that_was_loaded_and_only_adapters_learn():
    base, model = adapted("llama")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained) and any("down_proj" in name for name in trained)
    on = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(logits(model), on) and not torch.equal(on, logits(base))


def test_which_layers():
    _, model = adapted("llama", target_modules=["q_proj", "v_proj"])
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    for wrong in ("q_porj", "lm_head"):
        with pytest.raises(RecipeError, match="model.lora.target_modules"):
            add_adapters(tiny_model("llama"), LoRASpec(target_modules=[wrong]), seed=0)


def test_samplers_get_the_blocks_that_have_adapters(tmp_path):
    """All of each block, as vLLM makes one tensor of q, k and v."""
    model = {"scratch": SCRATCH, "dtype": "float32", "lora": {"r": 4, "target_modules": ["q_proj"]}}
    trainer = GRPO(validate(grpo(tmp_path / "run", model=model)), Processes())
    with torch.no_grad():
        for name, parameter in trainer.policy.model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.1)
    before = dict(AutoModelForCausalLM.from_config(trainer.policy.model.config).named_parameters())
    all_, changed = dict(trainer.backend.named_weights()), dict(trainer.backend.changed_weights())
    assert all_.keys() == before.keys()
    assert {n.split(".")[-2] for n in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(torch.equal(changed[name], all_[name]) for name in changed)
    assert sum(n.endswith("q_proj.weight") for n in changed) == trainer.policy.model.config.num_hidden_layers
    assert block_of("model.layers.3.self_attn.q_proj.lora_A.default.weight") == "model.layers.3.self_attn"
    assert block_of("model.layers.3.mlp.gate.e_score_correction_bias") == "model.layers.3.mlp"


def test_grpo_trains_the_adapter_and_writes_both(tmp_path):
    model = {"scratch": SCRATCH, "dtype": "float32", "lora": {"r": 4}}
    recipe = grpo(tmp_path / "run", model=model, grpo__steps=2, grpo__kl__coefficient=0.1, optimizer__warmup_updates=0)
    trainer = GRPO(validate(recipe), Processes())
    start = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    trainer.run()
    for name, parameter in trainer.policy.model.named_parameters():
        assert torch.equal(parameter, start[name]) != (".lora_" in name), name
    rows = metrics(tmp_path / "run")
    # Before its first update the adapter changes nothing; from then on the reference is another policy.
    assert rows[0]["kl"] < rows[1]["kl"] and rows[1]["kl"] > 1e-6
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "tensors" / "00000.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    ids = torch.tensor(token_lists([9], vocabulary=90))
    with torch.no_grad():
        difference = (model(ids).logits - trainer.policy.model(ids, use_cache=False).logits).abs().max()
    assert difference < 1e-4
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(RecipeError, match="grpo.reference"):
        validate({**recipe, "grpo": {**recipe["grpo"], "reference": {"ema": 0.5}}})
