"""Worker processes for comparisons that can be slow, eat memory or crash: persistent, shared, killable.

One pool per process, started at the first use, callable from any thread and from within a running event loop
(it blocks, but needs neither signals nor a loop of its own). The parent keeps the deadline by polling the
worker's pipe; a worker that misses it is killed, reaped, and replaced when next needed.

A worker that runs out of memory or dies in mid-comparison counts as one that missed its deadline: it exceeded
a limit. Only a worker that cannot even start raises (WorkerStartError): a broken installation must not pass
for a run of wrong answers.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cpus import share_of_cpus
from .worker import READY

START_LIMIT_S = 120.0  # importing sympy takes a second; from a shared disk, by many ranks at once, far longer
STOP_LIMIT_S = 1.0
MAX_REMEMBERED = 20_000


class WorkerStartError(RuntimeError):
    """The worker program cannot run here, for example because sympy is missing."""


class _Died(Exception):
    """The worker closed its pipes."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """`equal` is None if a limit was exceeded."""

    equal: bool | None
    retire: bool


class _Worker:
    """One worker process. Used by one thread at a time; only `kill` may come from another."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        try:
            # A session of its own: Ctrl-C in the terminal is the parent's business.
            self._process = subprocess.Popen(
                command, env=environment, bufsize=0, close_fds=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise WorkerStartError(f"cannot start a worker for symbolic comparison: {error}") from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        os.set_blocking(self._stdin.fileno(), False)
        self._unread = b""
        self._start_deadline = time.monotonic() + START_LIMIT_S
        self.ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, deadline: float) -> bool:
        """False if the worker is still starting at the deadline: it may be ready for the next caller."""
        while not self.ready:
            try:
                line = self._read_line(min(deadline, self._start_deadline))
            except _Died:
                raise self._start_error() from None
            if line is None:
                if time.monotonic() >= self._start_deadline:
                    raise self._start_error()
                return False
            if line + b"\n" == READY:
                self.ready = True
                self._stderr.close()
        return True

    def ask(self, answer: str, gold: str, limit_s: float) -> _Reply:
        """After a reply with `retire`, which includes every failure, the worker must be killed."""
        deadline = time.monotonic() + limit_s
        request = json.dumps({"answer": answer, "gold": gold, "limit_s": limit_s}).encode() + b"\n"
        try:
            line = self._read_line(deadline) if self._write(request, deadline) else None
        except _Died:
            line = None
        return _Reply(None, True) if line is None else _Reply(**json.loads(line))

    def kill(self) -> None:
        self._process.kill()

    def remove(self, grace_s: float = 0.0) -> None:
        """End the process, reap it, close the pipes. With `grace_s` it may first end by itself."""
        self._stdin.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._stderr.close()

    def disown(self) -> None:
        """In a forked child: let go of the pipes. The process is the parent's, to be neither used nor awaited."""
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()
        self._process.returncode = 0

    def _read_line(self, deadline: float) -> bytes | None:
        while b"\n" not in self._unread:
            if not _wait(self._stdout.fileno(), select.POLLIN, deadline):
                return None
            data = os.read(self._stdout.fileno(), 65_536)
            if not data:
                raise _Died
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _write(self, data: bytes, deadline: float) -> bool:
        while data:
            if not _wait(self._stdin.fileno(), select.POLLOUT, deadline):
                return False
            try:
                data = data[os.write(self._stdin.fileno(), data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _Died from None
        return True

    def _start_error(self) -> WorkerStartError:
        late = self.alive() and time.monotonic() >= self._start_deadline
        self._process.kill()
        status = self._process.wait()
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        if late:
            reason = f"it is not ready after {START_LIMIT_S:.0f} s"
        else:
            reason = said[-1] if said else f"it ended with status {status}"
        return WorkerStartError(f"the worker for symbolic comparison does not start: {reason}")


def _wait(descriptor: int, event: int, deadline: float) -> bool:
    """poll and not select, which fails on descriptors above 1,023."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


class Pool:
    """At most `size` workers, started when needed. Callers are served in the order in which they come.

    command: the worker program; default `python -m rewards.math.worker`.
    size: default: cores of this process divided by the processes of this machine (LOCAL_WORLD_SIZE).
    """

    def __init__(self, command: Sequence[str] | None = None, size: int | None = None):
        self._command = list(command or (sys.executable, "-P", "-m", f"{__package__}.worker"))
        self.size = share_of_cpus() if size is None else size
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._remembered: OrderedDict[tuple[str, str], bool] = OrderedDict()

    def compare(self, answer: str, gold: str, *, limit_s: float, deadline: float = float("inf")) -> bool | None:
        """Are two answers equal? None if the comparison exceeded a limit.

        limit_s: how long a worker may compute. deadline: of the whole call, with queueing and start-up, on
        the clock of time.monotonic().
        """
        with self._changed:
            if (answer, gold) in self._remembered:
                self._remembered.move_to_end((answer, gold))
                return self._remembered[answer, gold]
        worker = self._acquire(deadline)
        if worker is None:
            return None
        keep = False
        try:
            if not worker.wait_ready(deadline) or time.monotonic() >= deadline:
                keep = True
                return None
            reply = worker.ask(answer, gold, min(limit_s, deadline - time.monotonic()))
            keep = not reply.retire
        finally:
            self._release(worker, keep)
        if reply.equal is not None:
            self._remember(answer, gold, reply.equal)
        return reply.equal

    def close(self) -> None:
        """Stop all workers; comparisons under way exceed their limit. A later call starts new workers."""
        with self._changed:
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.remove(STOP_LIMIT_S if worker.ready else 0.0)

    def disown(self) -> None:
        """In a forked child: forget the parent's workers, and locks that threads of the parent may hold."""
        workers = [*self._idle, *self._busy]
        self._reset()
        for worker in workers:
            worker.disown()

    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        with self._changed:
            return [worker.pid for worker in (*self._idle, *self._busy)]

    def _acquire(self, deadline: float) -> _Worker | None:
        place = object()
        with self._changed:
            self._queue.append(place)
            try:
                while self._queue[0] is not place or not (self._idle or len(self._busy) < self.size):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return None
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                worker = self._take_or_start()
                self._busy.add(worker)
                return worker
            finally:
                self._queue.remove(place)
                self._changed.notify_all()

    def _take_or_start(self) -> _Worker:
        """The worker that was idle last; one that died meanwhile (but for a failed start) is replaced."""
        while self._idle:
            ready = [worker for worker in self._idle if worker.ready]
            worker = ready[-1] if ready else self._idle[-1]
            self._idle.remove(worker)
            if worker.alive() or not worker.ready:
                return worker
            worker.remove()
        return _Worker(self._command, _environment())

    def _release(self, worker: _Worker, keep: bool) -> None:
        if not keep:
            worker.remove()
        with self._changed:
            self._busy.discard(worker)
            if keep:
                self._idle.append(worker)
            self._changed.notify_all()

    def _remember(self, answer: str, gold: str, equal: bool) -> None:
        """Training asks again and again about the same golds."""
        with self._changed:
            self._remembered[answer, gold] = equal
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)


def _environment() -> dict[str, str]:
    """For a worker that finds this very package, wherever it is run, and uses one thread.

    Together with `python -P`, which keeps the working folder off the path, a user's own `rewards` or `random`
    cannot take the place of ours; relative entries of PYTHONPATH are dropped, because they meant the folder in
    which this process was started. A fixed hash seed makes the order of sympy's terms, and so its way to a
    verdict, the same in every worker.
    """
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([root, *filter(os.path.isabs, inherited)])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}


_shared: Pool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> Pool:
    """The pool of this process. Its workers end with the process, however that ends."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Pool()
            atexit.register(_shared.close)
        return _shared


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    if _shared is not None:
        _shared.disown()


os.register_at_fork(after_in_child=_after_fork_in_child)
