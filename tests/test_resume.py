"""Killed at any moment and started again, a run ends as one that was never killed."""

from __future__ import annotations

import signal

import pyarrow.parquet as pq
import pytest
import yaml

from recipes import grpo, metrics, run, sft, write

# Each patch kills the process, for real, at the third time a place is reached. `once` is a file that says it
# has happened, so that the second start goes through.
KILL = """
import os, signal, sys
from pathlib import Path
once, place = Path(sys.argv[1]), sys.argv[2]
calls = 0
def strike(third=3):
    global calls
    calls += 1
    if calls == third and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
if place == "rollout":
    import rl.rollout.decode as decode
    real = decode.DecodeStep.__call__
    def call(self, *a):
        strike(30)
        return real(self, *a)
    decode.DecodeStep.__call__ = call
elif place == "optimizer":
    import torch
    real = torch.optim.AdamW.step
    def step(self, *a, **k):
        result = real(self, *a, **k)  # weights have moved, nothing is saved
        strike()
        return result
    torch.optim.AdamW.step = step
elif place == "checkpoint":
    import torch
    real = torch.save
    def save(state, path):
        real(state, path)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)  # half written
        strike()
        real(state, path)
    torch.save = save
elif place == "rename":
    import rl.run.checkpoint as checkpoint
    real = checkpoint._flush
    def flush(path):
        real(path)
        if path.name == "checkpoints":  # just after the rename, before old ones are removed
            strike(2)
    checkpoint._flush = flush
elif place == "metrics":
    import rl.run.metrics as metrics
    real = metrics.Metrics.write
    def write(self, step, values):
        real(self, step, values)
        with self.path.open("a") as file:
            file.write('{"step": 99, "rew')  # a line that the kill cut off
        strike()
        self.truncate(step)
    metrics.Metrics.write = write
from rl.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def samples(folder):
    return {p.name: pq.read_table(p).to_pylist() for p in sorted((folder / "samples").glob("*.parquet"))}


# Dynamic sampling moves the data cursor, the EMA reference and Adam have state: all must come back.
STATEFUL = {
    "grpo__kl": {"coefficient": 0.05},
    "grpo__reference": {"ema": 0.9},
    "grpo__dynamic_sampling": {"max_rounds": 2},
    "grpo__loss": {"clip_high": 0.28, "aggregation": "token"},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    recipe = write(folder / "recipe.yaml", grpo(folder / "run", **STATEFUL))
    result = run(str(recipe))
    assert result.returncode == 0, result.stderr
    assert len(metrics(folder / "run")) == 4
    return folder / "run"


@pytest.mark.parametrize(
    "place",
    [
        "rollout",
        "optimizer",
        "checkpoint",
        pytest.param("rename", marks=pytest.mark.slow),
        pytest.param("metrics", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(place, uninterrupted, tmp_path):
    recipe = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", **STATEFUL))
    once = tmp_path / "struck"
    killed = run(str(once), place, str(recipe), code=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert once.exists() and not (tmp_path / "run" / "summary.json").exists()
    resumed = run(str(once), place, str(recipe), code=KILL)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert metrics(tmp_path / "run") == metrics(uninterrupted)
    assert samples(tmp_path / "run") == samples(uninterrupted)


def test_killed_sft_equals_uninterrupted(tmp_path):
    whole = write(tmp_path / "whole.yaml", sft(tmp_path / "whole"))
    assert run(str(whole)).returncode == 0
    part = write(tmp_path / "part.yaml", sft(tmp_path / "part"))
    assert run(str(tmp_path / "struck"), "optimizer", str(part), code=KILL).returncode == -signal.SIGKILL
    assert run(str(part)).returncode == 0
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


def test_a_complete_run_is_not_run_again_and_a_longer_one_goes_on(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run"))
    assert run(str(recipe), "grpo.steps=2").returncode == 0
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert run(str(recipe), "grpo.steps=2").returncode == 0
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before
    longer = run(str(recipe), "grpo.steps=4")
    assert "resumed after step 2" in longer.stdout
    straight = write(tmp_path / "straight.yaml", grpo(tmp_path / "straight"))
    assert run(str(straight)).returncode == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_a_run_of_a_release_that_lacked_a_field_goes_on(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run"))
    assert run(str(recipe), "grpo.steps=1").returncode == 0
    kept = tmp_path / "run" / "recipe.yaml"
    older = yaml.safe_load(kept.read_text())
    del older["rollout"]["in_flight"], older["precision"]
    kept.write_text(yaml.safe_dump(older, sort_keys=False))
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert run(str(recipe), "grpo.steps=1").returncode == 0
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before
    longer = run(str(recipe), "grpo.steps=2")
    assert "resumed after step 1" in longer.stdout, longer.stderr


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", grpo__steps=1))
    assert run(str(recipe)).returncode == 0
    other = run(str(recipe), "optimizer.learning_rate=1e-4", "grpo.steps=2")
    assert other.returncode == 2 and "optimizer.learning_rate" in other.stderr and "resume=never" in other.stderr
    again = run(str(recipe), "optimizer.learning_rate=1e-4", "grpo.steps=2", "resume=never")
    assert again.returncode == 0, again.stderr
