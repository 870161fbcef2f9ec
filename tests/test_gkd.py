"""A student learns its teacher's distributions, on its own samples and on solutions, however the work is cut up."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_divergence import naive
from test_moe_training import TINY
from test_resume import KILL, samples, weights
from transformers import AutoModelForCausalLM

from recipes import PROBLEMS, SCRATCH, change, launch_two, metrics, run, sft, write
from rl.__main__ import main
from rl.check import check
from rl.gkd import GKD
from rl.objective.divergence import Divergence
from rl.policy.load import load_model, load_tokenizer
from rl.policy.packing import Document
from rl.policy.processes import Processes
from rl.recipe_io import RecipeError, validate
from rl.recipe_model import ModelSpec, ScratchModel
from rl.runner import run as run_recipe
from rl.sft import SFT

PADDING = 6  # rows of the teacher's embedding that belong to no token


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A model, of another width than the student, that has learned a little of how problems are solved."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = sft(
        folder, model__scratch={**SCRATCH, "hidden_size": 48}, optimizer__learning_rate=1e-2,
        sft={"steps": 40, "batch_size": 16}, threads=1,
    )  # fmt: skip
    SFT(validate(recipe), Processes()).run()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.resize_token_embeddings(len(load_tokenizer(ModelSpec(path=str(folder / "model")))) + PADDING)
    model.save_pretrained(folder / "model")
    return folder / "model"


def gkd(folder: Path, taught_by: Path, **changes) -> dict:
    recipe = {
        "pipeline": "gkd",
        "output_dir": str(folder),
        "seed": 3,
        "threads": 1,
        "model": {"scratch": SCRATCH, "dtype": "float32"},
        "teacher": {"path": str(taught_by), "dtype": "float32"},
        "data": {**PROBLEMS, "limit": 40},
        "rollout": {"max_tokens": 12, "max_slots": 16, "max_prompt_tokens": 64},
        "optimizer": {"learning_rate": 5e-3},
        "gkd": {"steps": 4, "prompts_per_step": 4, "samples_per_prompt": 2},
        "log": {"samples_every": 0},
    }
    return change(recipe, **changes)


@pytest.mark.parametrize("on_policy,kind", [(1.0, "reverse"), (0.0, "forward"), (0.5, "jsd")])
def test_a_student_learns_its_teacher(on_policy, kind, teacher, tmp_path):
    recipe = gkd(
        tmp_path / "run", teacher, gkd__steps=30, gkd__on_policy=on_policy, gkd__divergence=kind,
        gkd__prompts_per_step=8, rollout__max_tokens=40,
    )  # fmt: skip
    summary = GKD(validate(recipe), Processes()).run()
    assert summary["pipeline"] == "gkd" and summary["steps"] == summary["updates"] == 30
    lines = metrics(tmp_path / "run")
    first, last = lines[:3], lines[-3:]
    mean = lambda part, name: sum(line[name] for line in part) / len(part)  # noqa: E731
    assert mean(last, "divergence") < 0.6 * mean(first, "divergence")
    if not on_policy:  # the student's own texts are others each time, and so is how easily one agrees on them
        assert mean(last, "agreement") > mean(first, "agreement") + 0.1
    for line in lines:
        assert line["completions"] == 16 and 0 < line["length/mean"] <= line["length/max"] <= 40
        assert line["tokens_trained"] == pytest.approx(16 * line["length/mean"])
        assert line["entropy"] > 0 and line["grad_norm"] > 0
        assert 0 <= line.get("length/truncated", 0) <= 1 and ("length/truncated" in line) == bool(line["on_policy"])
    on = {line["step"] for line in lines if line["on_policy"]}
    assert abs(len(on) - 30 * on_policy) < 8 and (on_policy in (0, 1)) == (len(on) in (0, 30))
    written = {int(p.stem.removeprefix("step_")) for p in (tmp_path / "run").glob("samples/*.parquet")}
    assert written == on  # every completion that was sampled is kept
    for step in sorted(on)[:1]:
        rows = pq.read_table(tmp_path / "run" / "samples" / f"step_{step:08d}.parquet").to_pylist()
        assert len(rows) == 16
        assert sum(row["tokens"] for row in rows) == lines[step - 1]["tokens_trained"]
        assert sum(row["finish_reason"] == "length" for row in rows) == 16 * lines[step - 1]["length/truncated"]


# ---- one batch, cut up in every way ------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory) -> GKD:
    folder = tmp_path_factory.mktemp("invariance")
    scratch = {**SCRATCH, "config": {"initializer_range": 0.25}}
    return GKD(validate(gkd(folder / "run", teacher, model__scratch=scratch)), Processes())


@pytest.fixture
def double(made, monkeypatch):
    """The same in float64, with the few places replaced that compute in float32 whatever they are given."""

    def exact(student, head, taught, teacher_head, *, kind, beta, temperature):
        z, u = (hidden @ h.weight.t() / temperature for hidden, h in ((student, head), (taught, teacher_head)))
        entropy = torch.distributions.Categorical(logits=z.detach()).entropy()
        return Divergence(naive(z, u, kind, beta), entropy, z.argmax(-1) == u.argmax(-1))

    def exact_norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr("rl.gkd.token_divergence", exact)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)
    for policy in (made.policy, made.teacher):
        policy.model.double()
    yield made
    for policy in (made.policy, made.teacher):
        policy.model.float()


def ragged(seed: int) -> list[Document]:
    """Groups that share a prompt, single documents, completions of one token."""
    draw = random.Random(seed)
    batch = []
    for group, size in enumerate([3, 1, 2, 4]):
        prompt = [draw.randrange(8, 100) for _ in range(draw.choice([1, 4, 9]))]
        for _ in range(size):
            completion = [draw.randrange(8, 100) for _ in range(draw.choice([1, 2, 5, 12]))]
            batch.append(Document(prompt, completion, group=group))
    return batch


def gradient(gkd: GKD, batch: list[Document], **way) -> torch.Tensor:
    return update(gkd, batch, **way)[0]


def update(gkd: GKD, batch: list[Document], *, padded: bool = False, **spec) -> tuple[torch.Tensor, dict]:
    """(The accumulated gradient of one update, flat, as the optimizer gets it; metrics); the model stays as it is."""
    settings = gkd.recipe.model_dump(mode="json")
    gkd.recipe = validate({**settings, "gkd": {**settings["gkd"], **spec}})
    gkd.teacher.packed = not padded
    gkd.packer = gkd.teacher if padded else gkd.policy
    found: list[torch.Tensor] = []

    def take(rate: float) -> tuple[float, bool]:
        for p in gkd.backend.masters:
            found.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten())
            p.grad = None
        return 0.0, True

    original, gkd.backend.step = gkd.backend.step, take
    try:
        metrics = gkd.update(batch)
    finally:
        gkd.backend.step = original
    return torch.cat(found), metrics


def plain_logits(gkd: GKD, batch: list[Document], temperature: float) -> list[torch.Tensor]:
    """Of both models at all completion tokens, by their own forwards of one document at a time, on the tokenizer's
    ids only."""
    found = []
    for policy in (gkd.policy, gkd.teacher):
        rows = []
        for document in batch:
            ids = torch.tensor([[*document.prompt_ids, *document.completion_ids]])
            logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(document.prompt_ids) - 1 : -1]
            rows.append(logits[:, : len(gkd.tokenizer)] / temperature)
        found.append(torch.cat(rows))
    return found


def plain_gradient(gkd: GKD, batch: list[Document], kind: str, beta: float, temperature: float) -> torch.Tensor:
    z, u = plain_logits(gkd, batch, temperature)
    gradients = torch.autograd.grad(naive(z, u, kind, beta).mean(), gkd.backend.masters)
    return torch.cat([g.flatten() for g in gradients])


CUTS = [
    {"tokens_per_microbatch": 100_000, "share_prompts": False},
    {"tokens_per_microbatch": 100_000, "share_prompts": True},
    {"tokens_per_microbatch": 1},
    {"tokens_per_microbatch": 23, "share_prompts": True},
    {"tokens_per_microbatch": 50, "share_prompts": False},
    {"padded": True},
]
KINDS = [("reverse", 0.5, 1.0), ("forward", 0.5, 0.7), ("jsd", 0.2, 1.3)]


@pytest.mark.parametrize("kind,beta,temperature", KINDS)
def test_gradient_is_that_of_single_documents_for_every_cut(made, kind, beta, temperature):
    batch = ragged(1)
    want = plain_gradient(made, batch, kind, beta, temperature)
    for cut in CUTS:
        got = gradient(made, batch, divergence=kind, beta=beta, temperature=temperature, **cut)
        assert (got - want).norm() < 2e-5 * want.norm(), cut


@pytest.mark.parametrize("kind,beta,temperature", KINDS)
def test_gradient_in_float64(double, kind, beta, temperature, monkeypatch):
    """To rounding; and the parts that two processes give add up with the denominator of the whole."""
    batch, spec = ragged(2), {"divergence": kind, "beta": beta, "temperature": temperature}
    want = plain_gradient(double, batch, kind, beta, temperature)
    for cut in CUTS:
        assert (gradient(double, batch, **spec, **cut) - want).norm() < 1e-10 * want.norm(), cut
    totals = {"tokens": float(sum(len(d.completion_ids) for d in batch)), "documents": float(len(batch))}
    monkeypatch.setattr(double.backend, "sum", lambda values: {**values, **totals})
    parts = [gradient(double, batch[rank::2], **spec) for rank in (0, 1)]
    assert (parts[0] + parts[1] - want).norm() < 1e-10 * want.norm()


def test_metrics_are_means_over_all_tokens(made):
    batch = ragged(3)
    _, found = update(made, batch, divergence="reverse", temperature=0.8, tokens_per_microbatch=30)
    with torch.no_grad():
        z, u = (logits.double() for logits in plain_logits(made, batch, 0.8))
    assert found["divergence"] == pytest.approx(float(naive(z, u, "reverse", 0).mean()), rel=1e-4)
    assert found["entropy"] == pytest.approx(
        float(torch.distributions.Categorical(logits=z).entropy().mean()), rel=1e-4
    )
    assert found["agreement"] == pytest.approx(float((z.argmax(-1) == u.argmax(-1)).double().mean()))
    lengths = [len(d.completion_ids) for d in batch]
    assert found["tokens_trained"] == sum(lengths) == len(z) and found["length/max"] == max(lengths)
    assert found["completions"] == 10 and found["length/mean"] == pytest.approx(sum(lengths) / 10)


def test_a_padding_row_that_the_student_draws_ends_its_completion(made):
    ids = len(made.tokenizer)
    assert made.vocabulary == ids and len(made.teacher.head.weight) == ids + PADDING
    document = Document([9, 10], [11, 12, ids, 13], group=2)
    assert made.readable(document) == Document([9, 10], [11, 12], group=2)
    assert made.readable(Document([9], [11, ids - 1])) == Document([9], [11, ids - 1])


# ---- whole runs --------------------------------------------------------------------------------------


def test_killed_and_resumed_equals_uninterrupted(teacher, tmp_path):
    """A mixture of steps on samples and on solutions, killed between an optimizer step and its checkpoint."""
    changes = {"gkd__on_policy": 0.5, "gkd__steps": 5, "checkpoint": {"every": 1}}
    run_recipe(validate(gkd(tmp_path / "whole", teacher, **changes)))
    part = write(tmp_path / "part.yaml", gkd(tmp_path / "part", teacher, **changes))
    assert run(str(tmp_path / "struck"), "optimizer", str(part), code=KILL).returncode == -signal.SIGKILL
    resumed = run(str(part))
    assert resumed.returncode == 0 and "resumed after step 2" in resumed.stdout, resumed.stderr
    lines = metrics(tmp_path / "whole")
    assert {line["on_policy"] for line in lines} == {0.0, 1.0}
    assert metrics(tmp_path / "part") == lines
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    assert samples(tmp_path / "part") == samples(tmp_path / "whole")


def test_one_process_equals_two(teacher, tmp_path):
    changes = {"gkd__on_policy": 0.5, "gkd__prompts_per_step": 3, "optimizer__learning_rate": 1e-3}
    recipe = write(tmp_path / "recipe.yaml", gkd(tmp_path / "two", teacher, **changes))
    two = launch_two(tmp_path, str(recipe))
    try:
        GKD(validate(gkd(tmp_path / "one", teacher, **changes)), Processes()).run()
        output, _ = two.communicate(timeout=240)
    finally:
        two.kill()
    assert two.returncode == 0 and "2 process(es)" in output, output[-3000:]
    alone, both = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(alone) == len(both) == 4 and {line["on_policy"] for line in alone} == {0.0, 1.0}
    for a, b in zip(alone, both, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-5


def test_experts_of_a_student_are_balanced_as_in_sft(teacher, tmp_path):
    model = {"scratch": {"preset": "tiny", "config": TINY}, "dtype": "float32"}
    moe = {"bias_speed": 0.01, "bias_until": 1.0, "sequence_loss": 0.01}
    recipe = gkd(tmp_path / "run", teacher, model=model, gkd__steps=1, moe=moe)
    GKD(validate(recipe), Processes()).run()
    (line,) = metrics(tmp_path / "run")
    assert line["balance_loss"] > 0 and line["divergence"] > 0
    bias = load_file(tmp_path / "run" / "model" / "model.safetensors")[
        "model.layers.1.mlp.gate.e_score_correction_bias"
    ]
    assert float(bias.abs().max()) == pytest.approx(0.01)


def test_check_prints_batches_and_memory(teacher, tmp_path):
    text = check(validate(gkd(tmp_path / "run", teacher, gkd__on_policy=0.25, rollout__max_tokens=700)))
    assert "4 prompts x 2 samples = 8, or 8 solutions" in text and "25% of the steps" in text
    assert "teacher  " in text and "key/value slots" in text
    assert "beyond the 512 positions of `model`" in text and "of `teacher`" in text
    assert not (tmp_path / "run").exists()


# ---- what is refused ---------------------------------------------------------------------------------

REFUSED = {
    "teacher of random weights": ({"teacher": {"scratch": SCRATCH}}, ["teacher.path"]),
    "missing teacher": ({"teacher__path": "./no-such"}, ["teacher.path", "./no-such", "does not exist"]),
    "greedy groups": ({"rollout__temperature": 0}, ["rollout.temperature", "gkd.samples_per_prompt"]),
    "unknown divergence": ({"gkd__divergence": "revers"}, ["gkd.divergence", "'reverse'"]),
    "beta of nothing": ({"gkd__beta": 1.0}, ["gkd.beta", "less than 1"]),
    "no solutions": (
        {"gkd__on_policy": 0.5, "data": {"path": "{folder}/bare.jsonl"}}, ["data.columns", "reasoning"],
    ),
    "settings of experts for a dense student": ({"moe": {"mtp_loss": 0.1}}, ["moe", "llama"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_recipe(name, teacher, tmp_path, capsys):
    changes, expected = REFUSED[name]
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "1+1=?", "answer": "2"}) + "\n")
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    assert main([str(write(tmp_path / "recipe.yaml", gkd(tmp_path / "run", teacher, **changes)))]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()  # nothing was started


def test_other_vocabularies_are_refused(tmp_path, capsys):
    spec = ModelSpec(scratch=ScratchModel(**{**SCRATCH, "characters": "0123456789+=?. "}))
    tokenizer = load_tokenizer(spec)
    load_model(spec, tokenizer, dtype=torch.float32).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    recipe = gkd(tmp_path / "run", tmp_path / "other")
    assert main([str(write(tmp_path / "recipe.yaml", recipe))]) == 2
    message = capsys.readouterr().err
    assert "teacher: its tokenizer differs" in message and "model.tokenizer" in message
    with pytest.raises(RecipeError, match="teacher: its tokenizer differs"):  # also where nothing was checked before
        GKD(validate(recipe), Processes())


def test_solutions_that_are_all_too_long_are_refused(teacher, tmp_path):
    recipe = gkd(tmp_path / "run", teacher, gkd__on_policy=0.0, rollout={"max_tokens": 2, "max_prompt_tokens": 9})
    with pytest.raises(RecipeError, match="rollout.max_tokens: no document is within 11 tokens"):
        GKD(validate(recipe), Processes())
