"""`precision: fp8` in a recipe: trains, resumes, samples as it trains; what of a batch's split shows."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fp8_linear import error
from test_fp8_modules import small
from test_moe_training import TINY
from tiny_models import documents
from tiny_moe import relative, token_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model import MoEForCausalLM
from model.fp8 import Fp8Linear, reference
from model.fp8.convert import to_fp8
from recipes import SCRATCH, change, grpo, metrics, sft
from rl.check import check
from rl.grpo import GRPO
from rl.policy.load import load_model, load_tokenizer
from rl.policy.policy import Policy
from rl.policy.processes import Processes
from rl.policy.replicated import Replicated
from rl.recipe import OptimizerSpec
from rl.recipe_io import RecipeError, validate
from rl.runner import run as run_recipe
from rl.sft import SFT

MODEL = {"scratch": {"preset": "tiny", "config": TINY}}
SMALL = {"grpo__steps": 1, "grpo__prompts_per_step": 2, "grpo__samples_per_prompt": 2, "rollout__max_tokens": 6}


def trained(folder, recipe, **changes):
    """The metrics of a recipe that has run."""
    recipe = change(recipe(folder), **{"model": MODEL, "precision": "fp8", **changes})
    run_recipe(validate(recipe))
    return metrics(folder)


def test_sft_in_fp8_learns_as_in_bfloat16(tmp_path, capsys):
    """The same documents and seeds; a word in the recipe is all that differs."""
    changes = {"sft__steps": 4, "sft__batch_size": 4, "optimizer__warmup_updates": 1, "moe": {"mtp_loss": 0.3}}
    fp8 = trained(tmp_path / "fp8", sft, **changes)
    assert "in FP8 by backend reference on cpu" in capsys.readouterr().out
    plain = trained(tmp_path / "bf16", sft, **changes, precision="bf16")
    assert "FP8" not in capsys.readouterr().out
    assert fp8[-1]["loss"] < 0.98 * fp8[0]["loss"]
    for a, b in zip(fp8, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.06) and a["loss"] != b["loss"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.3)
        assert sum(a["moe/share/1"]) == pytest.approx(1, abs=1e-3)
    model = MoEForCausalLM.from_pretrained(tmp_path / "fp8" / "model")  # plain weights
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_grpo_in_fp8(dtype, tmp_path):
    """With drafts, a reference, recomputed layers and several updates a step. In float32 sampler and trainer differ by
    nothing but the order of sums; in bfloat16 by its rounding, which FP8 multiplies."""
    changes = {
        "model": {**MODEL, "dtype": dtype, "gradient_checkpointing": True},
        **SMALL,
        "grpo__kl": {"coefficient": 0.01},
        "rollout__draft_tokens": 1,
        "moe": {"mtp_loss": 0.1},
    }
    for row in trained(tmp_path / "run", grpo, **changes):
        assert row["grad_norm"] > 0 and row["kl"] >= 0
        assert row["mismatch/k3"] < (0.02 if dtype == "bfloat16" else 1e-4)


def test_a_dense_model_of_transformers_in_fp8(tmp_path):
    (row,) = trained(tmp_path / "run", grpo, model={"scratch": SCRATCH}, **SMALL)
    assert row["grad_norm"] > 0 and row["mismatch/k3"] < 0.02


def test_layouts_are_checked_in_the_type_that_the_model_trains_in(tmp_path):
    """Before layers are in FP8, but after the float32 of loading, which attention for 16 bits does not take."""

    def for_16_bits(module, query, key, value, mask, **options):
        if query.dtype == torch.float32:
            raise TypeError("only bfloat16 and float16")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, is_causal=True, **options)

    ALL_ATTENTION_FUNCTIONS.register("for_16_bits", for_16_bits)
    scratch = validate(sft(tmp_path)).model
    words = load_tokenizer(scratch)
    load_model(scratch, words, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    spec = {"path": str(tmp_path / "model"), "attention": "for_16_bits"}
    policy = SFT(validate(sft(tmp_path / "run", model=spec, precision="fp8")), Processes()).policy
    assert policy.packed and isinstance(policy.model.model.layers[0].mlp.up_proj, Fp8Linear)


@pytest.mark.slow
def test_resumed_it_ends_as_if_it_had_not_stopped(tmp_path):
    """Moments, quantised weights and what is sampled from them."""
    changes = {**SMALL, "grpo__steps": 2}
    whole = trained(tmp_path / "whole", grpo, **changes)
    trained(tmp_path / "halves", grpo, **SMALL)
    assert trained(tmp_path / "halves", grpo, **changes) == whole
    models = [MoEForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "halves")]
    assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())


def test_an_evaluation_in_fp8(tmp_path):
    recipe = sft(tmp_path / "run", model=MODEL)
    evaluation = {"data": recipe["data"] | {"limit": 4}, "max_tokens": 4}
    recipe = {"pipeline": "eval", "output_dir": str(tmp_path / "run"), "model": MODEL, "evaluate": evaluation}
    assert run_recipe(validate({**recipe, "precision": "fp8"}))["evaluation"]["eval/held_out/problems"] == 4


# ---- the optimizer -------------------------------------------------------------------------------------


def backend_of(model, **optimizer) -> Replicated:
    return Replicated(model, torch.bfloat16, OptimizerSpec(**optimizer), Processes())


def losses(policy: Policy, budget: int):
    """Of micro-batches; they add up to a mean negative log-likelihood."""
    batch = [d for d in documents(vocabulary=512) if len(d) > 2]
    for pack in policy.pack(batch, budget, share_prompts=False):
        yield -policy.training_logprobs(pack)[0].sum() / 100


def test_weights_are_quantised_once_an_update_and_gradients_summed_in_float32(monkeypatch):
    calls = []
    real = reference.quantize_weight
    monkeypatch.setattr(reference, "quantize_weight", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = small()
    found = to_fp8(model)
    backend, policy = backend_of(model, learning_rate=1e-2), Policy(model)
    weights = sum(1 for name in found.converted for _ in model.get_submodule(name).parameters())
    for update in (1, 2):
        micro_batches = [backend.backward(loss) for loss in losses(policy, 20)]
        assert len(micro_batches) > 3 and len(calls) == update * weights
        assert all(p.grad is None for p in backend.parameters)
        assert all(m.grad.dtype == torch.float32 for m in backend.masters if m.grad is not None)
        before = policy.model.model.layers[1].mlp.experts.down_proj.clone()
        backend.step(1e-2)
        assert not torch.equal(policy.model.model.layers[1].mlp.experts.down_proj, before)
    state, tensors = copy.deepcopy(backend.state()), {name: tensor.clone() for name, tensor in backend.tensors()}
    values = [loss.item() for loss in losses(policy, 1000)]
    for parameter in backend.parameters:
        parameter.data.zero_()
    backend.load(state, tensors.__getitem__)
    assert [loss.item() for loss in losses(policy, 1000)] == values


def test_bfloat16_moments_halve_what_they_take():
    backend = backend_of(small(), moments="bfloat16")
    policy = Policy(backend.model)
    for loss in losses(policy, 1000):
        backend.backward(loss)
    backend.step(1e-3)
    moments = {t.dtype for s in backend.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
    assert moments == {torch.bfloat16} and {m.dtype for m in backend.masters} == {torch.float32}


def test_how_a_batch_is_split_shows_only_in_roundings_along_tokens():
    """Outputs, and gradients that pass through the layers, do not depend on the split. Gradients of FP8 weights do:
    tiles of 128 tokens fall elsewhere. So they agree to about the error that FP8 has."""
    gradients = []
    for budget in (20, 1000):
        model = small()
        found = to_fp8(model)
        for loss in losses(Policy(model), budget):
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    in_fp8 = tuple(f"{name}." for name in found.converted)
    differences = {n: relative(gradients[0][n], whole) for n, whole in gradients[1].items()}
    for name, difference in differences.items():
        assert difference < (0.1 if name.startswith(in_fp8) else 0.005), name
    assert max(differences.values()) > 0.01


def test_gradients_of_a_whole_model_against_bfloat16():
    """With the experts that bfloat16 chose: that some tokens meet others is a difference of another kind."""
    ids, gradients, routing = token_ids(2, 40), [], None
    for fp8 in (False, True):
        model = small().bfloat16()
        if fp8:
            to_fp8(model)
        out = model(ids, labels=ids, routing=routing)
        out.loss.backward()
        routing = out.routing
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
    assert 0.01 < error(gradients[1], gradients[0]) < 0.4
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.92


# ---- recipes -------------------------------------------------------------------------------------------


def test_what_precision_means_and_what_it_changes():
    plain = validate(sft("x"))
    assert (plain.precision.kind, plain.optimizer.moments) == ("bf16", "float32")
    short = validate(sft("x", precision="fp8"))
    assert short == validate(sft("x", precision={"kind": "fp8"}))
    assert (short.precision.backend, short.optimizer.moments) == ("auto", "bfloat16")
    assert validate(sft("x", precision="fp8", optimizer__moments="float32")).optimizer.moments == "float32"
    assert validate(sft("x", optimizer__moments="bfloat16")).optimizer.moments == "bfloat16"


def test_check_says_what_runs_where(tmp_path):
    text = check(validate(grpo(tmp_path / "run", model=MODEL, precision={"kind": "fp8", "skip": ["*.q_a_proj"]})))
    assert "# precision\nFP8 on cpu: reference" in text and "model.layers.0.self_attn.q_a_proj" in text
    assert "moments: bfloat16" in text and "FP8 weights" in text and "no warnings" not in text
    mixtral = {"scratch": {**SCRATCH, "family": "mixtral"}}
    assert "model.layers.1.mlp.experts," in check(validate(sft(tmp_path / "run", model=mixtral, precision="fp8")))
    text = check(validate(sft(tmp_path / "run", precision="fp8", optimizer__betas=[0.9, 0.999])))
    assert "with 0.999 a bfloat16 second moment misses" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, r"precision.kind: .*\(given: 'fp16'\)"),
        ({"precision": {"backend": "reference"}}, "precision: backend means nothing without kind: fp8"),
        ({"precision": {"kind": "fp8", "bakend": "x"}}, "precision.bakend: unknown field; did you mean 'backend'"),
        ({"precision": {"kind": "fp8", "backend": "tritn"}}, "precision.backend: .*'tritn' is not one of auto"),
        ({"precision": {"kind": "fp8", "skip": ["*.w_proj"]}}, "precision: '\\*.w_proj' in skip names no linear layer"),
        ({"optimizer__moments": "float16"}, "optimizer.moments: "),
    ],
)
@pytest.mark.parametrize("trainer", [GRPO, SFT])
def test_bad_settings_are_refused(changes, message, trainer, tmp_path):
    recipe = {GRPO: grpo, SFT: sft}[trainer](tmp_path / "run", **changes)
    with pytest.raises(RecipeError, match=message):
        check(validate(recipe))
    with pytest.raises(RecipeError, match=message):
        trainer(validate(recipe), Processes())
