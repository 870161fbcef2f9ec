"""One warm interpreter per process of ours, from which sandboxes are forked.

Starting Python and importing what a sandbox needs takes longer than all the rest. The launcher has done that once;
it runs no program and no test itself, and it ends when its socket closes, so with this process.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

_ANSWER_S, _END_S = 60.0, 5.0


class Launcher:
    """Started on first use. Safe to use from any thread."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """command: gets the number of its socket as last argument."""
        self._command, self._environment = list(command), environment
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget)

    def fork(self, config: dict[str, Any], control: int) -> None:
        """A new process, configured by `config`, that owns a copy of `control`. Raises OSError."""
        order = json.dumps(config).encode()
        with self._lock:
            try:
                self._ask(order, control)
            except OSError:  # somebody killed it, or it never started
                self._end()
                self._ask(order, control)

    def _ask(self, order: bytes, control: int) -> None:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        socket.send_fds(self._socket, [order], [control])
        if self._socket.recv(1) != b".":
            raise OSError("the launcher of sandboxes ended")

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                env=self._environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        ours.settimeout(_ANSWER_S)
        self._socket = ours

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self._socket = self._process = None

    def _forget(self) -> None:
        """In a forked child the launcher is still the parent's: the child will start its own."""
        self._lock = threading.Lock()
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
        self._socket = self._process = None
