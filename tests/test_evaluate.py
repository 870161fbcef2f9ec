"""Evaluation: estimators against brute force, and an evaluation recipe end to end."""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import combinations

import pyarrow.parquet as pq
import pytest

from recipes import PROBLEMS, SCRATCH, run, sft, write
from rl.evaluate import canonical_answer, majority, mean_and_error, pass_at_k, summarise


@pytest.mark.parametrize("n,c", [(1, 0), (1, 1), (5, 0), (5, 1), (5, 3), (6, 6), (8, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, c):
    outcomes = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(combinations(outcomes, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match=r"1\.\.4"):
        pass_at_k(4, 1, 5)


def test_mean_and_error():
    values = [random.Random(0).random() for _ in range(50)]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(50))
    assert math.isnan(mean_and_error([1.0])[1])


def test_majority():
    assert majority(["3", "4", "3"], [1.0, 0.0, 1.0]) == 1.0
    assert majority(["4", "4", "3"], [0.0, 0.0, 1.0]) == 0.0
    assert majority(["4", "3"], [0.0, 1.0]) == 0.5  # a tie is shared
    assert majority([None, None, "3"], [0.0, 0.0, 1.0]) == 1.0  # what was not parsed has no vote
    assert majority([None], [0.0]) == 0.0


def test_equal_numbers_vote_together():
    votes = [canonical_answer(text) for text in (r"\boxed{07}", "<answer>7.0</answer>", r"\boxed{14/2}")]
    assert votes == ["7", "7", "7"] and canonical_answer("<think>7") is None


def test_summary_of_two_problems():
    result = summarise([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [["1", "2", "3", "4"], ["5"] * 4])
    assert result["avg"] == pytest.approx(0.625) and result["avg_se"] == pytest.approx(0.375)
    assert result["pass@2"] == pytest.approx((0.5 + 1) / 2) and result["pass@4"] == 1.0
    assert result["maj@4"] == pytest.approx((0.25 + 1) / 2)
    assert (result["problems"], result["samples"]) == (2, 4)


def test_an_evaluation_recipe_saves_every_completion(tmp_path):
    assert run(str(write(tmp_path / "sft.yaml", sft(tmp_path / "sft", sft__steps=2)))).returncode == 0
    recipe = {
        "pipeline": "eval",
        "output_dir": str(tmp_path / "eval"),
        "model": {"path": str(tmp_path / "sft" / "model"), "dtype": "float32"},
        "evaluate": {
            "sets": {"sums": {**PROBLEMS, "limit": 6}, "more": {**PROBLEMS, "shuffle_seed": 1, "limit": 5}},
            "samples": 4, "max_tokens": 6, "max_slots": 7,
        },
    }  # fmt: skip
    result = run(str(write(tmp_path / "eval.yaml", recipe)))
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    for name, problems in (("sums", 6), ("more", 5)):
        rows = pq.read_table(tmp_path / "eval" / "evaluation" / f"{name}_step_00000000.parquet").to_pylist()
        assert len(rows) == problems * 4 == 4 * summary["evaluation"][f"eval/{name}/problems"]
        assert all(len(row["token_ids"]) == len(row["logprobs"]) <= 6 for row in rows)
        scores = [row["reward"] for row in rows]
        assert summary["evaluation"][f"eval/{name}/avg"] == pytest.approx(sum(scores) / len(scores))


def test_an_untrained_model_can_be_evaluated_at_no_step(tmp_path):
    recipe = {
        "pipeline": "eval",
        "output_dir": str(tmp_path / "eval"),
        "model": {"scratch": SCRATCH, "dtype": "float32"},
        "evaluate": {"data": {**PROBLEMS, "limit": 3}, "max_tokens": 4},
    }
    assert run(str(write(tmp_path / "eval.yaml", recipe))).returncode == 0
