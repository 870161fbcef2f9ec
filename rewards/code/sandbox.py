"""Running one program against its tests in local sandboxes.

A program's sandbox and, for assert tests, the judge's are separate: nothing that the program does reaches the
process that decides. Expected outputs of stdio tests never leave this process.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import backends
from .box import Box, BoxLost, new_file, readable
from .cases import AssertTest, StdioTest, Test
from .compare import same_output
from .limits import Limits
from .result import Outcome

_POLL_S = 0.02
_JUDGE_LIMITS = Limits(memory_mb=2048, max_processes=8)
_VERDICTS = ("passed", "wrong_answer", "runtime_error", "memory", "sandbox_error")


@dataclass(frozen=True)
class Options:
    """How outputs compare, and where programs run."""

    limits: Limits
    compare: str
    float_tolerance: float | None
    site_packages: bool


@lru_cache(maxsize=8)
def choose(sandbox: str, site_packages: bool = False) -> backends.Local:
    """The local sandbox that `sandbox` means here. It is started once, to be sure: SandboxUnavailable if not."""
    reasons = []
    for kind in backends.candidates(sandbox):
        try:
            box = Box(kind, Limits(), site_packages=site_packages)
            box.ready()
            box.close()
            return kind
        except backends.SandboxUnavailable as error:
            reasons.append(f"{kind}: {error}")
    raise backends.SandboxUnavailable(f"no sandbox works here ({'; '.join(reasons)}). {backends.ADVICE}")


class Runner:
    """One program's run. Sandboxes are started when needed and replaced when a test spoils one."""

    def __init__(self, kind: backends.Local, program: str, options: Options) -> None:
        self._kind = kind
        self._program = program.encode("utf-8", "surrogatepass")
        self._options = options
        self._deadline = time.monotonic() + options.limits.total_timeout_s
        self._boxes: dict[str, Box] = {}

    def run(self, tests: Sequence[Test]) -> list[Outcome]:
        try:
            return [self._run(test) for test in tests]
        finally:
            for role in list(self._boxes):
                self._discard(role)

    def _run(self, test: Test) -> Outcome:
        if time.monotonic() >= self._deadline:
            return Outcome("timeout", "not reached within total_timeout_s")
        try:
            roles = ["program", "judge"] if isinstance(test, AssertTest) else ["program"]
            self._start(roles)
        except backends.SandboxUnavailable as error:
            return Outcome("sandbox_error", str(error))
        try:
            return self._stdio(test) if isinstance(test, StdioTest) else self._assert(test)
        except BoxLost:
            for role in roles:
                self._discard(role)
            # It did start, so this is the program's doing.
            return Outcome("runtime_error", "the program brought its sandbox down")
        except OSError as error:
            # No program has a hand in the calls that raise this: they are ours, for pipes and files.
            for role in roles:
                self._discard(role)
            return Outcome("sandbox_error", f"this machine ran out of something: {error}")

    def _start(self, roles: Sequence[str]) -> None:
        missing = [role for role in roles if role not in self._boxes]
        for role in missing:
            limits = self._options.limits if role == "program" else _JUDGE_LIMITS
            self._boxes[role] = Box(self._kind, limits, site_packages=self._options.site_packages)
        for role in missing:
            try:
                self._boxes[role].ready()
            except backends.SandboxUnavailable:
                for started in missing:
                    self._discard(started)
                raise

    def _discard(self, role: str) -> None:
        box = self._boxes.pop(role, None)
        if box is not None:
            box.close()

    def _stdio(self, test: StdioTest) -> Outcome:
        box = self._boxes["program"]
        with _Descriptors() as fds:
            given = [fds.file(self._program), fds.file(test.input.encode("utf-8", "surrogatepass"))]
            streams, ends = _outputs(fds)
            box.run("stdio", [*given, *ends], self._options.limits.timeout_s)
            watch = _Watch(self._options.limits, box, streams, self._deadline)
            fds.close(*ends)
            stopped = watch.until_done(box)
        if stopped is not None:
            self._discard("program")
            return stopped
        self._renew("program", watch)
        status = watch.ended[box]["status"]
        error = watch.text("stderr")
        if status != 0:
            return _failed(status, error)
        options = self._options
        if same_output(watch.text("stdout"), test.output, options.compare, options.float_tolerance):
            return Outcome("passed")
        return Outcome("wrong_answer", f"printed {watch.text('stdout')[:200]!r}")

    def _assert(self, test: AssertTest) -> Outcome:
        program, judge = self._boxes["program"], self._boxes["judge"]
        with _Descriptors() as fds:
            streams, ends = _outputs(fds)
            to_program, to_judge, verdict = fds.pipe(), fds.pipe(), fds.pipe()
            null = fds.add(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            code = fds.file(self._program)
            seconds = self._options.limits.timeout_s
            program.run("guest", [code, null, *ends, to_program[0], to_judge[1]], seconds)
            code = fds.file(test.code.encode("utf-8", "surrogatepass"))
            judge.run("judge", [code, null, null, null, to_judge[0], to_program[1], verdict[1]], seconds)
            fds.close(*ends, *to_program, *to_judge, verdict[1])
            watch = _Watch(self._options.limits, program, {**streams, "verdict": verdict[0]}, self._deadline)
            watch.also(judge)
            stopped = watch.until_done(judge)
            if stopped is None:
                # With the judge gone the program's side of the connection is closed and it ends; or else.
                watch.grace(program)
        if stopped is not None:
            self._discard("program")
            self._discard("judge")
            return stopped
        self._renew("program", watch)
        self._renew("judge", watch)
        return _verdict(watch.text("verdict"))

    def _renew(self, role: str, watch: "_Watch") -> None:
        """Drop a sandbox in which the test left something behind; the next test gets a new one."""
        if not watch.ended.get(self._boxes[role], {}).get("clean"):
            self._discard(role)


def _outputs(fds: "_Descriptors") -> tuple[dict[str, int], list[int]]:
    """Pipes for the program's outputs: our ends by name, the program's ends."""
    out, err = fds.pipe(), fds.pipe()
    return {"stdout": out[0], "stderr": err[0]}, [out[1], err[1]]


def _failed(status: int, error: str) -> Outcome:
    lines = error.strip().splitlines()
    last = lines[-1][:300] if lines else ""
    if last.startswith("MemoryError"):
        return Outcome("memory", last)
    if status < 0:
        with contextlib.suppress(ValueError):
            last = f"killed by {signal.Signals(-status).name}"
        if -status == signal.SIGXCPU:
            return Outcome("timeout", last)
    return Outcome("runtime_error", last or f"exit status {status}")


def _verdict(text: str) -> Outcome:
    try:
        outcome, detail = json.loads(text)
    except ValueError:
        return Outcome("runtime_error", "the test ended without a verdict")
    assert outcome in _VERDICTS
    return Outcome(outcome, detail)


class _Watch:
    """Reads what a job writes, and its boxes' reports, until it is done or breaks a limit."""

    def __init__(self, limits: Limits, box: Box, streams: dict[str, int], deadline: float) -> None:
        self.ended: dict[Box, dict[str, Any]] = {}
        self._limits = limits
        self._box = box
        self._streams = {fd: name for name, fd in streams.items()}
        self._texts = {name: bytearray() for name in streams}
        self._room = limits.output_bytes
        self._deadline = min(time.monotonic() + limits.timeout_s, deadline)
        self._next_look = time.monotonic() + _POLL_S
        self._boxes = [box]

    def also(self, box: Box) -> None:
        self._boxes.append(box)

    def text(self, name: str) -> str:
        return self._texts[name].decode("utf-8", "replace")

    def until_done(self, box: Box) -> Outcome | None:
        """Wait for the end of the job in `box`. An outcome if a limit ended it first. Raises BoxLost."""
        while box not in self.ended:
            now = time.monotonic()
            if now >= self._deadline:
                return Outcome("timeout", f"{self._limits.timeout_s:g} s")
            stopped = self._step(min(_POLL_S, self._deadline - now))
            if stopped is not None:
                return stopped
        while self._streams:  # what is still in the pipes
            ready = readable(list(self._streams), 0)
            if not ready:
                break
            for fd in ready:
                if not self._read(fd):
                    return Outcome("output_limit", f"{self._limits.max_output_mb:g} MiB")
        return None

    def grace(self, box: Box) -> None:
        """Give the job in `box` a moment to end by itself."""
        deadline = time.monotonic() + 0.5
        with contextlib.suppress(BoxLost):
            while box not in self.ended and time.monotonic() < deadline:
                if self._step(_POLL_S) is not None:
                    return

    def _step(self, seconds: float) -> Outcome | None:
        boxes = [box for box in self._boxes if box not in self.ended]
        for item in readable([*self._streams, *boxes], seconds):
            if isinstance(item, Box):
                for message in item.messages():
                    self.ended[item] = message
            elif not self._read(item):
                return Outcome("output_limit", f"{self._limits.max_output_mb:g} MiB")
        # By the clock, not when nothing is to be read: a program that keeps writing is looked at, too.
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _POLL_S
        return self._over_limit()

    def _read(self, fd: int) -> bool:
        """False if the output is over its limit."""
        data = os.read(fd, 1 << 16)
        name = self._streams[fd]
        if not data:
            del self._streams[fd]
        self._texts[name] += data
        self._room -= len(data)
        return self._room >= 0

    def _over_limit(self) -> Outcome | None:
        used = self._box.usage()
        if used.resident_bytes > self._limits.memory_mb << 20:
            return Outcome("memory", f"{used.resident_bytes >> 20} MiB in {used.processes} processes")
        if used.processes > self._limits.max_processes + 1:
            return Outcome("runtime_error", f"{used.processes} processes")
        return None


class _Descriptors:
    """Descriptors that are closed in the end, whatever happens."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> "_Descriptors":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(*self._open)

    def add(self, fd: int) -> int:
        self._open.add(fd)
        return fd

    def file(self, content: bytes) -> int:
        return self.add(new_file(content))

    def pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        return self.add(read), self.add(write)

    def close(self, *fds: int) -> None:
        for fd in list(fds):
            self._open.discard(fd)
            os.close(fd)
