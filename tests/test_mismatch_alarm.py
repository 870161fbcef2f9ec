"""When a run speaks up about sampler and trainer disagreeing, and what it advises."""

from __future__ import annotations

import math

import pytest
from ahead_runs import own_sampler, train

from recipes import grpo
from rl.mismatch import MismatchAlarm
from rl.recipe_io import validate


def alarm(tmp_path, **changes) -> MismatchAlarm:
    return MismatchAlarm(validate(grpo(tmp_path / "run", **changes)))


def mismatch(k3: float = 0.0, largest: float = 0.0, beyond: float = 0.0, **more: float) -> dict[str, float]:
    return {"mismatch/k3": k3, "mismatch/max": largest, "mismatch/beyond_10pct": beyond, **more}


def test_it_names_what_is_beyond_and_not_what_is_within(tmp_path):
    warning = alarm(tmp_path).of(mismatch(0.02, 4.0, 0.25))
    assert "mean k3 0.02 nats per token, 25% of tokens off by over 10 %." in warning
    assert "a token off by" not in warning
    assert "a token off by 6 nats" in alarm(tmp_path).of(mismatch(largest=6.0))
    assert alarm(tmp_path).of(mismatch(0.01, 5.0, 0.2)) is None
    assert alarm(tmp_path).of({"reward": 1.0}) is None  # nothing was trained
    assert alarm(tmp_path).of(mismatch(math.nan, -math.inf, math.nan)) is None


def test_it_speaks_again_when_it_is_twice_as_bad(tmp_path):
    it = alarm(tmp_path)
    spoken = [k3 for k3 in (0.009, 0.015, 0.02, 0.029, 0.031, 0.05, 0.062) if it.of(mismatch(k3))]
    assert spoken == [0.015, 0.031, 0.062]


def test_thresholds_are_the_recipes(tmp_path):
    changes = {"rollout__warn_mismatch": {"k3": 0.5, "max": None}}
    assert alarm(tmp_path, **changes).of(mismatch(0.4, 100.0)) is None
    assert alarm(tmp_path, **changes).of(mismatch(0.6)) is not None


@pytest.mark.parametrize(
    ("changes", "metrics", "said", "unsaid"),
    [
        ({}, {}, "correction.kind: tis", "older weights"),
        ({"grpo__correction": {"kind": "tis"}}, {}, "weights do not arrive", "correction.kind: tis"),
        ({"grpo__old_logprobs": "sampler"}, {}, "model.dtype: float32", "correction.kind: tis"),
        ({"rollout__top_p": 0.9}, {}, "top_p", "older weights"),
        ({}, {"staleness/max": 2.0}, "older weights (rollout.ahead)", "top_p"),
    ],
)
def test_advice_fits_the_recipe(changes, metrics, said, unsaid, tmp_path):
    warning = alarm(tmp_path, **changes).of(mismatch(1.0, **metrics))
    assert said in warning and unsaid not in warning


def test_a_run_prints_it_once(tmp_path, capsys):
    """A sampler that is told of new weights and keeps its own."""

    def deaf(training):
        sampler = own_sampler(training)
        sampler.update_weights = lambda named, version: setattr(sampler, "version", version)
        return sampler

    train(tmp_path / "run", 0, deaf, optimizer__learning_rate=0.05, rollout__warn_mismatch={"k3": 1e-4})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the sampler's")]
    assert 1 <= len(lines) <= 3 and "If it grows with the steps, weights do not arrive" in lines[0]
