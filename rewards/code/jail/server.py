"""The first process of a sandbox: starts one child per test, and leaves nothing of it behind.

It never sees a program, a test or an input: these lie in files and pipes whose descriptors it hands to the child.
A child is a fork of this process, an interpreter that has run nothing yet; so a test starts in milliseconds.
"""

import array
import json
import os
import resource
import select
import shutil
import signal
import socket
from dataclasses import dataclass
from typing import Any, NoReturn

_MAX_FDS = 8
_KEPT_CPU_S = 1  # beyond the wall-clock limit, which is the parent's: for the day the parent stops looking


@dataclass(frozen=True)
class Job:
    """What a child is to run; `fds` are its descriptors in the order that `kind` defines."""

    kind: str
    fds: list[int]
    cpu_s: int


class Server:
    """Takes jobs from the control socket and reports how each child ended."""

    def __init__(self, control: socket.socket, scratch: str, limits: dict[str, int], *, owns_scratch: bool) -> None:
        self.control = control
        self.scratch = scratch
        self.limits = limits
        self.owns_scratch = owns_scratch
        self.alone = os.getpid() == 1  # then every other process in sight belongs to the test

    def next_job(self) -> Job:
        """Returns in the child only. This process serves until the parent hangs up, then exits."""
        while True:
            message, fds = self._receive()
            child = os.fork()
            if child == 0:
                os.setsid()
                self.control.close()
                return Job(message["kind"], fds, message["cpu_s"])
            for fd in fds:
                os.close(fd)
            status = self._wait(child)
            self._send({"status": os.waitstatus_to_exitcode(status), "clean": self._sweep(child)})

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        room = socket.CMSG_SPACE(_MAX_FDS * 4)
        try:
            data, ancillary, _, _ = self.control.recvmsg(4096, room)
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._leave()
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        return json.loads(data), list(fds)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._leave()

    def _leave(self) -> NoReturn:
        """The parent hung up, perhaps because it was killed: then nobody else removes a scratch folder on the host."""
        if self.owns_scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
        os._exit(0)

    def _wait(self, child: int) -> int:
        """The child's wait status. The parent says nothing meanwhile; if it hangs up, all ends here."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        pidfd = os.pidfd_open(child) if hasattr(os, "pidfd_open") else None
        if pidfd is not None:
            poll.register(pidfd, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll(None if pidfd is not None else 5))
                if self.control.fileno() in ready:
                    self._kill(child)
                    self._leave()
                if pidfd is None or pidfd in ready:
                    ended, status = os.waitpid(child, 0 if pidfd is not None else os.WNOHANG)
                    if ended:
                        return status
        finally:
            if pidfd is not None:
                os.close(pidfd)

    def _kill(self, child: int) -> None:
        """Kill the test: everything else in this pid namespace, or, without one, the child's process group."""
        try:
            if self.alone:
                os.kill(-1, signal.SIGKILL)
            else:
                os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def _sweep(self, child: int) -> bool:
        """End what the test left running. True if the next test finds everything as new."""
        self._kill(child)
        while self.alone:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
            self._kill(child)
        try:
            return os.listdir(self.scratch) == []
        except OSError:
            return False

    def apply_limits(self, cpu_s: int) -> None:
        """In the child: limits that it and its children cannot raise again."""
        cpu = cpu_s + _KEPT_CPU_S
        wanted = {
            "RLIMIT_CPU": cpu,
            "RLIMIT_AS": self.limits["memory_mb"] << 20,
            "RLIMIT_FSIZE": self.limits["max_file_mb"] << 20,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            # One more for the first process. Without a sandbox this would count all of the user's processes.
            **({"RLIMIT_NPROC": self.limits["max_processes"] + 1} if self.alone else {}),
        }
        for name, value in wanted.items():
            number = getattr(resource, name, None)
            if number is None:
                continue
            hard = resource.getrlimit(number)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            try:
                resource.setrlimit(number, (value, value))
            except (ValueError, OSError):
                if self.alone:
                    raise
                # macOS refuses RLIMIT_AS; only `sandbox: none` gets here
