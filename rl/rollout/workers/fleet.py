"""The workers, as the trainer's first process sees them: started, watched, given weights, replaced when lost."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from torch import Tensor

from rl.rollout.probe import check_probe
from rl.rollout.workers.client import Refusal, Stranger, Unreachable, WorkerClient
from rl.rollout.workers.launch import StartFailed, WorkerProcess
from rl.rollout.workers.transfer import Spool, Transmission
from rl.rollout.workers.wire import Transport

ASK_S = 1.0  # between two looks at a worker of others that is not there yet
NEWS_S = 60.0  # between two lines on who is waited for


@dataclass(frozen=True)
class Probe:
    """A sequence, and how far a worker's log-probabilities of it may be from the trainer's (mean, nats per token)."""

    tokens: list[int]
    tolerance: float


@dataclass
class Worker:
    """`process` is None for one that somebody else started."""

    client: WorkerClient
    process: WorkerProcess | None = None
    up: bool = False
    reason: str = "not asked yet"  # why it is not up
    restarts: int = 0  # since it last took an update
    given_up: bool = False
    scores: list[float] = field(default_factory=list)  # of the probe, under the weights that it took last


@dataclass
class Sync:
    """What an update took, for the metrics."""

    seconds: float = 0.0
    bytes: int = 0
    workers: int = 0  # that acknowledged it
    probe: float | None = None  # the largest mean difference of a worker, nats per token

    def metrics(self) -> dict[str, float]:
        gap = {} if self.probe is None else {"sync/probe": self.probe}
        return {"sync/seconds": self.seconds, "sync/bytes": float(self.bytes), "sync/workers": self.workers, **gap}


@dataclass
class FleetSettings:
    """transport: of updates to all; a worker that comes back gets its weights by file or http."""

    transport: Transport
    start_timeout_s: float = 600.0
    max_restarts: int = 10
    collective_host: str = "127.0.0.1"
    collective_backend: str = "gloo"
    say: Callable[[str], None] = field(default=warnings.warn)


class Fleet:
    """Once there are weights, a thread for each worker watches it. One that does not answer within the deadline is
    killed and started again if it is ours, waited for if it is not, and brought to the current weights before it counts
    as up. `error` is what no restart can mend."""

    def __init__(self, workers: Sequence[Worker], spool: Spool, probe: Probe, settings: FleetSettings):
        self.workers, self.spool, self.probe, self.settings = list(workers), spool, probe, settings
        self.version: int | None = None
        self.in_flight = False  # whether weights enter running requests
        self.error: str | None = None
        self.restarts = 0
        self._expected: list[float] | None = None  # the trainer's log-probabilities of the probe
        self._lock = threading.RLock()  # weights are sent by one thread at a time
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._keepers: list[threading.Thread] = []

    # ---- weights --------------------------------------------------------------------------------------

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> Sync:
        """Sends weights to every worker that is up. The others get them before they are up again.

        in_flight: without waiting for what they are sampling.
        RuntimeError: a worker refused them, or there is no worker and never will be.
        """
        start = time.perf_counter()
        with self._lock:
            self.version, self.in_flight, self._expected = version, in_flight, None
            up = [w.client for w in self.workers if w.up]
            sending = self._transmission(up, self.settings.transport)
            for bucket in self.spool.write(named_tensors):
                sending.send(bucket)
            acknowledged = self._finish(sending)
            for worker in self.workers:
                if worker.client in acknowledged:
                    worker.restarts = 0
                elif worker.client.url in sending.lost:
                    worker.up, worker.reason = False, sending.lost[worker.client.url]
                    self.settings.say(f"rollout worker {worker.client.url}: {worker.reason}")
        if self.error:
            raise RuntimeError(self.error)
        return Sync(time.perf_counter() - start, sending.bytes, len(acknowledged))

    def check(self, expected: list[float]) -> float | None:
        """Compares the probe of every worker that is up with the trainer's; the largest difference, if there is one."""
        with self._lock:
            self._expected = expected
            return max((self._gap(worker) for worker in self.workers if worker.up), default=None)

    def _gap(self, worker: Worker) -> float:
        assert self._expected is not None and self.version is not None
        return check_probe(self._expected, worker.scores, self.probe.tolerance, self.version)

    def _finish(self, sending: Transmission) -> list[WorkerClient]:
        """The workers that took the weights, and scored the probe with them before they went on."""
        acknowledged = sending.finish(in_flight=self.in_flight, probe=[self.probe.tokens])
        for worker in self.workers:
            if worker.client in acknowledged:
                (worker.scores,) = sending.scores[worker.client.url]
        return acknowledged

    def _transmission(self, clients: list[WorkerClient], transport: Transport) -> Transmission:
        assert self.version is not None
        host, backend = self.settings.collective_host, self.settings.collective_backend
        return Transmission(clients, self.version, transport, host=host, backend=backend)

    # ---- start and end --------------------------------------------------------------------------------

    def start(self) -> None:
        """Waits until every worker answers. RuntimeError as soon as one will not, or not in time: it names all that
        have not answered."""
        for worker in self.workers:
            if worker.process is not None:
                worker.process.start()
        with ThreadPoolExecutor(len(self.workers)) as threads:
            try:
                self._until_all_answer({threads.submit(self._first_answer, w): w for w in self.workers})
            except BaseException:  # of an interrupt, too: while one of the threads waits, this block does not end
                self.close()
                raise

    def watch(self) -> None:
        """Begins to, unless it has; to be called after the first weights."""
        if self._keepers:
            return
        self._keepers = [
            threading.Thread(target=self._keep, args=(w,), name=f"keeper of {w.client.url}", daemon=True)
            for w in self.workers
        ]
        for keeper in self._keepers:
            keeper.start()

    def close(self) -> None:
        """Ends the workers that we started; leaves the others to their owner."""
        with self._starting:  # no keeper starts one after this
            self._stop.set()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.close()
        for keeper in self._keepers:
            keeper.join(timeout=5)
        self.spool.close()

    def _until_all_answer(self, answers: dict[Future[None], Worker]) -> None:
        """Says now and then who is waited for."""
        missing = set(answers)
        while missing:
            done, missing = wait(answers, timeout=NEWS_S, return_when=FIRST_EXCEPTION)
            failed = []
            for worker, error in [(answers[future], future.exception()) for future in done]:
                worker.up = error is None
                if isinstance(error, StartFailed | Unreachable | Refusal):
                    failed.append(f"{worker.client.url}: {error}")
                elif error is not None:
                    raise error
            waited_for = sorted(f"{answers[future].client.url}: {answers[future].reason}" for future in missing)
            if failed:
                raise RuntimeError("rollout workers did not start: " + "; ".join([*sorted(failed), *waited_for]))
            if waited_for:
                self.settings.say("waiting for rollout workers: " + "; ".join(waited_for))

    def _first_answer(self, worker: Worker) -> None:
        """One of somebody else's may still be starting, as a job of its own does beside the trainer's."""
        if worker.process is not None:
            worker.reason = "its process is starting"
            worker.process.wait(self.settings.start_timeout_s)
            return self._meet(worker)
        timeout_s = self.settings.start_timeout_s
        end = time.monotonic() + timeout_s
        while True:
            try:
                return self._meet(worker)
            except Stranger:
                raise
            except Unreachable as error:
                worker.reason = str(error)
                if time.monotonic() > end or self._stop.wait(ASK_S):
                    raise Unreachable(f"not there after {timeout_s:g} s: {error}") from None

    def _meet(self, worker: Worker) -> None:
        worker.client.health()
        if worker.process is None:
            worker.client.abort(None)  # of a trainer that is no more; also shows whether the secret is right

    # ---- watching -------------------------------------------------------------------------------------

    def _keep(self, worker: Worker) -> None:
        """The life of one worker's keeper."""
        interval_s = min(5.0, worker.client.deadline_s / 4)
        while not self._stop.wait(interval_s) and not worker.given_up:
            try:
                self._look_after(worker)
            except Exception as error:  # whatever it is, the trainer must hear of it
                worker.up, self.error = False, f"rollout worker {worker.client.url}: {type(error).__name__}: {error}"

    def _look_after(self, worker: Worker) -> None:
        try:
            if worker.process is not None and worker.process.ended:
                raise Unreachable(worker.process.ended)
            health = worker.client.health()
            if not worker.up or health.version != self.version or health.fault:
                self._bring_up_to_date(worker)
        except (Unreachable, Refusal) as error:
            if not self._stop.is_set():
                self._lost(worker, str(error))

    def _lost(self, worker: Worker, reason: str) -> None:
        if worker.up or worker.process is not None:
            self.settings.say(f"rollout worker {worker.client.url} is lost: {reason}")
        worker.up, worker.reason = False, reason
        if worker.process is None:
            return  # its owner may bring it back
        if worker.restarts >= self.settings.max_restarts:
            worker.given_up = True
            worker.reason = f"given up after {worker.restarts} restarts, at last because {reason}"
            if all(w.given_up for w in self.workers):
                self.error = f"no rollout worker is left; {worker.client.url}: {worker.reason}; {worker.process.tail()}"
            return
        worker.restarts += 1
        self.restarts += 1
        with self._starting:
            if self._stop.is_set():
                return
            worker.process.kill()
            worker.process.start()
        try:
            worker.process.wait(self.settings.start_timeout_s)
            self._bring_up_to_date(worker)
        except (StartFailed, Unreachable, Refusal) as error:
            worker.reason = str(error)  # and the next look starts it again

    def _bring_up_to_date(self, worker: Worker) -> None:
        """Sends everything that is in the spool to one worker, checks it, and lets it take prompts."""
        with self._lock:
            health = worker.client.health()  # an update may have come while we waited for the lock
            if self._stop.is_set() or (worker.up and health.version == self.version and not health.fault):
                return
            sending = self._transmission([worker.client], "files" if self.settings.transport == "files" else "http")
            for bucket in self.spool.buckets:
                sending.send(bucket)
            if not self._finish(sending):
                raise Unreachable(sending.lost[worker.client.url])
            if self._expected is not None:
                self._gap(worker)
            worker.up, worker.reason = True, ""
            self.settings.say(f"rollout worker {worker.client.url} has version {self.version}")
