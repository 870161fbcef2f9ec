"""The parent's side of a sandbox: no wait without end, nothing left behind, no limit that load switches off."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from sandboxes import needs_sandbox

from rewards.code import check_sandbox, run_tests
from rewards.code.box import Box
from rewards.code.limits import Limits

PASSING = ("print(int(input()) * 2)", [{"type": "stdio", "input": "2", "output": "4"}])


def test_a_late_word_of_the_launcher_is_not_the_end_of_a_job() -> None:
    """Who the first process is comes from another process than the rest, so on a busy machine after "ready"."""
    box = Box("none", Limits())
    box.ready()
    ours, theirs = socket.socketpair()
    box._control, control = ours, box._control
    try:
        theirs.sendall(json.dumps({"first": 1}).encode() + b'\n{"status": 0, "clean": true}\n')
        assert box.messages() == [{"status": 0, "clean": True}] and box._first == 1
    finally:
        box._control, box._first = control, 0
        ours.close()
        theirs.close()
        box.close()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 1500:
        pytest.skip("this user may not open that many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1500, before[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for fd in opened:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_with_many_open_files_can_run_tests(many_descriptors: None) -> None:
    assert run_tests(*PASSING, sandbox="none").outcomes == ("passed",)


def test_without_descriptors_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox("none")
    for name in ("socketpair", "pipe"):
        with monkeypatch.context() as patch:

            def exhausted(*arguments: object) -> None:
                raise OSError(24, "Too many open files")

            patch.setattr(socket if name == "socketpair" else os, name, exhausted)
            outcomes = run_tests(*PASSING, sandbox="none").outcomes
        assert outcomes == ("sandbox_error",) and "Too many open files" in outcomes[0].detail


@needs_sandbox
def test_writing_without_pause_does_not_hide_memory_from_the_limit() -> None:
    program = """
        import os, time
        for _ in range(6):
            if os.fork() == 0:
                x = bytearray(b'x') * (50 << 20)
                time.sleep(60)
        while True:
            os.write(1, b'x')
            time.sleep(0.002)
    """
    tests = [{"type": "stdio", "input": "", "output": ""}]
    assert run_tests(dedent(program), tests, memory_mb=128, timeout_s=8).outcomes == ("memory",)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_parent_leaves_no_scratch_folder(number: int, tmp_path: Path) -> None:
    code = (
        "from rewards.code import run_tests\n"
        'program = \'import time; open("x", "w").close(); print(1, flush=True); time.sleep(60)\'\n'
        "run_tests(program, [{'type': 'stdio', 'input': '', 'output': ''}], sandbox='none', timeout_s=60)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=root) as parent:
        _until(lambda: any(tmp_path.glob("r1forge-*/x")))
        parent.send_signal(number)
    _until(lambda: not any(tmp_path.iterdir()))


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
