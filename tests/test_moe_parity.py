"""Our model against transformers' DeepseekV3ForCausalLM on the same checkpoint, both ways, values and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny_moe import model_of, relative, token_ids
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
)

from model import MoEConfig, MoEForCausalLM
from model.mla import MultiHeadLatentAttention
from model.rope import angles
from rl.policy.load import model_config
from rl.recipe_model import ModelSpec

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# A wider one: uneven sizes, two shared experts, no groups.
MID = {
    "vocab_size": 700, "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 72,
    "n_routed_experts": 24, "num_experts_per_tok": 5, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
    "num_attention_heads": 6, "num_key_value_heads": 6, "v_head_dim": 24, "first_k_dense_replace": 2,
}  # fmt: skip
CASES = {
    "tiny": {},
    "no q_lora": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "yarn with another mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "factor": 40.0}},
    "mid": MID,
    "mid, yarn, no q_lora": {**MID, "rope_parameters": YARN, "q_lora_rank": None},
    "not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.3},
    "attention bias": {"attention_bias": True},
    # Moonlight's way: no groups, another ε in the norms of states than in those of latents.
    "moonlight": {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rms_norm_eps": 1e-2},
    "halves instead of pairs": {"rope_interleave": False},
}


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_checkpoints_equal_transformers(case, implementation, tmp_path):
    model = model_of(expert_products=implementation, **CASES[case])
    model.save_pretrained(tmp_path / "ours")
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    ids = torch.randint(model.config.vocab_size, (2, 80), generator=torch.Generator().manual_seed(1))
    ours, want = (m(ids, labels=ids, use_cache=False) for m in (model.train(), theirs.train()))
    assert relative(ours.logits, want.logits) < 1e-5
    ours.loss.backward()
    want.loss.backward()
    wanted = dict(theirs.named_parameters())
    assert set(wanted) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, wanted[name].grad) < 1e-5, name

    theirs.save_pretrained(tmp_path / "theirs")
    back, info = MoEForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(back(ids, use_cache=False).logits, model.eval()(ids, use_cache=False).logits)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_softmax_routing_equals_transformers_deepseek_v2(method):
    routing = {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False, "routed_scaling_factor": 1.7}
    model = model_of(**routing)
    shape = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "model_type", "head_dim")}
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**shape, attn_implementation="eager"))
    weights = {name: t for name, t in model.state_dict().items() if not name.endswith("e_score_correction_bias")}
    theirs.load_state_dict(weights, strict=True)
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(model(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits) < 1e-5


def test_files_of_v2_are_read_and_written(tmp_path):
    """Type, names and values; V2's files have no routing biases, and say nothing of softmax."""
    routing = {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }
    model = model_of(**routing).eval()
    model.save_pretrained(tmp_path / "ours")
    theirs, info = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v2"
    (tmp_path / "theirs" / "config.json").write_text(
        json.dumps({k: v for k, v in written.items() if "scoring" not in k})
    )
    back = MoEForCausalLM.from_pretrained(tmp_path / "theirs")
    assert back.config.model_type == "deepseek_v3" and back.config.scoring_func == "softmax"
    assert model_config(ModelSpec(path=str(tmp_path / "theirs")), None).scoring_func == "softmax"
    ids = token_ids(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert relative(theirs(ids, use_cache=False).logits, expected) < 1e-5
        assert relative(back(ids, use_cache=False).logits, expected) < 1e-5


def test_the_files_are_of_the_released_layout(tmp_path):
    model_of().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["DeepseekV3ForCausalLM"] and written["model_type"] == "deepseek_v3"
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), DeepseekV3ForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).n_routed_experts == 16
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
        assert file.get_tensor("model.layers.1.mlp.experts.15.gate_proj.weight").shape == (64, 128)
    attention = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
    assert {f"model.layers.0.self_attn.{name}.weight" for name in attention} <= names
    assert {f"model.layers.3.mlp.shared_experts.{n}_proj.weight" for n in ("gate", "up", "down")} <= names


def test_parameter_counts_of_the_published_model():
    """671,026,404,352 in the main model, of which 37,552,282,624 work on a token, besides 14,848 routing biases."""
    config = MoEConfig.preset("671b")
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    prediction = {name for name in sizes if name.startswith("model.layers.61.")}
    total = sum(size for name, size in sizes.items() if name not in prediction)
    routed = sum(size for name, size in sizes.items() if ".experts." in name and name not in prediction)
    assert total == 671_026_404_352
    assert sum(sizes[name] for name in prediction) == 11_610_067_968  # besides the shared embedding and head
    assert total - routed + routed * config.num_experts_per_tok // config.n_routed_experts == 37_552_282_624
    biases = {name: b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert sum(size for name, size in biases.items() if ".61." not in name) == 14_848


def test_parameter_count_of_the_small_published_model():
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig.preset("16b"))
    assert sum(p.numel() for p in model.parameters()) == 15_706_484_224


@pytest.mark.parametrize("case", ["tiny", "yarn", "mid, yarn, no q_lora"])
def test_absorbed_attention_equals_the_expanded_form(case):
    """Decoding from latents alone: same scores, same output, 1e-5."""
    model = model_of(**CASES[case])
    attention: MultiHeadLatentAttention = model.model.layers[0].self_attn
    x = torch.randn(2, 70, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    rotation = angles(torch.arange(70)[None], model.model.frequency, 1.0, x.dtype)
    mask = torch.full((70, 70), float("-inf")).triu(1)
    with torch.no_grad():
        want = attention(x, rotation, mask)
        q = attention.absorb_query(*attention.queries(x, rotation))
        latent, k_rope = attention.latents(x, rotation)
        scores = torch.einsum("bshd,btd->bhst", q, torch.cat([latent, k_rope], -1)) * attention.scaling + mask
        got = attention.absorb_output(torch.einsum("bhst,btr->bshr", scores.softmax(-1), latent))
    assert relative(got, want) < 1e-5
    assert latent.shape[-1] + k_rope.shape[-1] == model.config.latent_values_per_token


def test_generate_with_the_latent_cache_equals_full_forwards():
    model = model_of(rope_parameters=YARN).eval()
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(3))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    for length in range(9, 21):
        logits = model(out[:, :length], use_cache=False).logits[:, -1]
        assert torch.equal(logits.argmax(-1), out[:, length])


def test_packed_documents_see_nothing_of_each_other():
    model = model_of().eval()
    first, second = (torch.randint(512, (1, n), generator=torch.Generator().manual_seed(n)) for n in (11, 17))
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(11), torch.arange(17)])[None]
    with torch.no_grad():
        got = model(packed, position_ids=positions).logits
        assert relative(got[:, :11], model(first).logits) < 1e-5
        assert relative(got[:, 11:], model(second).logits) < 1e-5
    with pytest.raises(ValueError, match="packed documents"):
        model(packed, position_ids=positions, attention_mask=torch.ones_like(packed))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"scoring_func": "tanh"}, "scoring_func must be one of sigmoid, softmax"),
        ({"n_group": 5}, "n_group: 5 groups do not divide"),
        ({"topk_group": 9}, "topk_group: 9 of n_group = 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 experts cannot be chosen"),
        ({"n_group": 16}, "noaux_tc scores a group by its two best"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.preset("tiny", **changes)
    with pytest.raises(ValueError, match="no preset 'huge'"):
        MoEConfig.preset("huge")
