"""The worker pool: deadlines, deaths, threads, event loops, forks, and what is left afterwards.

Workers are real processes of a program of this file, which serves the real protocol with odd comparisons.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rewards.math.pool as pool_module
from rewards.cpus import share_of_cpus
from rewards.math.pool import Pool, WorkerStartError

ROOT = Path(__file__).parents[1]
ODD = """
import os, sys, time
from rewards.math import worker
worker.MAX_REQUESTS = 50

def compare(answer, gold):
    if answer == "spin":
        while True: pass
    if answer == "hold the interpreter":
        return 3 ** (10 ** 9) == 1  # minutes in one C call, which no other thread of the worker interrupts
    if answer == "sleep":
        time.sleep(0.2)
    if answer == "memory":
        return len(bytearray(4 * 2**30)) == 1
    if answer == "exit":
        os._exit(3)
    if answer == "recurse":
        return compare(answer, gold)
    if answer == "raise":
        raise ValueError("odd text")
    if answer == "print":
        print('{"equal": true, "retire": false}', flush=True)
        os.write(1, b"noise"); os.write(2, b"noise" * 100_000); sys.stdin.read(); os.read(0, 10)
    return answer == gold

print("printed by some import", end="", flush=True)
worker.serve(lambda: compare)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("worker") / "odd.py"
    path.write_text(ODD)
    return [sys.executable, "-P", str(path)]


@pytest.fixture
def pool(program: list[str]) -> Iterator[Pool]:
    made = Pool(program, size=2)
    yield made
    pids = made.pids()
    made.close()
    assert made.pids() == [] and not any(map(_exists, pids))


def _exists(pid: int) -> bool:
    """True also for a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _runs(pid: int) -> bool:
    """As `_exists`, but not for a zombie that this process is not the parent of and cannot reap."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return _exists(pid) if not Path("/proc/self").exists() else False


def _soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# -- one caller ------------------------------------------------------------------------------------


def test_one_worker_answers_many_requests(pool: Pool) -> None:
    assert pool.pids() == []
    assert pool.compare("a", "a", limit_s=10) is True
    [pid] = pool.pids()
    assert pool.compare("\ud800\x00\n七", "a", limit_s=10) is False
    assert pool.compare("\ud800\x00\n七", "\ud800\x00\n七", limit_s=10) is True
    assert pool.compare("x" * 1_000_000, "x" * 1_000_000, limit_s=10) is True  # far more than a pipe holds
    assert pool.pids() == [pid]


@pytest.mark.parametrize("answer", ["spin", "hold the interpreter"])
def test_the_deadline_is_kept_and_the_worker_replaced(pool: Pool, answer: str) -> None:
    pool.compare("a", "a", limit_s=10)
    [pid] = pool.pids()
    start = time.monotonic()
    assert pool.compare(answer, "a", limit_s=0.3) is None
    assert 0.3 <= time.monotonic() - start < 2
    assert pool.pids() == [] and not _exists(pid)
    assert pool.compare("b", "b", limit_s=10) is True


@pytest.mark.parametrize(
    ("answer", "verdict", "replaced"),
    [
        ("memory", None, True),
        ("exit", None, True),
        ("recurse", False, False),
        ("raise", False, False),
        ("print", False, False),
    ],
)
def test_failures_of_a_comparison(pool: Pool, answer: str, verdict: bool | None, replaced: bool) -> None:
    pool.compare("a", "a", limit_s=10)
    before = pool.pids()
    assert pool.compare(answer, "a", limit_s=10) is verdict
    assert pool.compare("next", "next", limit_s=10) is True
    assert (pool.pids() != before) == replaced


def test_a_worker_killed_in_mid_request_counts_as_a_limit_exceeded(pool: Pool) -> None:
    pool.compare("a", "a", limit_s=10)
    [pid] = pool.pids()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(pool.compare, "spin", "a", limit_s=30)
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert asked.result(timeout=10) is None
    assert not _exists(pid)


def test_a_worker_killed_while_idle_harms_nobody(pool: Pool) -> None:
    pool.compare("a", "a", limit_s=10)
    [pid] = pool.pids()
    os.kill(pid, signal.SIGKILL)
    assert _soon(lambda: not _runs(pid))
    assert pool.compare("b", "b", limit_s=10) is True


def test_workers_are_retired_after_many_requests(pool: Pool) -> None:
    pool.compare("a", "a", limit_s=10)
    [first] = pool.pids()
    assert [pool.compare(str(i), "7", limit_s=10) for i in range(60)] == [i == 7 for i in range(60)]
    assert first not in pool.pids() and not _exists(first)


def test_verdicts_are_remembered_but_not_exceeded_limits(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_REMEMBERED", 3)
    assert pool.compare("exit", "a", limit_s=10) is None
    for i in range(10):
        assert pool.compare(str(i), "9", limit_s=10) is (i == 9)
    pool.close()
    assert pool.compare("9", "9", limit_s=0) is True
    assert pool.pids() == []
    assert pool.compare("exit", "a", limit_s=10) is None and pool.compare("1", "9", limit_s=10) is False


def test_the_deadline_of_a_call_includes_queue_and_start(program: list[str]) -> None:
    pool = Pool([sys.executable, "-c", "import time; time.sleep(60)"], size=1)
    start = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(pool.compare, "a", "a", limit_s=1, deadline=start + 0.5) for _ in range(4)]
        assert [future.result() for future in asked] == [None] * 4
    assert 0.5 <= time.monotonic() - start < 2
    assert len(pool.pids()) == 1  # left to start: a slow start must not begin again with every call
    pool.close()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-c", "import sympy_that_is_missing"], "No module named 'sympy_that_is_missing'"),
        ([sys.executable, "-c", "raise SystemExit(4)"], "status 4"),
        (["/no/such/program"], "No such file"),
    ],
)
def test_a_worker_that_cannot_start_is_one_clear_error(command: list[str], message: str) -> None:
    pool = Pool(command, size=1)
    for _ in range(2):
        with pytest.raises(WorkerStartError, match=message):
            pool.compare("a", "a", limit_s=10)
    assert pool.pids() == []


def test_a_worker_that_takes_for_ever_to_start_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "START_LIMIT_S", 0.3)
    pool = Pool([sys.executable, "-c", "import time; time.sleep(60)"], size=1)
    with pytest.raises(WorkerStartError, match="not ready after"):
        pool.compare("a", "a", limit_s=10)
    assert pool.pids() == []


# -- many callers ----------------------------------------------------------------------------------


def test_eight_threads_share_two_workers(pool: Pool) -> None:
    def ask(i: int) -> bool | None:
        answer = "spin" if i % 20 == 3 else str(i)
        return pool.compare(answer, str(i - i % 2), limit_s=0.5)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(60)))
    assert found == [None if i % 20 == 3 else i % 2 == 0 for i in range(60)]
    assert 1 <= len(pool.pids()) <= 2


def test_two_workers_compute_at_the_same_time(pool: Pool) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda i: pool.compare("sleep", str(i), limit_s=10), range(2)))  # both started
        start = time.monotonic()
        list(threads.map(lambda i: pool.compare("sleep", str(i), limit_s=10), range(2, 12)))
    assert time.monotonic() - start < 1.9  # 10 sleeps of 0.2 s
    assert len(pool.pids()) == 2


def test_a_call_within_a_running_event_loop(pool: Pool) -> None:
    async def main() -> list[bool | None]:
        direct = pool.compare("a", "a", limit_s=10)
        rest = [asyncio.to_thread(pool.compare, str(i), "3", limit_s=10) for i in range(8)]
        return [direct, *await asyncio.gather(*rest)]

    assert asyncio.run(main()) == [True, *(i == 3 for i in range(8))]


@pytest.mark.parametrize(("ranks", "share"), [("", 1), ("1", 1), ("2", 2), ("1000", 1000), ("two", 1), ("0", 1)])
def test_the_ranks_of_a_machine_share_its_cores(ranks: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert share_of_cpus({"LOCAL_WORLD_SIZE": ranks}) == max(1, 8 // share)


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_uses_workers_of_its_own(program: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(program, size=2)
    monkeypatch.setattr(pool_module, "_shared", pool)
    pool.compare("a", "a", limit_s=10)
    mine = pool.pids()
    child = os.fork()
    if child == 0:
        ok = pool.pids() == [] and pool.compare("b", "b", limit_s=10) is True and pool.pids() != mine
        pool.close()
        os._exit(0 if ok else 1)
    # Both at once: they would read each other's replies through one pipe.
    assert [pool.compare(str(i), "7", limit_s=10) for i in range(20)] == [i == 7 for i in range(20)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.pids() == mine and pool.compare("c", "c", limit_s=10) is True
    pool.close()


PARENT = """
import functools, sys, threading
import rewards.math.pool as module
module.Pool = functools.partial(module.Pool, sys.argv[1:], 2)
pool = module.shared_pool()
pool.compare("a", "a", limit_s=10)
threading.Thread(target=pool.compare, args=("hold the interpreter", "b"), kwargs={"limit_s": 1.5}, daemon=True).start()
pool.compare("sleep", "b", limit_s=10)
print(*pool.pids(), flush=True)
"""


def _parent(program: list[str], last_line: str) -> tuple[subprocess.Popen[str], list[int]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT + last_line, *program], env=environment, text=True, stdout=subprocess.PIPE
    )
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    return parent, pids


def test_nothing_is_left_when_the_parent_ends(program: list[str]) -> None:
    parent, pids = _parent(program, "")
    start = time.monotonic()
    assert parent.wait(timeout=20) == 0
    assert time.monotonic() - start < 1.4  # not the 1.5 s of the computation under way
    assert not any(map(_runs, pids))


def test_nothing_is_left_when_the_parent_is_killed(program: list[str]) -> None:
    parent, pids = _parent(program, "import time; time.sleep(60)")
    assert all(map(_runs, pids))
    parent.kill()
    parent.wait()
    # The one inside a C call is ended by its own watchdog, one second after its limit.
    assert _soon(lambda: not any(map(_runs, pids)))


def test_closing_stdin_ends_a_worker_in_mid_computation(program: list[str]) -> None:
    worker = subprocess.Popen(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdin and worker.stdout
    assert b"printed" in worker.stdout.readline() and b"ready" in worker.stdout.readline()
    worker.stdin.write(b'{"answer": "spin", "gold": "", "limit_s": 60}\n')
    worker.stdin.flush()
    time.sleep(0.2)
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait(timeout=5) == 0
    worker.stdout.close()


def test_the_worker_is_found_from_a_folder_that_shadows_everything(tmp_path: Path) -> None:
    for name in ("rewards", "sympy", "json", "threading", "queue"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')")
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import rewards.math.pool as m; os.chdir(sys.argv[2]);"
        "print(m.shared_pool().compare('x + 1', '1 + x', limit_s=10))"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", script, str(ROOT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": "."},
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert run.stdout == "True\n", run.stderr
    assert run.stderr == ""


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys, rewards.math as m; m.grade('73', '73'); m.grade('x', 'x'); m.grade_many([('73', '74')]);"
        "print(*{'sympy', 'subprocess', 'asyncio', 'concurrent.futures.thread'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=60)
    assert run.stdout == "\n", run.stderr
