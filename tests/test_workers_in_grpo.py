"""`rollout.mode: server` in whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ahead_runs
import pyarrow.parquet as pq
import pytest

from recipes import PROBLEMS, environment, free_port, grpo, launch_two, metrics, run, write
from rl.check_rollout import check_rollout, rollout_table
from rl.check_tables import memory_table
from rl.recipe_io import RecipeError, validate
from rl.recipe_workers import WorkersSpec

# The second run never samples from the model that it trains.
BOTH = """
import sys
from rl.__main__ import main
from rl.policy.replicated import Replicated
first = main([sys.argv[1]])
Replicated.sampler_model = None
sys.exit(first or main([sys.argv[2]]))
"""
WORKERS = {"count": 1, "env": {"OMP_NUM_THREADS": "1"}}
EVALUATE = {"data": {**PROBLEMS, "limit": 3}, "samples": 2, "max_tokens": 6, "every": 1, "at_start": True}


def samples(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "samples").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def evaluated(folder: Path) -> dict[str, list[dict]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "evaluation").glob("*.parquet"))}


def numbers(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("sync/")} for row in metrics(folder)]


def run_both(tmp_path: Path, **changes) -> None:
    """The same run twice, in process (`here`) and with a worker (`there`), which must not make a difference."""
    here = write(tmp_path / "here.yaml", grpo(tmp_path / "here", **changes))
    there = write(
        tmp_path / "there.yaml", grpo(tmp_path / "there", **changes, rollout__mode="server", rollout__workers=WORKERS)
    )
    result = run(str(here), str(there), code=BOTH)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(tmp_path / "here", tmp_path / "there")


def test_a_run_with_a_worker_is_the_run_in_process(tmp_path):
    run_both(tmp_path, grpo__steps=2, evaluate=EVALUATE)
    assert_same_evaluations(tmp_path / "here", tmp_path / "there")
    rows = [row for row in metrics(tmp_path / "there") if "evaluation" not in row]
    assert [row["sync/version"] for row in rows] == [2, 4]  # two updates a step
    assert all(row["sync/workers"] == 1 and row["sync/bytes"] > 10_000 and row["sync/probe"] < 1e-4 for row in rows)
    folder = tmp_path / "there" / "workers"
    assert not (folder / "weights").exists()
    pid = json.loads((folder / "worker-0.json").read_text())["pid"]
    assert not Path(f"/proc/{pid}").exists()  # ended with the run


def test_of_adapters_a_worker_gets_what_changed(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    lora = {"r": 4, "target_modules": ["q_proj"]}
    run_both(tmp_path, grpo__steps=2, model__lora=lora, optimizer__warmup_updates=0)
    rows = metrics(tmp_path / "there")
    whole = (tmp_path / "there" / "model" / "model.safetensors").stat().st_size
    assert all(1000 < row["sync/bytes"] < whole / 2 for row in rows)


def assert_same(here: Path, there: Path) -> None:
    """The same samples; numbers to rounding, as other batches of sequences may be other sums."""
    mine, theirs = samples(here), samples(there)
    for a, b in zip(mine, theirs, strict=True):
        assert a.pop("logprobs") == pytest.approx(b.pop("logprobs"), abs=1e-5)
        assert a.pop("advantage") == pytest.approx(b.pop("advantage"), abs=1e-5)
    assert mine == theirs
    for a, b in zip(numbers(here), numbers(there), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def assert_same_evaluations(here: Path, there: Path) -> None:
    """The same completions at every step, by the weights after it (two updates a step)."""
    mine, theirs = evaluated(here), evaluated(there)
    assert mine.keys() == theirs.keys() and len(mine) > 2
    for name, rows in mine.items():
        step = int(Path(name).stem.rpartition("_")[2])
        assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in theirs[name]]
        assert {row["weights_version"] for row in theirs[name]} == {2 * step}, name
        for a, b in zip(rows, theirs[name], strict=True):
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-5)


@pytest.mark.slow
def test_a_worker_samples_ahead_what_a_copy_in_process_does(tmp_path):
    """And evaluates at the same time, by the weights of the trainer's own step."""
    changes = {"grpo__steps": 4, "grpo__correction": {"kind": "tis"}, "grpo__old_logprobs": "trainer"}
    changes["evaluate"] = EVALUATE
    ahead_runs.train(tmp_path / "here", 1, **changes)
    recipe = grpo(tmp_path / "there", **changes, rollout__ahead=1, rollout__mode="server", rollout__workers=WORKERS)
    result = run(str(write(tmp_path / "there.yaml", recipe)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert ahead_runs.tokens(tmp_path / "there") == ahead_runs.tokens(tmp_path / "here")
    assert ahead_runs.versions(tmp_path / "there") == {1: {0}, 2: {0}, 3: {2}, 4: {4}}
    rows = [row for row in metrics(tmp_path / "there") if "evaluation" not in row]
    assert [row["staleness/max"] for row in rows] == [0, 2, 2, 2]
    assert_same_evaluations(tmp_path / "here", tmp_path / "there")


# The second process is slow, and samples when the first has nothing more to do.
LATE = """
import os, sys, time
from rl.__main__ import main
from rl.rollout.workers.sampler import WorkerSampler
stream = WorkerSampler.stream
def late(*a, **k):
    time.sleep(8.0 * int(os.environ["RANK"]))
    yield from stream(*a, **k)
WorkerSampler.stream = late
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_ahead_that_ends_early_keeps_its_workers_until_all_have_sampled(tmp_path):
    """Otherwise a rollout that has begun waits for them, as long as for workers that come up."""
    changes = {"grpo__max_seconds": 1e-9, "grpo__correction": {"kind": "tis"}, "rollout__ahead": 1}
    recipe = grpo(tmp_path / "run", **changes, rollout__mode="server", rollout__workers=WORKERS)
    path, port = write(tmp_path / "run.yaml", recipe), str(free_port())
    running = []
    for rank in ("0", "1"):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = environment(**names, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        running.append(subprocess.Popen([sys.executable, "-c", LATE, str(path)], env=env))
    try:
        start = time.monotonic()
        assert [process.wait(500) for process in running] == [0, 0]
        assert time.monotonic() - start < 500 < WorkersSpec().start_timeout_s
    finally:
        for process in running:
            process.kill()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_two_trainer_processes_whose_workers_are_killed(tmp_path):
    """Every sample as in the run without workers: nothing lost, nothing doubled, nothing by old weights."""
    shape = {"grpo__steps": 5, "rollout__max_tokens": 60, "rollout__min_tokens": 40}
    write(tmp_path / "calm.yaml", grpo(tmp_path / "calm", **shape))
    workers = {**WORKERS, "count": 2, "deadline_s": 10.0, "in_flight": 4}
    write(tmp_path / "chaos.yaml", grpo(tmp_path / "chaos", **shape, rollout__mode="server", rollout__workers=workers))
    calm = launch_two(tmp_path, "calm.yaml")
    assert calm.wait(600) == 0, calm.stdout.read()
    chaos = launch_two(tmp_path, "chaos.yaml")
    struck = []
    while chaos.poll() is None and len(struck) < 2:
        step, number = [("00000001", signal.SIGKILL), ("00000003", signal.SIGSTOP)][len(struck)]
        announced = tmp_path / "chaos" / "workers" / f"worker-{len(struck)}.json"
        if (tmp_path / "chaos" / "samples" / f"step_{step}.parquet").exists() and announced.exists():
            os.kill(json.loads(announced.read_text())["pid"], number)
            struck.append(number)
        time.sleep(0.02)
    output = chaos.communicate(timeout=900)[0]
    assert chaos.returncode == 0 and len(struck) == 2, output
    assert output.count("is lost") >= 2
    assert_same(tmp_path / "calm", tmp_path / "chaos")


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({"mode": "server"}, "mode: server needs workers.count"),
        ({"mode": "servre"}, "did you mean 'server'"),
        ({"engine": "vllm"}, "needs mode: colocate"),
        ({"mode": "colocate"}, "mode: colocate is for engine: vllm"),
        ({"workers": {"count": 1}}, "mean nothing with mode: inprocess"),
        ({"engine": "vllm", "mode": "colocate", "workers": {"count": 1}}, "workers.count means nothing"),
        ({"engine": "vllm", "mode": "colocate", "workers": {"bucket_mb": 64}}, "workers.bucket_mb means nothing"),
        ({"mode": "server", "workers": {"urls": ["http://a:1"]}}, "needs workers.secret_file"),
        ({"mode": "server", "workers": {"urls": ["a:1"], "secret_file": "s"}}, "must look like http://HOST:PORT"),
        (
            {"mode": "server", "workers": {"urls": ["http://a:1", "http://a:1/"], "secret_file": "s"}},
            "named twice",
        ),
        ({"mode": "server", "workers": {"count": 1, "urls": ["http://a:1"], "secret_file": "s"}}, "at most one of"),
        (
            {"mode": "server", "workers": {"urls": ["http://a:1"], "secret_file": "s", "python": "python3"}},
            "workers.python is for workers that the recipe starts",
        ),
        ({"mode": "server", "workers": {"count": 1, "transport": "htpp"}}, "did you mean 'http'"),
        ({"mode": "server", "workers": {"count": 2, "ports": [1]}}, "workers.ports has 1 entries for 2 worker"),
        ({"mode": "server", "workers": {"count": 2, "env": {"A": ["1"]}}}, "workers.env.A has 1 entries"),
        ({"mode": "server", "workers": {"count": 1, "cores": ["a-b"]}}, "must look like 0-3"),
        ({"mode": "server", "workers": {"count": 1, "deadline": 3}}, "did you mean 'deadline_s'"),
    ],
)
def test_errors_of_the_recipe(tmp_path, rollout, says):
    with pytest.raises(RecipeError, match="(?s)rollout.*") as error:
        validate(grpo(tmp_path, **{f"rollout__{k}": v for k, v in rollout.items()}))
    assert says in str(error.value)


def test_what_can_be_known_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("too short")

    def of(**rollout):
        return validate(grpo(tmp_path, **{f"rollout__{k}": v for k, v in rollout.items()}))

    with pytest.raises(RecipeError, match="secret_file: .*at least 16"):
        check_rollout(of(mode="server", workers={"urls": ["http://a:1"], "secret_file": str(tmp_path / "secret")}))
    with pytest.raises(RecipeError, match="workers.python: no-such-python is not an interpreter"):
        check_rollout(of(mode="server", workers={"count": 1, "python": "no-such-python"}))
    with pytest.raises(RecipeError, match="draft_tokens"):
        check_rollout(of(mode="server", engine="vllm", draft_tokens=1, workers={"count": 1}))
    for mode, count in (("server", {"count": 1}), ("colocate", {})):
        short = of(mode=mode, engine="vllm", workers={**count, "options": {"max_model_len": 64}})
        with pytest.raises(RecipeError, match="max_model_len: 64 tokens; the probe after each update wants 65"):
            check_rollout(short)
    vllm = {"mode": "server", "engine": "vllm", "workers": {"count": 1, "options": {"max_model_len": 512}}}

    def evaluating(rollout, **evaluate):
        changes = {f"rollout__{k}": v for k, v in rollout.items()}
        return validate(grpo(tmp_path, **changes, evaluate={"data": PROBLEMS, **evaluate}))

    with pytest.raises(RecipeError, match="evaluate.max_tokens: 512 tokens and a prompt do not fit"):
        check_rollout(evaluating(vllm, max_tokens=512))
    for field, recipe in (
        ("evaluate", evaluating(vllm, temperature=3.0, max_tokens=8)),
        ("rollout", of(**vllm, temperature=3.0)),
    ):
        with pytest.raises(RecipeError, match=f"{field}.temperature: vLLM samples at temperatures of 0.01 to 2.0 or 0"):
            check_rollout(recipe)
    served = evaluating({"mode": "server", "workers": {"count": 1}}, max_slots=8)
    assert any("evaluate.max_slots means nothing" in warning for warning in check_rollout(served))
    assert not any("means nothing" in warning for warning in check_rollout(evaluating({}, max_slots=8)))
    assert "evaluates too" in rollout_table(served)[0] and "evaluates" not in rollout_table(of())[0]
    assert any("slots" in line for line in memory_table(of()))
    assert not any("slots" in line for line in memory_table(served))  # the worker's own
    open_to_all = of(mode="server", workers={"count": 2, "host": "0.0.0.0"})
    assert "unencrypted" in check_rollout(open_to_all)[0]
    assert any("2 started at 0.0.0.0" in line for line in rollout_table(open_to_all))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="several hosts"):
        check_rollout(of(mode="server", workers={"count": 1}))


def test_the_slurm_script_is_bash():
    script = Path(__file__).parent.parent / "recipes" / "slurm" / "grpo-2-nodes.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
