"""A mixture of experts of our own in the trainers: its further losses, its biases, replayed routing."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_resume import KILL
from tiny_models import documents, tiny_model, tokenizer
from tiny_moe import model_of, relative

from model import MoEForCausalLM
from model.router import sequence_balance
from recipes import SCRATCH, grpo, launch_two, metrics, run, sft, write
from rl.grpo import GRPO
from rl.policy.load import model_config
from rl.policy.moe import ExpertTraining
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.policy.processes import Processes
from rl.recipe import MoESpec
from rl.recipe_io import RecipeError, load_recipe
from rl.recipe_model import ModelSpec
from rl.rollout import LocalSampler, SamplingParams
from rl.sft import SFT

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
MODEL = {"scratch": {"preset": "tiny", "config": TINY}, "dtype": "float32"}
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


def policy_of(spec: MoESpec, **changes) -> Policy:
    model = model_of(**changes)
    return Policy(model, experts=ExpertTraining(model, spec, 10))


def naive_losses(model, documents: list[Document], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ over documents and layers of Σ f P, Σ over targets of -log p of the module), one document at a time."""
    balance, mtp = torch.zeros(()), torch.zeros(())
    config = model.config
    for document in documents:
        ids = [*document.prompt_ids, *document.completion_ids]
        read = torch.tensor(ids[:-1])
        seen: dict[int, torch.Tensor] = {}
        handles = []

        def keep(layer: int, seen=seen):
            return lambda _, inputs: seen.update({layer: inputs[0]})

        for layer in range(config.first_k_dense_replace, config.num_hidden_layers + depth):
            module = model.model.layers[layer].mlp
            handles.append(module.register_forward_pre_hook(keep(layer)))
        out = model.model(read[None], use_cache=False, mtp=depth > 0)
        for handle in handles:
            handle.remove()
        for layer, x in seen.items():
            s = (x @ model.model.layers[layer].mlp.gate.weight.t()).sigmoid()
            balance = balance + sequence_balance(
                s,
                s.topk(config.num_experts_per_tok).indices,
                torch.zeros(len(read), dtype=torch.long),
                1,
                counts="routed",
            )
        for k in range(1, depth + 1):
            logp = model.lm_head(out.mtp_hidden[k - 1][0]).log_softmax(-1)
            for t, token in enumerate(document.completion_ids):
                place = len(document.prompt_ids) + t - 1 - k
                if place >= 0 and (document.mask is None or document.mask[t]):
                    mtp = mtp - logp[place, token] / depth
    return balance, mtp


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [20, 50, 1000])
def test_further_losses_are_those_of_single_documents_for_every_split(budget, depth):
    spec = MoESpec(sequence_loss=0.01, mtp_loss=0.3)
    policy = policy_of(spec, num_nextn_predict_layers=depth)
    batch = [d for d in documents(vocabulary=512) if len(d) > 2]
    packs = policy.pack(batch, budget)
    assert (len(packs) == 1) == (budget == 1000)
    tokens = sum(sum(d.mask) if d.mask else len(d.completion_ids) for d in batch)
    total = torch.zeros(())
    for pack in packs:
        _, _, auxiliary = policy.training_logprobs(pack)
        total = total + policy.experts.loss(auxiliary, tokens, len(batch))
    total.backward()
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    policy.model.train()
    balance, mtp = naive_losses(policy.model, batch, depth)
    expected = 0.01 * balance / len(batch) + 0.3 * mtp / tokens
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None and float(parameter.grad.norm()) > 1e-9:
            assert relative(found[name], parameter.grad) < 2e-4, name


def test_apart_only_the_module_learns():
    policy = policy_of(MoESpec(sequence_loss=0, mtp_loss=0.3, mtp_apart=True), num_nextn_predict_layers=1)
    (pack,) = policy.pack(documents(vocabulary=512), 1000)
    _, _, auxiliary = policy.training_logprobs(pack)
    policy.experts.loss(auxiliary, 1, 1).backward()
    learns = {n for n, p in policy.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    depth = policy.model.config.num_hidden_layers
    assert learns and all(name.startswith(f"model.layers.{depth}.") for name in learns)


def test_replayed_routing_is_used_and_the_router_still_learns():
    """Recorded by the sampler, met again in training after the weights have moved; shared prompts included."""
    policy = policy_of(MoESpec(sequence_loss=0))
    sampler = LocalSampler(policy.model.eval(), tokenizer(eos=None), record_routing=True)
    prompts = [[5, 6, 7, 8], [9, 10]]
    samples = sampler.generate(prompts, SamplingParams(n=3, max_tokens=6, seed=0))
    batch = [
        Document(prompt, s.token_ids, group=g, routed=torch.from_numpy(s.routed_experts))
        for g, (prompt, rows) in enumerate(zip(prompts, samples, strict=True))
        for s in rows
    ]
    before = [logp_of(policy, batch, b) for b in (12, 1000)]
    with torch.no_grad():
        for layer in policy.model.model.expert_layers:
            gate = policy.model.model.layers[layer].mlp.gate
            gate.e_score_correction_bias.add_(10 * torch.randn(gate.e_score_correction_bias.shape))
    assert torch.allclose(*before, atol=1e-5)
    assert torch.allclose(logp_of(policy, batch, 1000), before[0], atol=1e-5)
    free = [Document(d.prompt_ids, d.completion_ids, group=d.group) for d in batch]
    assert not torch.allclose(logp_of(policy, free, 1000), before[0], atol=1e-2)
    (pack,) = policy.pack(batch, 1000)
    policy.training_logprobs(pack)[0].sum().backward()
    for layer in policy.model.model.expert_layers:
        assert float(policy.model.model.layers[layer].mlp.gate.weight.grad.norm()) > 0


@torch.no_grad()
def logp_of(policy: Policy, batch: list[Document], budget: int) -> torch.Tensor:
    values = {}
    for pack in policy.pack(batch, budget):
        logp, _ = policy.logprobs(pack)
        for sequence, offset, value in zip(pack.sequence_P.tolist(), pack.offset_P.tolist(), logp, strict=True):
            values[sequence, offset] = value
    return torch.stack([values[key] for key in sorted(values)])


def test_sft_balances_and_saves_what_it_learned(tmp_path):
    changes = {"model": MODEL, "moe": {"bias_speed": 0.01, "bias_until": 0.5, "mtp_loss": 0.3}}
    path = write(tmp_path / "recipe.yaml", sft(tmp_path / "run", **changes))
    SFT(load_recipe(str(path), []), Processes()).run()
    rows = metrics(tmp_path / "run")
    assert rows[-1]["mtp_loss"] < rows[0]["mtp_loss"] and rows[-1]["loss"] < rows[0]["loss"]
    for layer in (1, 2, 3):
        assert 1 < rows[0][f"moe/max_over_mean/{layer}"] <= 8
        assert 0 < rows[0][f"moe/load_entropy/{layer}"] < math.log(8)
        bias = load_file(tmp_path / "run" / "model" / "model.safetensors")[BIAS.format(layer)]
        steps = (bias / 0.01).round()
        assert torch.allclose(bias, steps * 0.01, atol=1e-6) and 0 < float(steps.abs().max()) <= 3  # of six updates
    model = MoEForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_nextn_predict_layers == 1


def test_sft_on_two_processes_equals_one(tmp_path):
    """Losses, loads, gradients and the biases that follow from loads over both."""
    changes = {"model": MODEL, "moe": {"bias_speed": 0.01, "mtp_loss": 0.3, "sequence_loss": 0.01}}
    path = write(tmp_path / "recipe.yaml", sft(tmp_path / "one", **changes))
    two = launch_two(tmp_path, str(path), f"output_dir={tmp_path / 'two'}")
    try:
        SFT(load_recipe(str(path), []), Processes()).run()
        output, _ = two.communicate(timeout=240)
    finally:
        two.kill()
    assert two.returncode == 0, output[-3000:]
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == other.keys() and "moe/busiest/2" in one
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    weights = [load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two")]
    for layer in (1, 2, 3):
        assert torch.equal(weights[0][BIAS.format(layer)], weights[1][BIAS.format(layer)])


def test_killed_and_resumed_keeps_the_biases(tmp_path):
    changes = {"model": MODEL, "moe": {"bias_speed": 0.01, "mtp_loss": 0.3}}
    whole = write(tmp_path / "whole.yaml", sft(tmp_path / "whole", **changes))
    SFT(load_recipe(str(whole), []), Processes()).run()
    part = write(tmp_path / "part.yaml", sft(tmp_path / "part", **changes))
    assert run(str(tmp_path / "struck"), "optimizer", str(part), code=KILL).returncode == -signal.SIGKILL
    SFT(load_recipe(str(part), []), Processes()).run()
    files = [load_file(tmp_path / n / "model" / "model.safetensors") for n in ("part", "whole")]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert torch.allclose(files[0][name], files[1][name], atol=1e-6), name
    assert any(files[0][BIAS.format(layer)].abs().max() > 0 for layer in (1, 2))


def test_grpo_with_drafts_and_replayed_routing(tmp_path):
    changes = {
        "model": MODEL,
        "rollout__draft_tokens": 1,
        "moe": {"mtp_loss": 0.1},
        "grpo__minibatches_per_step": 1,
    }
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", **changes))
    GRPO(load_recipe(str(path), []), Processes()).run()
    for row in metrics(tmp_path / "run"):
        assert row["grad_norm"] > 0 and row["mtp_loss"] > 0
        assert row["mismatch/max"] < 1e-3  # the trainer met the experts that the sampler met
        assert 1 <= row["drafts/tokens_per_step"] <= 2
        assert row["drafts/tokens_per_step"] == pytest.approx(1 + row["drafts/accepted/1"])
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not weights[BIAS.format(1)].any()  # in reinforcement learning biases stay


def test_grpo_says_once_that_no_routing_was_recorded(tmp_path, capsys):
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", model=MODEL, grpo__steps=2))
    GRPO(
        load_recipe(str(path), []),
        Processes(),
        lambda made: LocalSampler(made.backend.sampler_model(), made.tokenizer, max_slots=8),
    ).run()
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("moe.replay_routing: the sampler did not record") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"scratch": SCRATCH, "dtype": "float32"}, "moe": {"bias_speed": 0.1}}, "moe: the model is a llama"),
        (
            {"model": {"scratch": {"preset": "tiny", "config": {"num_nextn_predict_layers": 0}}}, "moe__mtp_loss": 0.3},
            "moe.mtp_loss: the model has no multi-token prediction module",
        ),
        (
            {"model": {"scratch": {"preset": "tiny", "config": {"topk_group": 9}}}},
            "model.scratch.config.topk_group: 9 of n_group = 4",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(changes, message, tmp_path):
    path = write(tmp_path / "recipe.yaml", sft(tmp_path / "run", **changes))
    with pytest.raises(RecipeError, match=message):
        SFT(load_recipe(str(path), []), Processes())


def test_a_preset_takes_its_shape_from_nowhere_else(tmp_path):
    path = write(tmp_path / "r.yaml", sft(tmp_path / "run", model={"scratch": {"preset": "tiny", "hidden_size": 64}}))
    with pytest.raises(RecipeError, match="hidden_size means nothing beside preset"):
        load_recipe(str(path), [])


def test_fields_of_a_loaded_config_can_be_changed(tmp_path):
    model_of(num_nextn_predict_layers=1).save_pretrained(tmp_path / "moe")
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    spec = ModelSpec(path=str(tmp_path / "moe"), config={"seq_aux_alpha": 0.5, "max_position_embeddings": 4096})
    config = model_config(spec, None)
    assert (config.seq_aux_alpha, config.max_position_embeddings) == (0.5, 4096)
    assert type(config).__name__ == "MoEConfig"
    spec = ModelSpec(path=str(tmp_path / "llama"), config={"max_position_embeddings": 4096})
    assert model_config(spec, None).max_position_embeddings == 4096
    spec = ModelSpec(path=str(tmp_path / "llama"), config={"max_position_embedings": 4096})
    with pytest.raises(RecipeError, match="did you mean 'max_position_embeddings'"):
        model_config(spec, None)
