"""Bad recipes and inputs: one message that names the field, the reason and the fix; exit status 2."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from recipes import PROBLEMS, REPO, change, grpo, run, sft, write
from rl.__main__ import main
from rl.recipe_io import dump, load_recipe


def refused(capsys, path, *overrides) -> str:
    assert main([str(path), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


CASES = {
    "unknown key": ({"grpo__samples_per_promt": 8}, ["grpo.samples_per_promt", "samples_per_prompt"]),
    "unknown key, top level": ({"modle": {}}, ["modle", "'model'"]),
    "wrong type": ({"grpo__steps": "many"}, ["grpo.steps", "valid integer", "many"]),
    "out of range": ({"optimizer__learning_rate": -1.0}, ["optimizer.learning_rate", "greater than 0"]),
    "unknown choice": ({"grpo__loss": {"kind": "pppo"}}, ["grpo.loss.kind", "'ppo'"]),
    "unknown pipeline": ({"pipeline": "grop"}, ["pipeline", "'grpo'"]),
    "penalty from the first token": (
        {"grpo__truncation": {"mode": "penalty"}}, ["grpo.truncation.buffer (4096)", "rollout.max_tokens"],
    ),
    "indivisible batch": ({"grpo__minibatches_per_step": 3}, ["minibatches_per_step (3)", "prompts_per_step (4)", "2"]),
    "a group of one": ({"grpo__samples_per_prompt": 1}, ["samples_per_prompt", "at least 2"]),
    "greedy rollouts": ({"rollout__temperature": 0}, ["rollout.temperature", "above 0"]),
    "no model": ({"model": {}}, ["model", "model.path", "model.scratch"]),
    "missing model folder": ({"model": {"path": "./no-such"}}, ["model.path", "./no-such", "does not exist"]),
    "missing file": ({"data": {"path": "no-such-file.jsonl"}}, ["data", "no-such-file.jsonl"]),
    "two sources": ({"data": {**PROBLEMS, "path": "x.jsonl"}}, ["data", "exactly one of path, hub and generator"]),
    "unknown template": ({"data": {**PROBLEMS, "template": "r1-zeo"}}, ["data.template", "r1-zero"]),
    "unknown reward": ({"rewards": [{"name": "maths"}]}, ["rewards.0", "maths", "math"]),
    "reward without its column": (
        {"rewards": [{"path": "{folder}/mine.py:needs_gold"}]}, ["rewards.0", "needs_gold", "gold"],
    ),
    "missing reward function": ({"rewards": [{"path": "{folder}/mine.py:need_gold"}]}, ["rewards.0", "needs_gold"]),
    "correction of a narrowed sampler": (
        {"rollout__top_p": 0.9, "grpo__correction": {"kind": "tis"}}, ["grpo.correction", "rollout.top_p"],
    ),
    "reference of two kinds": (
        {"grpo__reference": {"ema": 0.9, "replace_every": 2}}, ["grpo.reference", "replace_every", "ema"],
    ),
    "evaluation of nothing": ({"evaluate": {"samples": 2}}, ["evaluate", "evaluate.sets"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_recipe(name, tmp_path, capsys):
    changes, expected = CASES[name]
    (tmp_path / "mine.py").write_text("def needs_gold(completions, gold):\n    return [0.0] * len(completions)\n")
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", **changes))
    message = refused(capsys, path)
    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()  # nothing was started


def test_what_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, find=find_spec: None if name in ("wandb", "deepspeed") else find(name)
    )
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", log={"wandb": "mine"}))
    assert "log.wandb: wandb is not installed; pip install 'r1forge[wandb]'" in refused(capsys, path)
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DeepSpeed: pip install 'r1forge[deepspeed]'" in refused(capsys, path)
    assert not (tmp_path / "run").exists()


def test_numbers_with_exponents_and_text_that_looks_like_one(tmp_path):
    path = write(tmp_path / "r.yaml", grpo(tmp_path / "run"))
    overrides = ["optimizer.learning_rate=3e-6", 'model.revision="1234e56"', "optimizer.clip=2E0"]
    recipe = load_recipe(str(path), overrides)
    assert recipe.optimizer.learning_rate == 3e-6 and recipe.optimizer.clip == 2
    assert recipe.model.revision == "1234e56"
    (tmp_path / "kept.yaml").write_text(dump(recipe))
    assert load_recipe(str(tmp_path / "kept.yaml")) == recipe


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["check", "--help"]])
def test_help(words, capsys):
    assert main(words) == 0
    assert "rollout-worker" in capsys.readouterr().out


def test_every_error_is_reported_at_once(tmp_path, capsys):
    path = write(tmp_path / "r.yaml", grpo(tmp_path / "run", grpo__stpes=3, optimizer__clip=-1, rollout__top_k="x"))
    message = refused(capsys, path)
    assert "grpo.stpes" in message and "optimizer.clip" in message and "rollout.top_k" in message


def test_bad_overrides(tmp_path, capsys):
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run"))
    assert "must look like dotted.key=value" in refused(capsys, path, "grpo.steps")
    assert "optimizer.lerning_rate" in refused(capsys, path, "optimizer.lerning_rate=1")
    assert "'learning_rate'" in refused(capsys, path, "optimizer.lerning_rate=1")
    assert "has no fields" in refused(capsys, path, "output_dir.x=1")
    assert "numbered from 0" in refused(capsys, path, "rewards.7.weight=1")


def test_files(tmp_path, capsys):
    assert "quickstart.yaml" in refused(capsys, "recipes/quickstar.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    assert "not valid YAML" in refused(capsys, broken)
    broken.write_text("- a list\n")
    assert "must be a mapping" in refused(capsys, broken)
    broken.write_text("extends: basis.yaml\n")
    write(tmp_path / "base.yaml", grpo(tmp_path / "run"))
    assert "no file basis.yaml" in refused(capsys, broken)
    broken.write_text("extends: broken.yaml\n")
    assert "circle" in refused(capsys, broken)


def test_data_without_the_answer_column(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "anwser": "2"}\n')
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", data={"path": str(rows)}))
    message = refused(capsys, path)
    assert "answer" in message and "anwser" in message
    path = write(
        tmp_path / "sft.yaml",
        sft(tmp_path / "run", data={"path": str(rows), "columns": {"answer": "anwser"}}),
    )
    assert "reasoning" in refused(capsys, path)


def test_stages(tmp_path, capsys):
    recipe = {
        "pipeline": "stages",
        "output_dir": str(tmp_path / "run"),
        "stages": {
            "first": {k: v for k, v in sft(tmp_path).items() if k != "output_dir"},
            "second": {k: v for k, v in grpo(tmp_path).items() if k != "output_dir"},
        },
    }
    wrong = change(recipe, stages__second__model={"path": "${frist.model}"})
    message = refused(capsys, write(tmp_path / "a.yaml", wrong))
    assert "stages.second" in message and "'first'" in message
    wrong = change(recipe, stages__second__model={"path": "${first.modle}"})
    assert "'model'" in refused(capsys, write(tmp_path / "b.yaml", wrong))
    wrong = change(recipe, stages__second__grpo__stepz=1)
    assert "stages.second.grpo.stepz" in refused(capsys, write(tmp_path / "c.yaml", wrong))


@pytest.mark.parametrize("name", ["data.py", "model.py"])
def test_a_file_that_shadows_our_packages_is_named(name, tmp_path):
    (tmp_path / name).write_text("raise SystemExit('the user code must not run')\n")
    result = run(
        "check",
        str(REPO / "recipes" / "quickstart.yaml"),
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{REPO}"},
    )
    assert result.returncode == 2 and str(tmp_path / name) in result.stderr


def test_launcher_and_process_group_must_agree(tmp_path):
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run"))
    silent = {"ACCELERATE_NUM_PROCESSES": "2"}  # two were asked for, but this process was told of no group
    for environment in (silent, {"RANK": "1"}):
        result = run(str(path), env=environment)
        assert result.returncode == 2 and "MULTI_GPU" in result.stderr, result.stderr
    result = run(str(path), env={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert result.returncode == 2 and "no process group was started" in result.stderr


def test_check_prints_the_batch_table_and_starts_nothing(tmp_path, capsys):
    path = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run"))
    assert main(["check", str(path)]) == 0
    text = capsys.readouterr().out
    assert "4 prompts x 4 samples = 16" in text and "2 mini-batches x 1 epoch(s) = 2" in text
    assert "parameters" in text and "sum, at most" in text and "evaluate: not given" in text
    assert not (tmp_path / "run").exists()
