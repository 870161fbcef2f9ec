"""Checkpoints of the released layout: FP8 round trip, what is refused, what other tools read, the command line."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_moe import model_of, relative, token_ids
from transformers import AutoConfig, DeepseekV3ForCausalLM

from model import MoEConfig, MoEForCausalLM
from model.checkpoint import Checkpoint, CheckpointError, save_fp8
from model.checkpoint.__main__ import main
from model.checkpoint.export import released_piece
from model.checkpoint.names import main_tensors, module_copies

# Several blocks and ragged edges in both directions: dense 200 x 320, latents 48 x 200, queries 192 x 64.
SHAPE = {"hidden_size": 200, "intermediate_size": 320, "num_nextn_predict_layers": 1, "num_hidden_layers": 3}

WHOLE_BLOCKS = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 128, "v_head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return model_of(**SHAPE)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """Its folder in float32, one file."""
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fp8(model, tmp_path_factory):
    """Its folder in FP8, several files."""
    folder = tmp_path_factory.mktemp("fp8") / "new"
    save_fp8(model, folder, max_shard_size="300KB")
    return folder


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def same_state(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_fp8_files_are_of_the_released_layout(model, fp8):
    tensors = tensors_of(fp8)
    attention = r"q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
    projection = rf"(self_attn\.({attention})|mlp\.(experts\.\d+\.|shared_experts\.|)(gate|up|down)_proj)\.weight"
    quantised = {name for name in tensors if re.fullmatch(rf"model\.layers\.\d+\.{projection}", name)}
    assert len(quantised) == 4 * 5 + 3 + 3 * 17 * 3
    for name, tensor in tensors.items():
        if name in quantised:
            assert tensor.dtype == torch.float8_e4m3fn
            scale, (rows, columns) = tensors[f"{name}_scale_inv"], tensor.shape
            assert scale.dtype == torch.float32 and scale.shape == (-(-rows // 128), -(-columns // 128))
        elif not name.endswith("_scale_inv"):
            assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    assert {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")} == quantised
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    files = list(fp8.glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 320_000 for path in files)
    index = json.loads((fp8 / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_round_trip_is_within_the_bound_of_every_element(model, fp8):
    back = MoEForCausalLM.from_pretrained(fp8, dtype=torch.float32).state_dict()
    tensors = tensors_of(fp8)
    for name, weight in main_tensors(model.state_dict(), model.config).items():
        got = main_tensors(back, model.config)[name]
        if f"{name}_scale_inv" in tensors:
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0)[: len(weight)]
            scale = scale.repeat_interleave(128, 1)[:, : weight.shape[1]]
            assert not torch.equal(got, weight)
            assert ((got - weight).abs() <= torch.maximum(weight.abs() / 16, scale / 1024) * 1.00001).all(), name
        else:
            assert torch.equal(got, weight if name.endswith("bias") else weight.bfloat16().float()), name


def test_config_says_what_type_to_load_in(model, fp8, plain):
    loaded = MoEForCausalLM.from_pretrained(fp8)
    kept = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {name for name in model.state_dict() if name.endswith("e_score_correction_bias")}
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.model.frequency, model.model.frequency) and not loaded.model.load_LE.any()
    assert not hasattr(loaded.config, "quantization_config")
    assert MoEForCausalLM.from_pretrained(plain).dtype == torch.float32
    assert MoEConfig(quantization_config={"quant_method": "fp8"}).dtype == torch.bfloat16


def test_weights_and_scales_in_other_files_and_all_in_one(fp8, tmp_path):
    tensors = tensors_of(fp8)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        shutil.copy(fp8 / "config.json", folder)
    save_file(tensors, one / "model.safetensors")
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, tensor in tensors.items():  # all scales come before all weights
        parts[sorted(parts)[not name.endswith("_scale_inv")]][name] = tensor
    for file, part in parts.items():
        save_file(part, two / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (two / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = MoEForCausalLM.from_pretrained(fp8)
    assert same_state(MoEForCausalLM.from_pretrained(one), loaded)
    assert same_state(MoEForCausalLM.from_pretrained(two), loaded)


def test_transformers_reads_fp8_folders(fp8, tmp_path):
    """Its own dequantisation, on the CPU, gives the same weights, so the same logits. (It takes no ragged blocks.)"""
    config = AutoConfig.from_pretrained(fp8)
    assert config.quantization_config == {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    }  # fmt: skip
    assert config.model_type == "deepseek_v3" and config.architectures == ["DeepseekV3ForCausalLM"]
    save_fp8(model_of(**WHOLE_BLOCKS), tmp_path)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    ours = MoEForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = token_ids(2, 12)
    with torch.no_grad():
        assert relative(ours.float()(ids).logits, theirs.float()(ids).logits) < 1e-5


def test_published_size():
    """The files of the release are 688,586,727,753 bytes long, headers of 100 to 200 bytes a tensor included. So what
    we write in FP8 and what not is what they do: eh_proj alone would differ by 103 MB."""
    config = MoEConfig.preset("671b")
    with torch.device("meta"):
        named = main_tensors(MoEForCausalLM(config).state_dict(), config)
    named.update({copy: named[name] for copy, name in module_copies(config).items()})
    layout = [t for name, w in named.items() for t in released_piece(name, tuple(w.shape), w.clone).layout.values()]
    headers = 688_586_727_753 - sum(t.numel() * t.element_size() for t in layout)
    assert len(layout) == 91_991
    assert 100 < headers / len(layout) < 200


def test_biases_keep_float32(tmp_path):
    model = model_of()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(1 + 2**-12 * torch.arange(16))  # not bfloat16 numbers
    model.bfloat16()
    model.model.layers[1].mlp.gate.e_score_correction_bias = kept = (1 + 2**-12 * torch.arange(16)).float()
    model.save_pretrained(tmp_path / "plain")
    save_fp8(model, tmp_path / "fp8")
    for folder in ("plain", "fp8"):
        back = MoEForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert torch.equal(back.model.layers[1].mlp.gate.e_score_correction_bias, kept)


# (fields given at loading, what the error suspects)
MISFITS = [
    ({"n_routed_experts": 32}, "n_routed_experts"),
    ({"n_routed_experts": 8}, "n_routed_experts"),
    ({"num_hidden_layers": 4}, "num_hidden_layers"),
    ({"num_hidden_layers": 2}, "num_hidden_layers"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers (the files hold 1 prediction modules: pass 1)"),
    ({"q_lora_rank": None}, "q_lora_rank"),
    ({"q_lora_rank": 48}, "q_lora_rank"),
    ({"kv_lora_rank": 16}, "kv_lora_rank, qk_rope_head_dim"),
    ({"first_k_dense_replace": 2}, "first_k_dense_replace"),
    ({"vocab_size": 500}, "vocab_size"),
    ({"hidden_size": 64}, "hidden_size"),
    ({"intermediate_size": 64}, "intermediate_size"),
    ({"moe_intermediate_size": 96}, "moe_intermediate_size, n_shared_experts"),
    ({"n_shared_experts": 2}, "n_shared_experts, moe_intermediate_size"),
    ({"attention_bias": True}, "attention_bias"),
]


@pytest.mark.parametrize("changes,suspects", MISFITS, ids=[f"{name}={v}" for m, _ in MISFITS for name, v in m.items()])
def test_a_config_that_does_not_fit_is_named(plain, changes, suspects):
    with pytest.raises(CheckpointError) as error:
        MoEForCausalLM.from_pretrained(plain, **changes)
    first = str(error.value).splitlines()[0]
    assert first.startswith(f"{plain} does not fit its config: ") and first.endswith(f". Look at: {suspects}")


def test_the_error_lists_names_and_shapes(plain, tmp_path):
    tensors = tensors_of(plain)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(5, 200)
    for expert in range(9):  # 27 names: more than are shown
        for part in ("gate", "up", "down"):
            del tensors[f"model.layers.2.mlp.experts.{expert}.{part}_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(plain / "config.json", tmp_path)
    with pytest.raises(CheckpointError) as error:
        MoEForCausalLM.from_pretrained(tmp_path)
    text = str(error.value)
    assert "28 tensors missing, 1 unexpected, 1 of another shape" in text
    assert "  ... and 8 more\n" in text and "unexpected:\n  model.extra\n" in text
    assert "  lm_head.weight: (5, 200) in the files, (512, 200) by the config" in text


def test_without_prediction_modules_in_the_files_the_error_says_what_to_pass(tmp_path):
    model_of().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"num_nextn_predict_layers \(the files hold 0 .*: pass 0\)"):
        MoEForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=1)
    assert MoEForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0).model.prediction_modules == []


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_prediction_modules_of_the_files_can_be_left_out(kind, request):
    folder = request.getfixturevalue(kind)
    with pytest.warns(UserWarning, match=r"prediction modules in layers \[3\] are not loaded"):
        smaller = MoEForCausalLM.from_pretrained(folder, num_nextn_predict_layers=0).state_dict()
    whole = MoEForCausalLM.from_pretrained(folder).state_dict()
    assert smaller.keys() == {name for name in whole if not name.startswith("model.layers.3.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in smaller.items())


def test_a_module_whose_copies_differ_is_reported(plain, tmp_path):
    shutil.copy(plain / "config.json", tmp_path)
    tensors = {**tensors_of(plain), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning) as caught:
        loaded = MoEForCausalLM.from_pretrained(tmp_path)
    ours = [str(w.message) for w in caught if "shared" in str(w.message)]
    assert len(ours) == 1 and "model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight" in ours[0]
    assert torch.equal(loaded.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoEForCausalLM.from_pretrained(plain)


def test_copies_are_saved_unless_told_otherwise(model, tmp_path):
    model.save_pretrained(tmp_path / "with", max_shard_size="500KB")
    model.save_pretrained(tmp_path / "without", repeat_shared=False)
    extra = tensors_of(tmp_path / "with").keys() - tensors_of(tmp_path / "without").keys()
    assert extra == {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    sizes = [path.stat().st_size for path in (tmp_path / "with").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 520_000
    for folder in ("with", "without"):
        assert same_state(MoEForCausalLM.from_pretrained(tmp_path / folder), model)


def test_tied_embeddings(tmp_path):
    model = model_of(num_nextn_predict_layers=1, tie_word_embeddings=True)
    model.tie_weights()
    save_fp8(model, tmp_path / "fp8")
    model.save_pretrained(tmp_path / "plain")
    for folder in ("plain", "fp8"):
        assert "lm_head.weight" not in tensors_of(tmp_path / folder)
        back = MoEForCausalLM.from_pretrained(tmp_path / folder)
        assert back.lm_head.weight is back.model.embed_tokens.weight
    ids = token_ids(1, 9)
    plain = MoEForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.eval()(ids).logits)


def test_files_without_biases_load_where_the_routing_reads_none(tmp_path):
    """DeepSeek-V2's, for example."""
    model = model_of(scoring_func="softmax", topk_method="greedy")
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    assert not any(name.endswith("_bias") for name in tensors)
    back = MoEForCausalLM.from_pretrained(tmp_path)
    assert not back.model.layers[1].mlp.gate.e_score_correction_bias.any()
    with pytest.raises(CheckpointError, match="3 tensors missing.*topk_method"):
        MoEForCausalLM.from_pretrained(tmp_path, topk_method="noaux_tc")


def test_device_map_and_values_given_as_a_dict(model, plain):
    by_map = MoEForCausalLM.from_pretrained(plain, device_map={"model": "cpu", "lm_head": "cpu"})
    assert same_state(by_map, model)
    given = MoEForCausalLM.from_pretrained(None, config=model.config, state_dict=tensors_of(plain))
    assert same_state(given, model)


def test_a_repository_of_the_hub_by_revision(fp8, tmp_path):
    """From the hub's cache, as when offline."""
    snapshot = tmp_path / "models--some--moe" / "snapshots" / ("a" * 40)
    shutil.copytree(fp8, snapshot)
    (tmp_path / "models--some--moe" / "refs").mkdir()
    (tmp_path / "models--some--moe" / "refs" / "v2").write_text("a" * 40)
    loaded = MoEForCausalLM.from_pretrained("some/moe", revision="v2", cache_dir=tmp_path, local_files_only=True)
    assert same_state(loaded, MoEForCausalLM.from_pretrained(fp8))
    with pytest.raises(OSError):
        MoEForCausalLM.from_pretrained("some/moe", revision="v3", cache_dir=tmp_path, local_files_only=True)


NAME = "model.layers.0.self_attn.o_proj.weight"
BAD_FILES = {
    "no scale": (lambda t: t.pop(f"{NAME}_scale_inv"), {}, f"{NAME} is in FP8, but {NAME}_scale_inv is not there"),
    "scale too small": (
        lambda t: t.update({f"{NAME}_scale_inv": torch.ones(1, 1)}), {}, r"has the shape \(1, 1\).* need \(2, 1\)",
    ),
    "scale of nothing": (lambda t: t.update({"a.weight_scale_inv": torch.ones(1)}), {}, "belongs to no FP8 weight"),
    "another type": (lambda t: t.update({NAME: t[NAME].to(torch.float8_e5m2)}), {}, "of type F8_E5M2"),
    "another method": (lambda t: None, {"quant_method": "awq"}, "must be quant_method fp8"),
    "per tensor": (lambda t: None, {"quant_method": "fp8"}, "weight_block_size of two numbers, not fp8 with None"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_fp8_files_that_cannot_be_understood_are_refused(case, fp8, tmp_path):
    change, settings, message = BAD_FILES[case]
    tensors = tensors_of(fp8)
    change(tensors)
    config = json.loads((fp8 / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, **({"quantization_config": settings} if settings else {})})
    )
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        MoEForCausalLM.from_pretrained(tmp_path)


def test_exports_refuse_what_is_not_finite_and_overwrite_nothing(model, fp8, tmp_path):
    with pytest.raises(CheckpointError, match="is not empty"):
        save_fp8(model, fp8)
    broken = model_of()
    broken.model.layers[2].mlp.experts.down_proj.data[3, 1, 1] = float("nan")
    with pytest.raises(CheckpointError, match="layers.2.mlp.experts.3.down_proj.weight holds a NaN"):
        save_fp8(broken, tmp_path)
    assert not (tmp_path / "config.json").exists()  # so that nobody takes it for finished


def test_command_line_converts_there_and_back(model, plain, fp8, tmp_path, capsys):
    (plain / "tokenizer.json").write_text("{}")
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["export-fp8", str(plain), str(there), "--max-shard-size", "300KB"]) == 0
    converted, exported = tensors_of(there), tensors_of(fp8)
    assert converted.keys() == exported.keys() and len(list(there.glob("*.safetensors"))) > 3
    for name, tensor in exported.items():
        assert tensor.dtype == converted[name].dtype
        assert torch.equal(tensor.view(torch.uint8), converted[name].view(torch.uint8)), name
    assert main(["dequantise", str(there), str(back)]) == 0
    assert (back / "tokenizer.json").exists() and "quantization_config" not in (back / "config.json").read_text()
    assert same_state(MoEForCausalLM.from_pretrained(back), MoEForCausalLM.from_pretrained(fp8))
    assert main(["dequantise", str(back), str(tmp_path / "x")]) == 2
    assert main(["export-fp8", str(there), str(tmp_path / "y")]) == 2
    assert main(["export-fp8", str(plain), str(there)]) == 2
    assert main(["export-fp8", str(tmp_path), str(tmp_path / "z")]) == 2
    assert main(["export-fp8", "nowhere", str(tmp_path / "z")]) == 2
    (back / "config.json").write_text('{"model_type": "llama"}')
    assert main(["export-fp8", str(back), str(tmp_path / "z")]) == 2
    errors = capsys.readouterr().err.splitlines()
    causes = ("no FP8 weights", "in FP8 already", "is not empty", "no config.json", "nowhere is no folder", "llama")
    assert len(errors) == 6 and all(cause in line for cause, line in zip(causes, errors, strict=True))


def test_unreadable_files(plain, tmp_path):
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    bad: list[tuple[object, str]] = [
        (None, "neither model.safetensors.index.json nor model.safetensors"),
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ({}, "there is no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "1 files that are not there: gone.safetensors"),
        ({"weight_map": {"a": "model.safetensors"}}, "1 tensors that are in no file: a"),
    ]
    for content, message in bad:
        if content is not None:
            index.write_text(content if isinstance(content, str) else json.dumps(content))
            shutil.copy(plain / "model.safetensors", file)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.in_folder(tmp_path)
    index.unlink()
    file.write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        Checkpoint.in_folder(tmp_path)
