"""`pipeline: eval` of a model that workers have loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_distill_workers import Counting
from worker_threads import SECRET, Running

from recipes import PROBLEMS, SCRATCH, change
from rl.check import check
from rl.recipe_io import RecipeError, validate
from rl.runner import run


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
