"""Start of a sandbox: isolate, report, then run one job per child.

argv[1]: JSON with
    control: number of the inherited socket to the parent
    mode: "namespaces" (build the sandbox), "inside" (bubblewrap built it) or "none"
    readable: host paths to show read-only; scratch; limits; packages: folders to add to sys.path
"""

import json
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from . import guest, judge, seccomp, stdio
from .server import Server


def main() -> None:
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control"])
    try:
        _isolate(config, control)
        server = Server(control, config["scratch"], config["limits"])
        control.sendall(b'{"ready": true}\n')
    except BaseException as error:
        control.sendall(json.dumps({"error": f"{error}"[:1000]}).encode() + b"\n")
        os._exit(1)
    job = server.next_job()
    # Only children get here.
    try:
        server.apply_limits(job.cpu_s)
        run = {"stdio": stdio.prepare, "guest": guest.prepare, "judge": judge.prepare}[job.kind](job.fds)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    _forget(config)
    run()


def _isolate(config: dict[str, Any], control: socket.socket) -> None:
    if config["mode"] == "namespaces":
        from . import namespaces

        give_up_privileges = namespaces.enter()
        first = os.fork()
        if first:
            _wait_for(first, control)
        namespaces.build_root(config["readable"], config["limits"]["max_file_mb"])
        give_up_privileges()
        namespaces.guard_first_process()
    elif config["mode"] == "inside":
        from . import namespaces

        os.chdir(config["scratch"])
        namespaces.guard_first_process()
    if config["mode"] != "none":
        seccomp.install()
    # The first process of a pid namespace only gets signals that it handles, and it handles none.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_for(first: int, control: socket.socket) -> NoReturn:
    """The launcher itself has nothing to do but to tell who the first process is, and to end after it."""
    control.sendall(json.dumps({"first": first}).encode() + b"\n")
    control.close()
    os.waitpid(first, 0)
    os._exit(0)


def _forget(config: dict[str, Any]) -> None:
    """The program starts in an interpreter that knows nothing of the harness."""
    sys.argv[:] = [""]
    sys.path[:] = [path for path in sys.path if path != config["code"]] + config["packages"]
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__.partition(".")[0]]:
        del sys.modules[name]
