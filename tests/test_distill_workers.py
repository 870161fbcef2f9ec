"""Teachers in workers: on threads of the test, in real processes that are killed, and in the real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_env
from test_distill_recipe import local
from worker_threads import SECRET, Running

from recipes import change, environment, launch_two, write
from rl.check import check
from rl.distill.asking import fingerprint
from rl.policy.load import load_model, load_tokenizer
from rl.recipe_io import RecipeError, validate
from rl.rollout import LocalSampler
from rl.rollout.local_engine import LocalEngine
from rl.rollout.workers.sampler import WorkerSampler
from rl.runner import run

LONG = {"teacher__max_tokens": 40, "teacher__min_tokens": 40, "data__generator__count": 24}
STARTED = {"count": 1, "env": {"OMP_NUM_THREADS": "1"}, "in_flight": 3}  # a problem at a time


class Counting(LocalEngine):
    """Takes so many problems, and refuses the next or never comes to an end with it."""

    def __init__(self) -> None:
        teacher = validate(local(Path())).teacher
        tokenizer = load_tokenizer(teacher.model)
        model = load_model(teacher.model, tokenizer, dtype=torch.float32)
        super().__init__(LocalSampler(model, tokenizer, max_slots=8))
        self.asked: list[int] = []
        self.takes, self.refuses = 1000, True

    def submit(self, key: str, prompt: Any, params: Any, stream: int) -> None:
        if len(self.asked) == self.takes and self.refuses:
            raise ValueError("enough")
        self.asked.append(stream)
        super().submit(key, prompt, params, stream)

    def step(self) -> Any:
        if len(self.asked) <= self.takes:
            return super().step()
        time.sleep(0.01)
        return []


def at(folder: Path, *workers: Running, **changes: Any) -> dict[str, Any]:
    """The small recipe with running workers, which have the same teacher, for the one in this process."""
    (folder / "secret").write_text(SECRET)
    urls = [worker.server.url for worker in workers]
    spec = {"urls": urls, "secret_file": str(folder / "secret"), "in_flight": 3, "start_timeout_s": 30.0}
    return local(folder / "there", teacher__workers=spec, **changes)


def journal(folder: Path) -> list[str]:
    """What was received, by all processes."""
    return sorted(line for path in (folder / "journal").glob("*.jsonl") for line in path.read_text().splitlines())


def test_workers_give_the_traces_of_the_teacher_in_this_process(tmp_path: Path) -> None:
    run(validate(local(tmp_path / "here")))
    with Running(tmp_path, engine=Counting()) as one, Running(tmp_path, engine=Counting()) as two:
        summary = run(validate(at(tmp_path, one, two)))
        for worker in (one, two):
            assert worker.loop.engine.asked and worker.loop._held == {}
            assert worker.client.health().version == -1
    assert summary["sampling"]["received"] == 18 and summary["tokens_by"] == "the teacher's tokenizer"
    assert journal(tmp_path / "there") == journal(tmp_path / "here")
    for name in ("pool.parquet", "traces.parquet", "report.md"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_what_has_arrived_is_kept_when_a_run_breaks_off(tmp_path: Path) -> None:
    with Running(tmp_path, engine=Counting()) as one:
        engine, made = one.loop.engine, validate(at(tmp_path, one))
        engine.takes = 4
        with pytest.raises(
            RecipeError, match="teacher.workers: .* refused a prompt of .*: enough; what was .* is kept"
        ):
            run(made)
        kept, first = journal(tmp_path / "there"), set(engine.asked)
        assert len(kept) == 12 and len(first) == 4
        engine.asked, engine.takes = [], 1000
        summary = run(made)
        assert (summary["sampling"]["known"], summary["sampling"]["received"]) == (12, 6)
        assert len(engine.asked) == 2 and not first & set(engine.asked)
        whole = journal(tmp_path / "there")
        assert len(whole) == 18 and set(kept) < set(whole)
        engine.asked = []
        run(validate(at(tmp_path, one, select__per_problem=1)))  # selects anew, asks nothing
        assert not engine.asked and journal(tmp_path / "there") == whole
        run(validate(at(tmp_path, one, teacher__samples=4)))
        more = journal(tmp_path / "there")
        assert len(more) == 24 and set(whole) < set(more)


def test_workers_that_are_not_this_teacher_are_refused(tmp_path: Path) -> None:
    with Running(tmp_path, engine=Counting()) as one:
        with pytest.raises(RecipeError, match="teacher.workers: .*its engine is local, not vllm"):
            run(validate(at(tmp_path, one, teacher__engine="vllm")))
        with pytest.raises(RuntimeError, match="keep the weights that they loaded"):
            WorkerSampler([one.client], None, probe=None).update_weights([], 1)
        one.loop.engine.version = 3  # as after an update
        with pytest.raises(RecipeError, match=r"a trainer has sent it other weights \(version 3\): start it anew"):
            run(validate(at(tmp_path, one)))
    with pytest.raises(RecipeError, match="teacher.workers: .*did not start: .*refused"):
        run(validate(change(at(tmp_path, one), teacher__workers__start_timeout_s=0.1)))
    assert journal(tmp_path / "there") == []


def lines(folder: Path) -> int:
    path = folder / "journal" / "0.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    with Running(tmp_path, engine=Counting()) as one:
        engine, made = one.loop.engine, at(tmp_path, one)
        engine.takes, engine.refuses = 4, False
        command = [sys.executable, "-m", "rl", str(write(tmp_path / "recipe.yaml", made))]
        killed = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while lines(tmp_path / "there") < 12:
                assert killed.poll() is None
                time.sleep(0.05)
        finally:
            killed.kill()
        killed.wait()
        kept, first = journal(tmp_path / "there"), set(engine.asked[:4])
        assert len(kept) == 12
        engine.asked, engine.takes = [], 1000
        summary = run(validate(made))
        assert (summary["sampling"]["known"], summary["sampling"]["received"]) == (12, 6)
        assert len(engine.asked) == 2 and not first & set(engine.asked)
    run(validate(local(tmp_path / "here")))
    assert journal(tmp_path / "there") == journal(tmp_path / "here")


def test_a_worker_that_is_killed_goes_on_with_what_it_loads_again(tmp_path: Path, capsys: Any) -> None:
    folder, struck = tmp_path / "there", []

    def strike() -> None:
        while lines(folder) < 6:
            time.sleep(0.01)
        struck.append(json.loads((folder / "workers" / "worker-0.json").read_text())["pid"])
        os.kill(struck[0], signal.SIGKILL)

    threading.Thread(target=strike, daemon=True).start()
    run(validate(local(folder, teacher__workers=STARTED, **LONG)))
    output = capsys.readouterr().out
    assert struck and "is lost" in output and "is back" in output
    run(validate(local(tmp_path / "here", **LONG)))
    assert journal(folder) == journal(tmp_path / "here") and len(journal(folder)) == 72
    assert not (folder / "workers" / "weights").exists()
    again = json.loads((folder / "workers" / "worker-0.json").read_text())["pid"]
    assert again != struck[0] and not Path(f"/proc/{again}").exists()


@pytest.mark.slow
def test_two_processes_share_the_problems(tmp_path: Path) -> None:
    run(validate(local(tmp_path / "here")))
    write(tmp_path / "recipe.yaml", local(tmp_path / "there", teacher__workers=STARTED))
    both = launch_two(tmp_path, "recipe.yaml")
    assert both.wait(900) == 0, both.stdout.read()
    assert journal(tmp_path / "there") == journal(tmp_path / "here")
    counts = [path.read_text().count("\n") for path in sorted((tmp_path / "there" / "journal").glob("*.jsonl"))]
    assert counts == [9, 9]


@pytest.mark.slow
def test_a_teacher_in_vllm(tmp_path: Path) -> None:
    """Greedy, in float32: what our own sampler says."""
    shape = {"layers": 2, "hidden_size": 64, "intermediate_size": 64, "heads": 2, "kv_heads": 1}
    greedy = {"teacher__temperature": 0.0, "teacher__model": {"scratch": shape, "dtype": "float32"}}
    run(validate(local(tmp_path / "here", **greedy)))
    workers = {
        "count": 1,
        "python": vllm_env.vllm_python(),
        "env": vllm_env.ENVIRONMENT,
        "options": {"kv_cache_memory_bytes": 1 << 26},
        "start_timeout_s": 900.0,
    }
    served = {"teacher__engine": "vllm", "teacher__max_prompt_tokens": 64, "teacher__workers": workers}
    run(validate(local(tmp_path / "there", **greedy, **served)))
    here, there = ([json.loads(line) for line in journal(tmp_path / name)] for name in ("here", "there"))
    assert {record.pop("settings") for record in here}.isdisjoint({record.pop("settings") for record in there})
    assert len(here) == 18 and there == here


# ---- before anything is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"engine": "vllm"}, "teacher: engine: vllm needs workers.count (to be started here) or workers.urls"),
        ({"workers": {}}, "teacher: workers needs count"),
        ({"workers": {"count": 1, "transport": "http"}}, "teacher: workers.transport is about sending weights"),
        ({"workers": {"count": 1, "probe_tolerance": 0.1}}, "workers.probe_tolerance is about sending weights"),
        (
            {"engine": "vllm", "workers": {"count": 1, "deadline": 3}},
            "teacher.workers.deadline: unknown field; did you",
        ),
        ({"workers": {"urls": ["http://a:1"]}}, "workers.urls needs workers.secret_file"),
    ],
)
def test_errors_of_the_recipe(tmp_path: Path, teacher: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate(local(tmp_path, **{f"teacher__{name}": value for name, value in teacher.items()}))
    assert says in str(error.value)


def test_what_can_be_known_before_anything_is_loaded(tmp_path: Path) -> None:
    def of(engine: str = "vllm", teacher: dict[str, Any] | None = None, **workers: Any) -> Any:
        changes = {f"teacher__{name}": value for name, value in (teacher or {}).items()}
        return validate(local(tmp_path, teacher__engine=engine, teacher__workers={"count": 1, **workers}, **changes))

    def refused(recipe: Any) -> str:
        with pytest.raises(RecipeError) as error:
            check(recipe)
        return str(error.value)

    missing = of(teacher={"model": {"path": str(tmp_path / "none")}})
    assert f"teacher.model.path: folder {tmp_path / 'none'} does not exist" in refused(missing)
    assert "teacher.temperature: vLLM samples at temperatures of" in refused(of(teacher={"temperature": 3.0}))
    assert "max_model_len: 512 tokens are fewer than max_prompt_tokens + max_tokens = 2060" in refused(
        of(options={"max_model_len": 512})
    )
    assert "teacher.workers.python: no-such-python is not an" in refused(of("local", python="no-such-python"))
    (tmp_path / "secret").write_text("too short")
    assert "teacher.workers.secret_file: " in refused(of(secret_file=str(tmp_path / "secret")))
    text = check(of(python=sys.executable))
    assert "vllm, 1 started at 127.0.0.1" in text and "2060, beyond the 512 positions of the model" in text
    assert "beyond" not in check(of("local"))


def test_a_response_depends_on_the_engine_but_not_on_where_or_how_fast_it_runs(tmp_path: Path) -> None:
    def of(engine: str = "local", **workers: Any) -> list[Any]:
        spec = {"count": 1, **workers} if workers or engine == "vllm" else None
        return fingerprint(validate(local(tmp_path, teacher__engine=engine, teacher__workers=spec)).teacher)

    assert of() == of(count=3, options={"max_slots": 7, "threads": 2})
    assert of() != of(options={"draft_tokens": 2}) != of("vllm") != of()
    assert of("vllm") == of("vllm", options={"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2})
    assert of("vllm") != of("vllm", options={"quantization": "fp8"})
