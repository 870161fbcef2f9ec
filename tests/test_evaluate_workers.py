"""Evaluation in workers: of the policy, while they sample rollouts ahead, and of a model that they have loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ahead_runs
import pyarrow.parquet as pq
import pytest
from test_distill_workers import Counting
from test_workers_in_grpo import EVALUATE, assert_same_evaluations
from worker_threads import SECRET, Running

from recipes import PROBLEMS, SCRATCH, change, grpo
from rl.check import check
from rl.recipe_io import RecipeError, validate
from rl.runner import run


def test_rollouts_ahead_and_evaluations_share_a_worker(tmp_path: Path) -> None:
    """At the same time; and at the end, when the thread that samples ahead has been told to stop."""
    changes = {"grpo__steps": 3, "grpo__correction": {"kind": "tis"}, "evaluate": EVALUATE}
    ahead_runs.train(tmp_path / "here", 1, **changes)
    (tmp_path / "secret").write_text(SECRET)
    with Running(tmp_path, engine=Counting()) as one:
        workers = {"urls": [one.server.url], "secret_file": str(tmp_path / "secret")}
        run(validate(grpo(tmp_path / "there", **changes, threads=1, rollout={
            "ahead": 1, "mode": "server", "workers": workers, "max_tokens": 12, "max_slots": 8,
        })))  # fmt: skip
    assert ahead_runs.tokens(tmp_path / "there") == ahead_runs.tokens(tmp_path / "here")
    assert_same_evaluations(tmp_path / "here", tmp_path / "there")


def evaluation(folder: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "pipeline": "eval",
        "output_dir": str(folder),
        "threads": 1,
        "model": {"scratch": SCRATCH, "dtype": "float32"},
        "evaluate": {"data": {**PROBLEMS, "limit": 5}, "samples": 3, "max_tokens": 8},
    }
    return change(made, **changes)


def test_a_model_in_workers_is_measured_as_in_this_process(tmp_path: Path) -> None:
    here = run(validate(evaluation(tmp_path / "here")))
    (tmp_path / "secret").write_text(SECRET)
    with Running(tmp_path, engine=Counting()) as one:
        workers = {"urls": [one.server.url], "secret_file": str(tmp_path / "secret")}
        there = run(validate(evaluation(tmp_path / "there", workers=workers)))
        assert len(one.loop.engine.asked) == 5 and one.loop._held == {}
    assert there["evaluation"] == pytest.approx(here["evaluation"])
    name = Path("evaluation") / "held_out_step_00000000.parquet"
    mine, theirs = (pq.read_table(tmp_path / which / name).to_pylist() for which in ("here", "there"))
    assert [row["token_ids"] for row in mine] == [row["token_ids"] for row in theirs]
    assert len(mine) == 15 and {row["weights_version"] for row in theirs} == {-1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": "vllm"}, "engine: vllm needs workers.count"),
        ({"workers": {"count": 1, "bucket_mb": 1}}, "workers.bucket_mb is about sending weights"),
        (
            {"engine": "vllm", "workers": {"count": 1}, "evaluate__draft_tokens": 1},
            "evaluate.draft_tokens: vLLM drafts",
        ),
        ({"workers": {"count": 1}, "precision": "fp8"}, "precision: workers have their own"),
        (
            {"engine": "vllm", "workers": {"count": 1}, "evaluate__temperature": 3.0},
            "evaluate.temperature: vLLM samples",
        ),
        (
            {"engine": "vllm", "workers": {"count": 1, "options": {"max_model_len": 8}}},
            "evaluate.max_tokens: 8 tokens and a prompt do not fit into workers.options.max_model_len (8)",
        ),
        ({"workers": {"count": 1, "python": "no-such-python"}}, "workers.python: no-such-python is not"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError) as error:
        check(validate(evaluation(tmp_path, **changes)))
    assert says in str(error.value)
