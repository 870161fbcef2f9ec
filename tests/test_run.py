"""The command as users run it: stages, custom rewards, import cost, the installed package."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import PROBLEMS, REPO, SCRATCH, grpo, metrics, run, sft, write
from rl.recipe_io import load_recipe
from rl.stages import stage_recipes


def without_folder(recipe):
    return {k: v for k, v in recipe.items() if k != "output_dir"}


def test_stages_feed_each_other_and_are_skipped_when_complete(tmp_path):
    evaluate = {"data": {**PROBLEMS, "limit": 5}, "max_tokens": 6, "samples": 2}
    second = grpo(tmp_path, grpo__steps=2, model={"path": "${cold.model}", "dtype": "float32"}, evaluate=evaluate)
    third = sft(
        tmp_path,
        model={"path": "${rl.model}", "dtype": "float32"},
        sft={"epochs": 50, "max_seconds": "${rl.seconds}"},
    )
    recipe = {
        "pipeline": "stages",
        "output_dir": str(tmp_path / "run"),
        "values": {"problems": PROBLEMS},
        "stages": {
            "cold": without_folder(sft(tmp_path, data={"extends": "${values.problems}", "limit": 50})),
            "rl": without_folder(second),
            "more": without_folder(third),
        },
    }
    path = write(tmp_path / "stages.yaml", recipe)
    result = run(str(path))
    assert result.returncode == 0, result.stderr
    assert "avg@k" in result.stdout and "rl" in result.stdout
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(f">{name}<" in report for name in ("cold", "rl", "more"))
    summary = json.loads((tmp_path / "run" / "rl" / "summary.json").read_text())
    control = json.loads((tmp_path / "run" / "more" / "summary.json").read_text())
    assert control["seconds"] >= summary["seconds"]
    stamp = (tmp_path / "run" / "cold" / "summary.json").stat().st_mtime_ns
    assert run(str(path)).returncode == 0
    assert (tmp_path / "run" / "cold" / "summary.json").stat().st_mtime_ns == stamp


def test_the_final_model_is_an_ordinary_folder_and_every_completion_is_kept(tmp_path):
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", model={"scratch": SCRATCH, "dtype": "bfloat16"}))
    result = run(str(path), "log.tensorboard=true", "log.samples_every=2")
    assert result.returncode == 0, result.stderr
    assert "step 4/4" in result.stdout and ">>>" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer.encode("7+8=?<think>", add_special_tokens=False)) == "7+8=?<think>"
    rows = [r for p in (tmp_path / "run" / "samples").glob("*.parquet") for r in pq.read_table(p).to_pylist()]
    assert len(rows) == 4 * 16
    lines = metrics(tmp_path / "run")
    for name in ("reward", "reward/digit_share", "groups/informative", "entropy", "grad_norm", "mismatch/k3"):
        assert all(isinstance(line[name], float) for line in lines)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert lines[0]["reward"] == pytest.approx(sum(r["reward"] for r in rows if r["step"] == 1) / 16)


def test_rewards_of_a_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "async def slow(completions, answer, source, **columns):\n"
        "    await asyncio.sleep(0.01)\n"
        "    return [len(a) * 0.5 for a in answer]\n"
        "def sometimes(completions, completion_ids):\n"
        "    return [1.0 if len(ids) % 2 else None for ids in completion_ids]\n"
    )
    rewards = [
        {"path": f"{tmp_path}/mine.py:slow", "weight": 0.5},
        {"path": f"{tmp_path}/mine.py:sometimes"},
        {"name": "math"},
    ]
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", rewards=rewards, grpo__steps=1))
    result = run(str(path))
    assert result.returncode == 0, result.stderr
    (line,) = metrics(tmp_path / "run")
    assert line["reward/slow"] > 0 and line["reward/math"] == 0.0
    assert sum(line[f"verdict/{v}"] for v in ("correct", "wrong", "unparsed", "timeout")) == 16


def test_a_reward_that_raises_stops_the_run_with_its_name(tmp_path):
    (tmp_path / "mine.py").write_text("def broken(completions):\n    return 1 / 0\n")
    recipe = grpo(tmp_path / "run", rewards=[{"path": f"{tmp_path}/mine.py:broken"}])
    result = run(str(write(tmp_path / "recipe.yaml", recipe)))
    assert result.returncode == 2 and "broken" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"grpo__loss": {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}},
        {"grpo__loss": {"kind": "cispo", "aggregation": "constant"}, "grpo__advantage": {"scale": "none"}},
        {"grpo__loss": {"dual_clip": 3.0, "aggregation": "token"}, "grpo__epochs_per_step": 2},
        {
            "grpo__kl": {"coefficient": 0.01, "place": "reward"},
            "grpo__advantage": {"baseline": "leave-one-out"},
        },
        {"grpo__kl": {"coefficient": 0.01, "unbiased": True}, "grpo__reference": {"replace_every": 3}},
        {"grpo__truncation": {"mode": "mask"}, "grpo__advantage": {"scale": "batch"}},
        {"grpo__truncation": {"mode": "penalty", "buffer": 6}, "grpo__dynamic_sampling": {"max_rounds": 2}},
        {"grpo__correction": {"kind": "tis"}, "model": {"scratch": SCRATCH, "dtype": "bfloat16"}},
        {"grpo__correction": {"kind": "sequence-mask"}, "grpo__share_prompts": False},
        {"grpo__old_logprobs": "sampler", "model": {"scratch": SCRATCH, "gradient_checkpointing": True}},
        {"model": {"scratch": {**SCRATCH, "family": "qwen3"}, "dtype": "float32"}},
        {"model": {"scratch": {**SCRATCH, "family": "gpt_neox"}, "dtype": "float32"}},
    ],
    ids=lambda c: ",".join(f"{k}" for k in c),
)
def test_every_option_trains(changes, tmp_path):
    """Each option through the whole step, on a model that can learn the toy reward: weights move, nothing breaks."""
    from rl.recipe_io import validate
    from rl.runner import run as run_recipe

    recipe = grpo(tmp_path / "run", **changes)
    recipe["grpo"]["steps"] = 2
    summary = run_recipe(validate(recipe))
    assert summary["steps"] == 2
    for line in metrics(tmp_path / "run"):
        assert line["grad_norm"] is not None and line["grad_norm"] > 0


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    recipe = load_recipe(str(path), [])
    if recipe.pipeline == "stages":
        assert stage_recipes(recipe)


def test_importing_rl_is_light():
    code = (
        "import sys, rl, rl.recipe_io\n"
        "print(sorted({'vllm', 'deepspeed', 'wandb', 'triton', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert result.stdout.strip() == "[]"
    assert time.perf_counter() - start < 10  # two seconds on a quiet machine; this bounds accidents only


@pytest.mark.slow
def test_the_wheel_carries_the_recipes_and_runs_elsewhere(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, REPO], check=True)
    (wheel,) = tmp_path.glob("r1forge-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "rl/shipped_recipes/quickstart.yaml" in names and "rl/py.typed" in names
    assert {f"rl/report/assets/page.{kind}" for kind in ("html", "css")} <= set(names)
    assert {f"rl/report/assets/{script}.js" for script in ("dom", "charts", "browser")} <= set(names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    result = run("check", "quickstart.yaml", cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert result.returncode == 0, result.stderr
    assert "batches of stage grpo" in result.stdout


@pytest.mark.parametrize("kind,policy,code", [("grpo", "stop", 1), ("grpo", "skip", 0), ("sft", "skip", 0)])
def test_a_loss_that_is_not_finite_stops_or_is_skipped(kind, policy, code, tmp_path):
    """The second update's log-probabilities become NaN: nothing of it reaches the weights."""
    poison = (
        "import sys, torch, rl.policy.policy as p\n"
        "real, calls = p.token_logprobs, [0]\n"
        "def poisoned(*a, **k):\n"
        "    logp, entropy = real(*a, **k)\n"
        "    calls[0] += torch.is_grad_enabled()\n"
        "    return (logp * float('nan') if calls[0] == 2 else logp), entropy\n"
        "p.token_logprobs = poisoned\n"
        "from rl.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    recipe = (
        grpo(tmp_path / "run", grpo__minibatches_per_step=1, optimizer__on_nonfinite=policy)
        if kind == "grpo"
        else sft(tmp_path / "run", optimizer__on_nonfinite=policy, checkpoint__every=1)
    )
    result = run(str(write(tmp_path / "recipe.yaml", recipe)), code=poison)
    assert result.returncode == code, result.stderr
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    if policy == "stop":
        assert "the loss of a micro-batch is nan" in result.stderr and saved == ["step_00000001"]
    else:
        folder = tmp_path / "run" / "checkpoints" / saved[-1]
        assert torch.load(folder / "state.pt")["skipped"] == 1
        assert [row["updates_skipped"] for row in metrics(tmp_path / "run")][:3] == [0, 1, 0]
        tensors = [tensor for path in (folder / "tensors").iterdir() for tensor in load_file(path).values()]
        assert len(tensors) > 30 and all(torch.isfinite(tensor).all() for tensor in tensors)


def test_a_stage_starts_over_when_one_before_it_changes(tmp_path):
    recipe = {
        "pipeline": "stages",
        "output_dir": str(tmp_path / "run"),
        "stages": {
            "cold": without_folder(sft(tmp_path)),
            "rl": without_folder(grpo(tmp_path, grpo__steps=1, model={"path": "${cold.model}", "dtype": "float32"})),
        },
    }
    path = write(tmp_path / "stages.yaml", recipe)
    assert run(str(path)).returncode == 0
    before = (tmp_path / "run" / "rl" / "model" / "model.safetensors").read_bytes()
    result = run(str(path), "stages.cold.sft.steps=9")
    assert result.returncode == 0 and "starts over" in result.stdout, result.stderr
    assert (tmp_path / "run" / "rl" / "model" / "model.safetensors").read_bytes() != before
    assert "starts over" not in run(str(path), "stages.cold.sft.steps=9").stdout
