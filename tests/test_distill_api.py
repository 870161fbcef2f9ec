"""A teacher by API: whatever the server does, nothing that it sent is lost or doubled, and the summary tells of it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from teacher_server import Mischief, TeacherServer, honest

from recipes import REPO, change, write
from rewards.http_retry import Pace
from rl.check import check
from rl.distill.journal import Journal, Received, Wanted, missing, read_journals
from rl.recipe_io import RecipeError, validate
from rl.runner import run

Serve = Callable[..., TeacherServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[TeacherServer] = []

    def start(mischief: Mischief = honest) -> TeacherServer:
        running.append(TeacherServer(mischief))
        return running[-1]

    yield start
    for server in running:
        server.close()


def recipe(folder: Path, server: TeacherServer, problems: int = 10, **changes: Any) -> dict[str, Any]:
    path = folder / "problems.jsonl"
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {7 * i}?", "answer": str(8 * i)} for i in range(problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: dict[str, Any] = {
        "pipeline": "distill",
        "output_dir": str(folder / "run"),
        "data": {"path": str(path), "columns": {"id": "id"}, "template": "r1-chat"},
        "teacher": {
            "engine": "api", "base_url": server.url, "model": "r1", "samples": 3, "max_concurrency": 4,
            "backoff_s": 0.01, "timeout_s": 20.0, "max_tokens": 64,
        },
        "rewards": [{"name": "integer"}],
        "select": {"per_problem": 2, "max_repetition": None},
    }  # fmt: skip
    return change(made, **changes)


def distil(made: dict[str, Any]) -> dict[str, Any]:
    return run(validate(made))


def journal_keys(folder: Path) -> Counter[tuple[str, int]]:
    lines = [json.loads(line) for path in folder.glob("run/journal/*.jsonl") for line in path.open()]
    return Counter((line["id"], line["sample"]) for line in lines)


def rows_of(path: str) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


ALL = Counter((f"p{i}", j) for i in range(10) for j in range(3))


def test_a_well_behaved_server(tmp_path: Path, serve: Serve) -> None:
    gate, turns = threading.Barrier(4), itertools.count()

    def four_together(body: dict[str, Any], before: int) -> str:
        """The first four are answered once all four are there: fewer at a time would break the barrier."""
        if next(turns) < 4:
            gate.wait(15)
        return "answer"

    server = serve(four_together)
    summary = distil(recipe(tmp_path, server))
    assert journal_keys(tmp_path) == ALL and set(server.seen.values()) == {1}
    body = json.loads(next(iter(server.seen)))
    assert body["model"] == "r1" and body["temperature"] == 0.6 and body["top_p"] == 0.95 and body["max_tokens"] == 64
    assert body["messages"][0]["content"].endswith("within \\boxed{}.") and "top_k" not in body
    assert len({json.loads(raw)["seed"] for raw in server.seen}) == 30  # every sample has a seed of its own
    traces = rows_of(summary["traces"])
    assert len(traces) == 30 and all(t["thinking"].startswith("Adding") and "sum is" in t["answer"] for t in traces)
    wrong = {t["sample"] for t in traces if t["gold"] not in t["answer"]}
    assert wrong and {t["verdict"] for t in traces} == {"correct", "wrong"}
    for trace in traces:  # by the answer's text, not by the verifier
        said = trace["answer"].removeprefix("The sum is \\boxed{").removesuffix("}.")
        assert (trace["verdict"] == "correct") == (said == trace["gold"])
    pool = rows_of(summary["pool"])
    assert pool and all(p["solution_answer"] == p["answer"] for p in pool)
    assert max(Counter(p["id"].partition("/")[0] for p in pool).values()) == 2
    assert summary["sampling"]["completion_tokens"] == 600 and not summary["sampling"]["retried"]
    assert server.most == 4


def test_a_server_that_fails_stalls_limits_disconnects_and_talks_garbage(tmp_path: Path, serve: Serve) -> None:
    wrongs = ["500", "429 1", "disconnect", "cut", "garbage", "no choices", "empty", "503", "stall"]
    order: dict[str, int] = {}

    def mischief(body: dict[str, Any], before: int) -> str:
        """Every request fails once, each in the next way; a few of them fail three times."""
        number = order.setdefault(json.dumps(body), len(order))
        hard = number % 7 == 0 and wrongs[number % 9] not in ("stall", "429 1")
        return "answer" if before >= (3 if hard else 1) else wrongs[number % 9]

    calm, wild = tmp_path / "calm", tmp_path / "wild"
    calm.mkdir(), wild.mkdir()
    expected = distil(recipe(calm, serve()))
    server = serve(mischief)
    summary = distil(recipe(wild, server, teacher__timeout_s=3.0, teacher__max_concurrency=8))
    assert journal_keys(wild) == ALL  # nothing lost, nothing doubled
    assert set(server.answered) == set(server.seen) and len(server.seen) == 30
    retried = summary["sampling"]["retried"]
    assert set(retried) == {
        "HTTP 500", "HTTP 429", "HTTP 503", "the reply is not a chat completion", "the reply is empty",
        "connection failed: RemoteDisconnected", "the reply was cut off", "no complete reply in 3 s",
    }  # fmt: skip
    # On a busy machine a request can be too late without having reached the server.
    assert sum(retried.values()) >= server.seen.total() - 30 >= 30
    assert not summary["sampling"]["failed"] and not summary["sampling"]["refused"]
    # The trouble left no trace in the results.
    for name in ("pool", "traces"):
        assert rows_of(summary[name]) == rows_of(expected[name])


def test_retry_after_is_obeyed(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda body, before: "429 1" if len(server.times) == 1 else "answer")
    distil(recipe(tmp_path, server, problems=3, teacher__max_concurrency=1))
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 9 and gaps[0] >= 1.0


def test_a_pause_holds_for_all_threads_and_ends_when_stopped() -> None:
    pace, stop = Pace(), threading.Event()
    pace.pause(0.3)
    start = time.monotonic()
    assert pace.wait(stop) and time.monotonic() - start >= 0.29
    pace.pause(600.0)
    stop.set()
    assert not pace.wait(stop) and time.monotonic() - start < 300


def test_requests_per_minute(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    distil(recipe(tmp_path, server, problems=4, teacher__requests_per_minute=1200.0, teacher__max_concurrency=12))
    assert len(server.times) == 12 and max(server.times) - min(server.times) >= 11 * 0.05 - 0.02


def test_a_refused_request_is_listed_and_not_asked_again(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda body, before: "400" if "What is 3 +" in body["messages"][0]["content"] else "answer")
    made = recipe(tmp_path, server)
    summary = distil(made)
    assert summary["sampling"]["refused"] == {"HTTP 400": 3} and summary["samples"] == 27
    assert summary["sampling"]["errors"][0].startswith("problem p3, sample 0: HTTP 400: status [31m 400")
    asked = server.seen.total()
    (tmp_path / "run" / "summary.json").unlink()
    again = distil(made)
    assert server.seen.total() == asked == 30 and again["sampling"]["refused"] == {"HTTP 400": 3}


def test_on_error_stop_keeps_what_was_received(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda body, before: "422" if len(server.times) == 12 else "answer")
    made = recipe(tmp_path, server, on_error="stop", teacher__max_concurrency=1)
    with pytest.raises(RecipeError, match="teacher: HTTP 422: status .* what was received is kept"):
        distil(made)
    kept = journal_keys(tmp_path).total()
    assert 11 <= kept < 20 and not (tmp_path / "run" / "summary.json").exists()
    server.mischief = honest
    assert distil(made)["sampling"]["known"] == kept and journal_keys(tmp_path) == ALL


def test_a_key_that_is_refused_stops_at_once_and_is_never_shown(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    server = serve(lambda body, before: "401")
    made = recipe(tmp_path, server, problems=40, teacher__api_key_env="TEACHER_KEY")
    with pytest.raises(RecipeError, match=r"HTTP 401: status .* Bearer \*\*\*") as raised:
        distil(made)
    assert server.seen.total() < 40 and set(server.keys) == {"Bearer sk-very-secret"}
    kept = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"sk-very-secret" in text for text in [*kept, str(raised.value).encode()])


def test_a_server_that_is_down_ends_the_run(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda body, before: "503")
    with pytest.raises(RecipeError, match=r"teacher.base_url: 20 requests failed .*: HTTP 503 \(20\)"):
        distil(recipe(tmp_path, server, problems=100, teacher__retries=0))
    assert server.seen.total() < 60


def test_failures_leave_the_run_open_and_are_asked_again(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda body, before: "503" if "What is 2 +" in body["messages"][0]["content"] else "answer")
    made = recipe(tmp_path, server, teacher__retries=1)
    summary = distil(made)
    assert summary["sampling"]["failed"] == {"HTTP 503": 3} and summary["samples"] == 27
    assert not (tmp_path / "run" / "summary.json").exists()
    server.mischief = honest
    asked = server.seen.total()
    again = distil(made)
    assert again["samples"] == 30 and server.seen.total() == asked + 3 and journal_keys(tmp_path) == ALL
    assert (tmp_path / "run" / "summary.json").exists()
    assert distil(made) == again and server.seen.total() == asked + 3  # complete: nothing is asked any more


def test_more_samples_ask_only_for_the_further_ones_and_other_settings_for_all(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    distil(recipe(tmp_path, server))
    distil(recipe(tmp_path, server, teacher__samples=4))
    assert server.seen.total() == 40 and set(server.seen.values()) == {1}
    distil(recipe(tmp_path, server, teacher__samples=4, select__prefer="shortest"))  # selects anew, asks nothing
    assert server.seen.total() == 40
    distil(recipe(tmp_path, server, teacher__samples=4, teacher__temperature=1.0))
    assert server.seen.total() == 80


def test_sigkill_and_resume(tmp_path: Path, serve: Serve) -> None:
    """A real process, killed while it samples: what it had received is not asked again, and the pool is the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    expected = distil(recipe(whole, serve()))
    turns = itertools.count()
    server = serve(lambda body, before: "answer" if next(turns) < 12 else "stall")
    made = recipe(killed, server)
    command = [sys.executable, "-m", "rl", str(write(killed / "recipe.yaml", made))]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = killed / "run" / "journal" / "0.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") == 12):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal_keys(killed)
    assert set(kept.values()) == {1}
    with journal.open("ab") as file:  # as if the kill had torn the last line
        file.write(b'{"id": "p0", "sample": 0, "sett')
    server.seen.clear()
    server.mischief = honest
    summary = distil(made)
    assert server.seen.total() == 18 and journal_keys(killed) == ALL
    assert summary["sampling"]["known"] == 12 and summary["sampling"]["received"] == 18
    for name in ("pool.parquet", "traces.parquet", "report.md"):
        assert (killed / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    assert Path(expected["pool"]).parent == whole / "run"


def test_the_journal_cuts_a_torn_line_and_keeps_a_second_run_out(tmp_path: Path) -> None:
    wanted = [Wanted("a", 0, "s"), Wanted("a", 1, "s"), Wanted("b", 0, "s")]
    with Journal(tmp_path) as journal:
        journal.append([Received("a", 0, "s", content="é\ud800\nx")])
        with pytest.raises(RecipeError, match="another run is writing"):
            Journal(tmp_path)
        journal.append([Received("a", 1, "s", content="y" * 200_000)])
    path = tmp_path / "0.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert missing(wanted, read_journals(tmp_path)) == wanted[1:]
    with Journal(tmp_path) as journal:
        journal.append([Received("a", 1, "s", content="z")])
    found = read_journals(tmp_path)
    assert found["a", 0, "s"].content == "é\ud800\nx" and found["a", 1, "s"].content == "z"
    assert missing(wanted, found) == wanted[2:] and path.read_bytes().count(b"\n") == 2
    path.write_bytes(b"no line break")
    with Journal(tmp_path):
        assert path.read_bytes() == b""


def test_check_tells_of_requests_and_of_a_missing_key(tmp_path: Path, serve: Serve) -> None:
    made = recipe(tmp_path, serve(), teacher__output_price=2.0)
    text = check(validate(made))
    assert "10 problems x 3 samples = 30" in text and "1,920 at most" in text
    with pytest.raises(RecipeError, match="teacher.api_key_env: the environment variable NO_SUCH_KEY is not set"):
        check(validate(change(made, teacher__api_key_env="NO_SUCH_KEY")))
    with pytest.raises(RecipeError, match=r"teacher.base_ur: unknown field; did you mean 'base_url'\?"):
        validate(change(made, teacher__base_ur="x"))
    with pytest.raises(RecipeError) as raised:
        validate(change(made, teacher__api_key_env="sk-my-own-key"))
    assert "not the key itself" in str(raised.value) and "sk-my" not in str(raised.value)
    with pytest.raises(RecipeError, match="must not hold a user, password"):
        validate(change(made, teacher__base_url="https://me:key@host/v1"))
