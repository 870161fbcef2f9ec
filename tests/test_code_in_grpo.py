"""From a recipe: a tiny model learns to write programs, then GRPO pays what passes its tests."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from sandboxes import needs_sandbox

from recipes import SCRATCH, metrics, run, write

pytestmark = needs_sandbox

USERS_REWARD = """\
def brevity(completion_ids, setup, **columns):
    return [1 / len(ids) for ids in completion_ids]
"""


def tasks() -> list[dict]:
    """MBPP's columns: a statement, a program, statements that must hold."""
    return [
        {
            "text": f"{verb} {n}",
            "code": f"x{sign}{n}",
            "test_setup_code": "",
            "test_list": [f"assert f({x}) == {eval(f'{x}{sign}{n}')}" for x in (0, 5, -7)],
        }
        for verb, sign in (("add", "+"), ("subtract", "-"), ("multiply by", "*"))
        for n in (1, 2, 3, 4)
    ]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(task) for task in tasks()))
    (tmp_path / "mine.py").write_text(USERS_REWARD)
    data = {
        "path": str(tmp_path / "tasks.jsonl"),
        "columns": {"prompt": "text", "answer": "code", "tests": "test_list", "setup": "test_setup_code"},
        "kind": "code",
        "template": {
            "user": "{problem}",
            "chat": False,
            "prefill": "```python\ndef f(x):\n    return ",
            "completion": "{answer}\n```",
        },
    }
    return {
        "pipeline": "stages",
        "output_dir": str(tmp_path / "run"),
        "stages": {
            "sft": {
                "pipeline": "sft",
                "model": {"scratch": SCRATCH, "dtype": "float32"},
                "data": data,
                "optimizer": {"learning_rate": 1e-2, "warmup_updates": 2},
                "sft": {"steps": 60, "batch_size": 12},
            },
            "grpo": {
                "pipeline": "grpo",
                "model": {"path": "${sft.model}", "dtype": "float32"},
                "data": data,
                "rewards": [
                    {"name": "code", "args": {"score": "fraction", "timeout_s": 5}},
                    {"path": f"{tmp_path}/mine.py:brevity", "weight": 0.1},
                ],
                "rollout": {"max_tokens": 12, "max_slots": 16},
                "optimizer": {"learning_rate": 1e-3},
                "grpo": {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4},
            },
        },
    }


def test_programs_are_run_and_paid(recipe, tmp_path):
    result = run(str(write(tmp_path / "recipe.yaml", recipe)))
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run" / "grpo")
    assert len(lines) == 2
    verdicts = set()
    for step, line in enumerate(lines, start=1):
        rows = pq.read_table(tmp_path / "run" / "grpo" / "samples" / f"step_{step:08d}.parquet").to_pylist()
        assert sum(line[f"verdict/{v}"] for v in ("correct", "wrong", "unparsed", "timeout")) == len(rows) == 16
        for row in rows:
            code = json.loads(row["components"])["code"]
            verdicts.add(row["verdict"])
            assert (row["verdict"] == "correct") == (code == 1.0)
            if row["completion"].startswith(f"{row['answer']}\n```"):
                assert row["verdict"] == "correct"
        assert line["reward/brevity"] > 0
    assert "correct" in verdicts and len(verdicts) > 1


def test_a_sandbox_that_is_not_there_is_told_before_the_run(recipe, tmp_path):
    recipe["stages"]["grpo"]["rewards"][0]["args"]["sandbox"] = "firejail"
    result = run("check", str(write(tmp_path / "recipe.yaml", recipe)))
    assert result.returncode == 2
    assert "firejail" in result.stderr and "bubblewrap" in result.stderr
    assert not (tmp_path / "run").exists()
