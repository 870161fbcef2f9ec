"""Context extension by YaRN, through the recipe at a tiny size; and continued pre-training on whole texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tiny_moe import relative
from transformers import DeepseekV3ForCausalLM

from data.spec import TextSpec
from model import MoEConfig, MoEForCausalLM
from recipes import metrics, run
from rl.documents import texts
from rl.policy.load import character_tokenizer
from rl.recipe_io import RecipeError

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16,
    "v_head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def write_texts(folder: Path, lengths: list[int]) -> Path:
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choice(["ab", "cd", "ef"]) for _ in range(n // 3))} for n in lengths]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def base_model(folder: Path) -> Path:
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = MoEConfig.preset("tiny", **SHAPE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    MoEForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def test_the_recipe_extends_a_model_and_short_texts_are_as_yarn_defines(tmp_path):
    base, path = base_model(tmp_path), write_texts(tmp_path, [90, 150, 200, 260, 300, 30])
    rope = json.dumps(ROPE)
    smaller = [
        f"stages.{stage}.{field}"
        for stage, positions, shortest in (("extend-32k", 128, 80), ("extend-128k", 256, 140))
        for field in (
            f"model.config={{max_position_embeddings: {positions}, rope_parameters: {rope}}}",
            "model.dtype=float32",
            f"texts.min_tokens={shortest}",
            f"sft={{steps: 4, batch_size: 2, max_tokens: {positions}, tokens_per_microbatch: {positions}}}",
            "optimizer.learning_rate=1e-3",
        )
    ]
    arguments = [f"values.model={base}", f"values.texts={{path: {path}}}", f"output_dir={tmp_path / 'run'}", *smaller]
    result = run("recipes/context-extension.yaml", *arguments)
    assert result.returncode == 0, result.stderr
    assert "(1 left out for their length)" in result.stdout  # the text that is shorter than min_tokens
    rows = metrics(tmp_path / "run" / "extend-128k")
    assert len(rows) == 4 and rows[-1]["tokens_trained"] > 256 and rows[-1]["mtp_loss"] > 0

    folder = tmp_path / "run" / "extend-128k" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["rope_parameters"]["factor"] == 4.0
    ours, theirs = MoEForCausalLM.from_pretrained(folder).eval(), DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(8, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(ours(ids).logits, theirs(ids).logits) < 1e-5
    # Before any training: fast frequencies are kept, slow ones divided by the factor, in between a ramp.
    before = MoEForCausalLM.from_pretrained(base).model.frequency
    after = ours.model.frequency
    assert torch.equal(after[0], before[0]) and float(after[-1]) == pytest.approx(float(before[-1]) / 4, rel=1e-6)
    assert bool(((after <= before) & (after >= before / 4 - 1e-9)).all())


def test_texts_are_cut_learned_whole_and_counted(tmp_path):
    tokenizer = character_tokenizer()
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abcdefgh"}\n{"text": "xy"}\n')
    spec = TextSpec(path=str(path), min_tokens=5)
    documents, dropped = texts(spec, tokenizer, 4)
    assert dropped == 1
    pieces = [[*d.prompt_ids, *d.completion_ids] for d in documents]
    expected = [tokenizer.bos_token_id, *tokenizer.encode("abcdefgh", add_special_tokens=False), tokenizer.eos_token_id]
    assert [t for piece in pieces for t in piece] == expected and [len(p) for p in pieces] == [4, 4, 2]
    assert all(d.mask is None and len(d.prompt_ids) == 1 for d in documents)
    with pytest.raises(RecipeError, match=r"texts.min_tokens: no text has 50 tokens; 2 were shorter"):
        texts(TextSpec(path=str(path), min_tokens=50), tokenizer, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"body": "a"}', "column 'text'; the source has body"), ('{"text": 3}', "text holds no text (3)")],
)
def test_bad_texts_are_refused_with_their_place(content, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError) as error:
        texts(TextSpec(path=str(tmp_path / "t.jsonl")), character_tokenizer(), 100)
    assert message in str(error.value)
