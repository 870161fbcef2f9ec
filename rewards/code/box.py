"""One sandbox, seen from outside: its start, its jobs, its end."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from . import backends, usage
from .limits import Limits

_START_S = 30.0
_END_S = 5.0


class BoxLost(Exception):
    """The sandbox ended by itself."""


class Box:
    """A running sandbox. It takes one job at a time; every descriptor of a job is its caller's to close."""

    def __init__(self, kind: backends.Local, limits: Limits, *, site_packages: bool = False) -> None:
        """Starts it, without waiting for it: see `ready`."""
        self._first = 0  # pid of the sandbox's first process, once known
        self._buffer = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: str | None = None
        try:
            self._control, theirs = socket.socketpair()
        except OSError as error:
            raise backends.SandboxUnavailable(f"the sandbox did not start: {error}") from error
        try:
            self._scratch = tempfile.mkdtemp(prefix="r1forge-") if kind == "none" else None
            with theirs:
                self._process = backends.start(
                    kind, theirs.fileno(), limits, self._scratch or "", site_packages=site_packages
                )
        except OSError as error:
            self.close()
            raise backends.SandboxUnavailable(f"the sandbox did not start: {error}") from error
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        """Wait until the sandbox is complete. Raises SandboxUnavailable with the reason if it cannot be."""
        deadline = time.monotonic() + _START_S
        while True:
            if not readable([self], deadline - time.monotonic()):
                self.close()
                raise backends.SandboxUnavailable(f"the sandbox did not start within {_START_S:.0f} s")
            try:
                messages = self.messages()
            except BoxLost:
                reason = self._last_words()
                self.close()
                raise backends.SandboxUnavailable(reason) from None
            for message in messages:
                if "error" in message:
                    self.close()
                    raise backends.SandboxUnavailable(message["error"])
                if "ready" in message:
                    return

    def fileno(self) -> int:
        """For select: readable when `messages` has something to tell."""
        return self._control.fileno()

    def run(self, kind: str, fds: Sequence[int], cpu_s: float) -> None:
        """Start a job. Raises BoxLost."""
        order = json.dumps({"kind": kind, "cpu_s": int(cpu_s) + 1}).encode()
        try:
            socket.send_fds(self._control, [order], fds)
        except OSError:
            raise BoxLost from None

    def messages(self) -> list[dict[str, Any]]:
        """What the sandbox has to tell, perhaps nothing yet. Raises BoxLost."""
        try:
            data = self._control.recv(4096)
        except OSError:
            data = b""
        if not data:
            raise BoxLost
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            # From another process than all the rest, so it can come at any time, even after the first job began.
            self._first = message.get("first", self._first)
        return [message for message in messages if "first" not in message]

    def usage(self) -> usage.Usage:
        """What all its processes use now."""
        return usage.of_tree(self._root())

    def _root(self) -> int:
        """The first process: as it told, or bubblewrap, which stands before it."""
        return self._first or (self._process.pid if self._process else 0)

    def close(self) -> None:
        """End it and everything in it, now: its first process exits when this end of the socket closes."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        if not self._gone():
            # Stuck, so its pid is still its own.
            with contextlib.suppress(OSError):
                if self._root():
                    os.kill(self._root(), signal.SIGKILL)
        self._control.close()
        if self._process is not None:
            backends.reap(self._process, _END_S)
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _gone(self) -> bool:
        """Has the other end of the socket closed, within a few seconds?"""
        deadline = time.monotonic() + _END_S
        while readable([self._control], deadline - time.monotonic()):
            try:
                if not self._control.recv(4096):
                    return True
            except OSError:
                return True
        return False

    def _last_words(self) -> str:
        """What bubblewrap wrote before it gave up."""
        text = ""
        if self._process is not None and self._process.stderr is not None:
            if readable([self._process.stderr], _END_S):
                text = os.read(self._process.stderr.fileno(), 4000).decode("utf-8", "replace").strip()
        return text.splitlines()[-1] if text else "the sandbox ended before it began"


def readable(items: Sequence[Any], seconds: float) -> list[Any]:
    """Which of `items` (descriptors, or objects with a `fileno`) can be read, or have ended, within `seconds`."""
    # Not select(): it fails for descriptors from 1024 on, which a trainer can well have.
    poll, by_number = select.poll(), {}
    for item in items:
        number = item if isinstance(item, int) else item.fileno()
        by_number[number] = item
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(max(0.0, seconds) * 1000)]


def new_file(content: bytes) -> int:
    """A descriptor that reads `content` from its start; in memory where the system can."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("input")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(os.dup(fd), "wb") as writer:
        writer.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)
    finally:
        os.close(fd)
