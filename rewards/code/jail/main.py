"""Start of a sandbox: isolate, report, then run one job per child.

A configuration is a dict with
    control: number of the descriptor that leads to the parent
    mode: "namespaces" (build the sandbox), "inside" (bubblewrap has built it) or "none"
    readable: host paths to show read-only; scratch; limits; environment; packages: folders to add to sys.path
"""

import gc
import json
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from . import guest, judge, namespaces, seccomp, stdio
from .server import Server

_PREPARE = {"stdio": stdio.prepare, "guest": guest.prepare, "judge": judge.prepare}


def main() -> None:
    """argv[1]: a configuration, or the number of a socket on which configurations will come."""
    argument = json.loads(sys.argv[1])
    # The folder of this package, a place on the host that no program needs to know.
    del sys.path[0]
    config = argument if isinstance(argument, dict) else _fork_for_each(socket.socket(fileno=argument))
    _serve(config)


def _fork_for_each(requests: socket.socket) -> dict[str, Any]:
    """Returns in a child, once per configuration that comes in. Interpreters start slowly and fork fast."""
    gc.freeze()  # collections in the children then do not copy this process's memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, fds, _, _ = socket.recv_fds(requests, 1 << 16, 1)
        if not data:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            return {**json.loads(data), "control": fds[0]}
        for fd in fds:
            os.close(fd)
        requests.sendall(b".")


def _serve(config: dict[str, Any]) -> None:
    control = socket.socket(fileno=config["control"])
    try:
        _isolate(config, control)
        owns_scratch = config["mode"] == "none"
        server = Server(control, config["scratch"], config["limits"], owns_scratch=owns_scratch)
        control.sendall(b'{"ready": true}\n')
    except BaseException as error:
        control.sendall(json.dumps({"error": f"{error}"[:1000]}).encode() + b"\n")
        os._exit(1)
    job = server.next_job()
    # Only children get here.
    try:
        server.apply_limits(job.cpu_s)
        run = _PREPARE[job.kind](job.fds)
    except BaseException:
        os._exit(1)
    _forget(config["packages"])
    run()


def _isolate(config: dict[str, Any], control: socket.socket) -> None:
    os.environ.clear()
    os.environ.update(config["environment"])
    if config["mode"] == "namespaces":
        give_up_privileges = namespaces.enter()
        first = os.fork()
        if first:
            _wait_for(first, control)
        namespaces.build_root(config["readable"], config["limits"]["max_file_mb"])
        give_up_privileges()
    elif config["mode"] == "none":
        control.sendall(json.dumps({"first": os.getpid()}).encode() + b"\n")
    os.chdir(config["scratch"])
    if config["mode"] != "none":
        namespaces.guard_first_process()
        seccomp.install()
    # The first process of a pid namespace only gets signals that it handles, and it handles none.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_for(first: int, control: socket.socket) -> NoReturn:
    """The launcher itself has nothing to do but to tell who the first process is, and to end after it."""
    control.sendall(json.dumps({"first": first}).encode() + b"\n")
    control.close()
    os.waitpid(first, 0)
    os._exit(0)


def _forget(packages: list[str]) -> None:
    """The program starts in an interpreter that knows nothing of the harness."""
    sys.argv[:] = [""]
    sys.path += packages
    harness = __package__.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == harness]:
        del sys.modules[name]
