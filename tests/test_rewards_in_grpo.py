"""Two GRPO steps from a recipe with several rewards: each scores, is logged by name, and can be followed in samples."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from recipes import grpo, metrics, run, write
from rewards.language import language_share
from rewards.length import cosine
from rewards.math import grade

USERS_REWARD = """\
def even_length(completions, completion_ids, answer, **columns):
    return [None if len(ids) % 2 else 0.25 * len(gold) for ids, gold in zip(completion_ids, answer)]
"""
MAX_TOKENS = 12


def test_rewards_beside_each_other_are_scored_and_logged(tmp_path):
    (tmp_path / "mine.py").write_text(USERS_REWARD)
    rewards = [
        {"name": "math"},
        {"path": f"{tmp_path}/mine.py:even_length", "weight": 2.0},
        {"name": "cosine_length", "weight": 0.1, "args": {"max_length": MAX_TOKENS}},
        {"name": "language", "weight": 0.5, "args": {"target": "en"}},
    ]
    recipe = grpo(tmp_path / "run", rewards=rewards, grpo__steps=2, rollout__max_tokens=MAX_TOKENS)
    result = run(str(write(tmp_path / "recipe.yaml", recipe)))
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    for step, line in enumerate(lines, start=1):
        rows = pq.read_table(tmp_path / "run" / "samples" / f"step_{step:08d}.parquet").to_pylist()
        expected = [expected_components(row) for row in rows]
        for row, components in zip(rows, expected, strict=True):
            assert json.loads(row["components"]) == pytest.approx(components, nan_ok=True)
            weighted = zip((1.0, 2.0, 0.1, 0.5), components.values(), strict=True)
            assert row["reward"] == pytest.approx(sum(w * value for w, value in weighted if value is not None))
        for name in ("math", "even_length", "cosine_length", "language"):
            values = [c[name] for c in expected if c[name] is not None]
            mean = math.fsum(values) / len(values) if values else None
            assert line[f"reward/{name}"] == (mean if mean is None else pytest.approx(mean))
            assert line[f"none/{name}"] == 16 - len(values)
        for verdict in ("correct", "wrong", "unparsed", "timeout"):
            assert line[f"verdict/{verdict}"] == sum(row["verdict"] == verdict for row in rows)
        assert sum(line[f"verdict/{v}"] for v in ("correct", "wrong", "unparsed", "timeout")) == 16
        assert 0 < line["none/even_length"] < 16


def expected_components(row):
    """Each reward computed anew from what the samples file says of a completion."""
    response = "<think>" + row["completion"]  # the template's prefill
    correct = grade(response, row["answer"]).correct
    length = row["tokens"]
    ends = (2.0, 1.0) if correct else (-10.0, 0.0)
    return {
        "math": float(correct),
        "even_length": None if length % 2 else 0.25 * len(row["answer"]),
        "cosine_length": -10.0 if length >= MAX_TOKENS else cosine(length / MAX_TOKENS, *ends),
        "language": language_share(response, "en"),
    }
