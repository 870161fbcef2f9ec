"""`WorkerSampler`: the `Sampler` protocol over worker processes.

Every process of the trainer deals its own prompts to the workers, which all share; the first one alone starts them,
watches them and sends weights (`Fleet`). No prompt is lost and none counts twice, whatever becomes of a worker.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rl.policy.export import exhaust
from rl.rollout.types import Sample, SamplingParams, streams_of
from rl.rollout.workers.client import Refusal, Unreachable, WorkerClient
from rl.rollout.workers.dispatch import Dispatch
from rl.rollout.workers.fleet import Fleet, Sync
from rl.rollout.workers.wire import AS_LOADED, Request, Settings, settings_of

RETRY_S = 0.25  # between two looks at a worker that is not ready


class WorkerSampler:
    """Several threads may sample at the same time, each with its own call of `generate` or `stream`.

    clients: of all workers. fleet: on the first process, None on the others.
    probe: the trainer's log-probabilities of the fleet's probe under its current weights; called on every process.
        None: no trainer sends weights, and the workers sample with those that they loaded (a `FrozenFleet`).
    share: calls `gather(value)` over the trainer's processes; the values by rank.
    in_flight: samples that a worker is asked for at a time, by this process.
    wait_s: how long to go on without any worker.
    takes_weights_midway: whether `update_weights` may be called, by another thread, while samples are drawn. A worker
        then draws with the weights that this process knew of when it asked, or with newer ones.
    """

    def __init__(
        self,
        clients: Sequence[WorkerClient],
        fleet: Fleet | None,
        *,
        probe: Callable[[], list[float]] | None,
        share: Callable[[Any], list[Any]] = lambda value: [value],
        in_flight: int = 256,
        wait_s: float = 600.0,
        takes_weights_midway: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.clients, self.fleet = list(clients), fleet
        self.version = AS_LOADED  # nothing has been sent yet
        self.coming: int | None = None  # a version that some workers may have already
        self.takes_weights_midway = takes_weights_midway
        self.progress = progress  # called with (completions done, completions asked for)
        self.sync = Sync()
        # What a lost worker need not go on with, should it come back: keys of calls that have ended, by its URL.
        self.stale: dict[str, list[str]] = {}
        self.moved = 0  # prompts that were taken from lost workers, over all calls
        self.probe, self.share, self.in_flight, self.wait_s = probe, share, in_flight, wait_s

    # ---- weights --------------------------------------------------------------------------------------

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Called on every process, with the same stream of weights: gathering them may need all. RuntimeError on all of
        them if a worker refuses the weights, or the probe shows that it does not use them."""
        if self.probe is None:
            raise RuntimeError("these workers keep the weights that they loaded")
        self.coming = version if self.takes_weights_midway else None
        try:
            self._update(named_tensors, version, self.probe)
            self.version = version
        finally:
            self.coming = None

    def _update(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int, probe: Callable[[], list[float]]
    ) -> None:
        error: Exception | None = None
        if self.fleet is not None:
            try:
                self.sync = self.fleet.update(named_tensors, version, in_flight=self.takes_weights_midway)
            except Exception as reason:  # the other processes wait for news below
                error = reason
        exhaust(named_tensors)  # what is left of the stream: its other half runs on the other processes
        expected = probe()
        if self.fleet is not None and error is None:
            try:
                self.sync.probe = self.fleet.check(expected)
                self.fleet.watch()
            except Exception as reason:
                error = reason
        told = self.share(None if error is None else f"{type(error).__name__}: {error}")[0]
        if error is not None:
            raise error
        if told:
            raise RuntimeError(f"the first process could not update the rollout workers: {told}")

    def accepts(self, version: int) -> bool:
        """Whether a worker with these weights may be asked for samples. Others that are newer may be another run's."""
        return version in (self.version, self.coming)

    def close(self) -> None:
        if self.fleet is not None:
            self.fleet.close()

    # ---- sampling -------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        found = dict(group for groups in self.stream(prompts, params, streams=streams) for group in groups)
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
    ) -> Generator[list[tuple[int, list[Sample]]], None, None]:
        """`generate` bit by bit: (place of a prompt, its samples) as they arrive, and now and then nothing."""
        numbers = streams_of(prompts, streams)
        if self.version == AS_LOADED and self.probe is not None:
            raise RuntimeError("the rollout workers have no weights yet: call update_weights first")
        call = secrets.token_hex(8)  # so that no other call, process or run has the same keys
        requests = [
            Request(key=f"{call}-{i}", prompt=list(prompt), stream=stream)
            for i, (prompt, stream) in enumerate(zip(prompts, numbers, strict=True))
        ]
        settings = settings_of(params if params.seed is not None else replace(params, seed=secrets.randbits(63)))
        rollout = _Rollout(self, requests, settings)
        places = {request.key: i for i, request in enumerate(requests)}
        try:
            for keys in rollout.run():
                yield [(places[key], rollout.dispatch.done[key]) for key in keys]
        finally:
            rollout.leave()
            self.moved += rollout.dispatch.moved


class _Rollout:
    """One call of `generate`: a thread for each worker, and one `Dispatch` between them."""

    def __init__(self, sampler: WorkerSampler, requests: Sequence[Request], settings: Settings):
        self.sampler, self.settings = sampler, settings
        self.requests = {request.key: request for request in requests}
        self.dispatch = Dispatch(requests, sampler.in_flight // settings.n)
        self.ready: set[str] = set()
        self.reasons: dict[str, str] = {}  # why a worker is not ready
        self.stale: dict[str, list[str]] = {}  # as the sampler's, of this call
        self.error: Exception | None = None
        self.left = False
        self.changed = threading.Condition()
        self.alone_since = time.monotonic()  # no worker has been ready since then

    def run(self) -> Generator[list[str], None, None]:
        """The keys of requests as they are finished, each once."""
        threads = [
            threading.Thread(target=self._work, args=(client,), name=f"rollout at {client.url}", daemon=True)
            for client in self.sampler.clients
        ]
        self._in_parallel(self._look)  # so that the first deal is among all that are there
        for thread in threads:
            thread.start()
        given: set[str] = set()
        while len(given) < self.dispatch.total:
            with self.changed:
                if self.error is None and len(self.dispatch.done) == len(given):
                    self._check_hope()
                    self.changed.wait(RETRY_S)
                fresh = [key for key in self.dispatch.done if key not in given]
                if self.error is not None and not fresh:  # what has arrived is given out first
                    raise self.error
            given.update(fresh)
            if self.sampler.progress:
                n = self.settings.n
                self.sampler.progress(len(given) * n, self.dispatch.total * n)
            yield fresh

    def leave(self) -> None:
        """Nobody waits for the rest."""
        with self.changed:
            self.left = True
            for url, keys in self.stale.items():
                self.sampler.stale.setdefault(url, []).extend(keys)
            self.changed.notify_all()

    def _in_parallel(self, look: Callable[[WorkerClient], None]) -> None:
        threads = [threading.Thread(target=look, args=(c,), daemon=True) for c in self.sampler.clients]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 5.0  # a worker that needs longer joins later
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    # ---- one worker -----------------------------------------------------------------------------------

    def _work(self, client: WorkerClient) -> None:
        """Until all is done: asks for what this worker was dealt, and takes what it has finished."""
        try:
            forget: list[str] = []
            while not self._over():
                if client.url not in self.ready:
                    self._look(client)
                    if client.url not in self.ready:
                        time.sleep(RETRY_S)
                        continue
                try:
                    forget = self._exchange(client, forget)
                except (Unreachable, Refusal) as error:
                    self._lose(client, str(error))
            self._tidy(client, forget)
        except Exception as error:
            self._fail(error)

    def _look(self, client: WorkerClient) -> None:
        """Whether the worker can take prompts: it answers, and has the weights that we want."""
        try:
            health = client.health()
            with self.changed:  # of other calls only what has ended: they may have asked this worker anew
                stale = self.stale.pop(client.url, []) + self.sampler.stale.pop(client.url, [])
            if stale:
                client.abort(stale)
        except (Unreachable, Refusal) as error:
            reason: str | None = str(error)
        else:
            reason = health.fault
            if reason is None and not self.sampler.accepts(health.version):
                reason = f"it has version {health.version}, not {self.sampler.version}"
        with self.changed:
            if reason is None:
                self.ready.add(client.url)
            else:
                self.reasons[client.url] = reason

    def _exchange(self, client: WorkerClient, forget: list[str]) -> list[str]:
        """Sends new requests, fetches results; returns the keys that have arrived."""
        url = client.url
        with self.changed:
            self.dispatch.deal(self.ready)
            unsent = self.dispatch.unsent(url)
            self.dispatch.was_sent(url, unsent)  # before they are: a request that may have arrived counts as sent
        if unsent:
            client.generate(unsent, self.settings, self.sampler.version, self.sampler.takes_weights_midway)
        sent = self.dispatch.sent(url)
        if not sent:
            with self.changed:
                self.changed.wait(RETRY_S)
            return forget
        samples, errors = client.results(sent, forget, min(1.0, client.deadline_s / 4))
        if errors:
            key, reason = next(iter(errors.items()))
            length = len(self.requests[key].prompt)
            raise ValueError(f"worker {url} refused a prompt of {length} tokens: {reason}")
        with self.changed:
            for key, row in samples.items():
                self.dispatch.finish(url, key, row)
            self.changed.notify_all()
        return list(samples)

    def _lose(self, client: WorkerClient, reason: str) -> None:
        """Its unfinished prompts go to the others."""
        with self.changed:
            self.ready.discard(client.url)
            self.reasons[client.url] = reason
            if not self.ready:
                self.alone_since = time.monotonic()
            stale = self.sampler.stale if self.left else self.stale
            stale.setdefault(client.url, []).extend(self.dispatch.give_back(client.url))
            self.changed.notify_all()

    def _tidy(self, client: WorkerClient, forget: Sequence[str]) -> None:
        """The worker need not keep what has arrived; if it cannot be told, its bound on what is held will do."""
        try:
            if client.url in self.ready:
                client.abort([*forget, *self.dispatch.sent(client.url)])
        except (Unreachable, Refusal):
            pass

    # ---- all together ---------------------------------------------------------------------------------

    def _over(self) -> bool:
        return self.left or self.error is not None or self.dispatch.complete

    def _fail(self, error: Exception) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _check_hope(self) -> None:
        """Sets `error` when no worker can be hoped for, or one of them does not have our weights."""
        fleet = self.sampler.fleet
        if fleet is not None and fleet.error:
            self.error = RuntimeError(fleet.error)
        alone_s = 0.0 if self.ready else time.monotonic() - self.alone_since
        if self.error is None and alone_s > self.sampler.wait_s:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in sorted(self.reasons.items()))
            left = self.dispatch.total - len(self.dispatch.done)
            self.error = RuntimeError(
                f"no rollout worker for {alone_s:.0f} s, with {left} of {self.dispatch.total} prompts to do ({reasons})"
            )
