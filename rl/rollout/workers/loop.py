"""The thread that owns a worker's engine, and what other threads may ask of it."""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rl.rollout.engine import Engine, RestartNeeded
from rl.rollout.types import Sample
from rl.rollout.workers.wire import AS_LOADED, Generate, Health

MOST_HELD = 100_000  # groups, running or not fetched yet
START_S = 600.0  # an engine that starts, or loads its weights, shows no sign of life, and may take so long
NAP_S = 0.2  # how long an idle thread waits before it shows itself again


class Conflict(Exception):
    """The request is well formed, but not what this worker can do now."""


@dataclass
class _Held:
    """A group, from the request until it is fetched."""

    samples: list[Sample] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.samples is not None or self.error is not None


@dataclass
class _Command:
    run: Callable[[], Any]
    result: Future[Any]
    when_idle: bool


class EngineLoop:
    """Every call of the engine happens on one thread, in the order in which it was asked for.

    remake: starts another engine with new weights (as `update_weights` gets them), for one that says RestartNeeded.

    A command that needs an idle engine waits for the requests before it and holds up those after it, but loses none.
    If the engine itself fails the thread ends, `fault` says why, and the process is of no more use.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        remake: Callable[[Iterable[tuple[str, Tensor]], int], Engine] | None = None,
    ):
        self.engine, self.name, self.remake = engine, name, remake
        self.engine.version = AS_LOADED  # until a trainer has sent its weights
        self.instance = secrets.token_hex(8)
        self.fault: str | None = None  # of the engine: the thread has ended
        self.broken: str | None = None  # of the weights: nothing is sampled until a whole update went through
        self.steps = 0
        self._beat = time.monotonic()
        self._held: dict[str, _Held] = {}
        self._commands: deque[_Command] = deque()
        self._aborts: set[str] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # ---- for other threads ----------------------------------------------------------------------------

    def health(self) -> Health:
        with self._changed:
            return Health(
                engine=self.name,
                instance=self.instance,
                version=self.engine.version,
                busy=sum(not held.finished for held in self._held.values()),
                steps=self.steps,
                heartbeat_s=time.monotonic() - self._beat,
                alive=self.alive,
                fault=self.fault or self.broken,
            )

    def generate(self, message: Generate) -> int:
        """Takes requests on; returns how many were new. Those that the engine refuses come back with the results."""
        with self._changed:
            self._healthy()
            if not message.may_use(self.engine.version):
                raise Conflict(f"version {message.version} was asked for, this worker has {self.engine.version}")
            new = [r for r in {r.key: r for r in message.requests}.values() if r.key not in self._held]
            if len(self._held) + len(new) > MOST_HELD:
                raise Conflict(f"{len(self._held)} requests are held already: fetch or abort some")
            mine = {request.key: _Held() for request in new}
            self._held |= mine
            params = message.params.params()

            def submit() -> None:
                if not message.may_use(self.engine.version):  # an update came between
                    return self._drop(mine)
                for request in new:
                    if self._held.get(request.key) is not mine[request.key]:
                        continue  # forgotten meanwhile, and perhaps asked for again
                    try:
                        self.engine.submit(request.key, request.prompt, params, request.stream)
                    except ValueError as error:
                        self._finish(request.key, _Held(error=str(error)))
                    except Exception as error:  # nobody reads this command's result
                        traceback.print_exc()
                        self._finish(request.key, _Held(error=_short(error)))

            self._commands.append(_Command(submit, Future(), when_idle=False))
            self._changed.notify_all()
            return len(new)

    def results(
        self, keys: Sequence[str], wait_s: float, most_tokens: int
    ) -> tuple[dict[str, list[Sample]], dict[str, str]]:
        """(samples, errors) of finished groups among the keys, as many as make up a reply; waits until there is one.

        KeyError: a key that this worker does not know.
        """
        with self._changed:
            unknown = [key for key in keys if key not in self._held]
            if unknown:
                raise KeyError(unknown[0])
            self._changed.wait_for(
                lambda: self.fault or self._stopping or any(k in self._held and self._held[k].finished for k in keys),
                timeout=wait_s,
            )
            self._healthy()
            finished = [(key, held) for key in keys if (held := self._held.get(key)) and held.finished]
            errors = {key: held.error for key, held in finished if held.error is not None}
            samples, tokens = {}, 0
            for key, held in finished:
                if held.samples is not None and tokens < most_tokens:
                    samples[key] = held.samples
                    tokens += sum(len(sample.token_ids) for sample in held.samples)
            return samples, errors

    def forget(self, keys: Iterable[str] | None) -> int:
        """Drops results that have been fetched and requests that nobody waits for; None = all."""
        with self._changed:
            chosen = list(self._held) if keys is None else [key for key in keys if key in self._held]
            self._aborts |= {key for key in chosen if not self._held[key].finished}
            for key in chosen:
                del self._held[key]
            self._changed.notify_all()
            return len(chosen)

    def update(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
        in_flight: bool,
        probe: Sequence[Sequence[int]] = (),
    ) -> list[list[float]]:
        """Gives the engine new weights, and scores the probe with them before anything is sampled.

        in_flight: without waiting for running requests, where the engine can. If it breaks off between two tensors, no
        weights are right any more: a fault that lasts until a whole update went through.
        """

        def run() -> list[list[float]]:
            begun = False

            def watched() -> Iterator[tuple[str, Tensor]]:
                nonlocal begun
                for pair in named_tensors:
                    begun = True
                    self._alive()
                    yield pair
                self._may_be_silent()  # it has them all, and is still to hand them to its processes or pack them

            try:
                try:
                    self.engine.update_weights(watched(), version)
                except RestartNeeded:
                    if self.remake is None or begun:
                        raise
                    begun = True  # requests wait in the queue for the engine that comes
                    self.engine.close()
                    self._may_be_silent()
                    self.engine = self.remake(watched(), version)
            except Exception as error:
                if begun:
                    self.broken = f"the update to version {version} broke off: {_short(error)}"
                raise
            finally:
                self._beat = time.monotonic()
            self.broken = None
            return self.engine.score(probe) if probe else []

        scores: list[list[float]] = self._ask(run, when_idle=not (in_flight and self.engine.takes_weights_midway))
        return scores

    def score(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        midway = self.engine.takes_weights_midway
        scores: list[list[float]] = self._ask(lambda: self.engine.score(tokens), when_idle=not midway)
        return scores

    # ---- the thread -----------------------------------------------------------------------------------

    def _ask(self, run: Callable[[], Any], when_idle: bool) -> Any:
        """The result of a command, once the thread has come to it."""
        command = _Command(run, Future(), when_idle)
        with self._changed:
            if not self.alive:
                raise Conflict(self.fault or "the engine is not running")
            self._commands.append(command)
            self._changed.notify_all()
        return command.result.result()

    def _healthy(self) -> None:
        reason = self.fault or self.broken
        if reason:
            raise Conflict(reason)

    def _alive(self) -> None:
        self._beat = max(self._beat, time.monotonic())

    def _may_be_silent(self) -> None:
        self._beat = time.monotonic() + START_S

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._alive()
                self._carry_out()
                if self.engine.idle():
                    with self._changed:
                        if not self._commands and not self._aborts and not self._stopping:
                            self._changed.wait(NAP_S)
                    continue
                groups = self.engine.step()
                self.steps += 1
                for key, samples in groups:
                    self._finish(key, _Held(samples))
            self.engine.close()
        except BaseException as error:
            traceback.print_exc()
            self.fault = f"the engine failed: {_short(error)}"
        finally:
            with self._changed:
                left = list(self._commands)
                self._commands.clear()
                self._changed.notify_all()
            for command in left:
                command.result.set_exception(Conflict(self.fault or "the worker is shutting down"))

    def _carry_out(self) -> None:
        while True:
            with self._changed:
                aborted, self._aborts = self._aborts, set()
            for key in aborted:
                self.engine.abort(key)
            with self._changed:
                if not self._commands or (self._commands[0].when_idle and not self.engine.idle()):
                    return
                command = self._commands.popleft()
            try:
                command.result.set_result(command.run())
            except Exception as error:
                command.result.set_exception(error)

    def _drop(self, keys: Iterable[str]) -> None:
        with self._changed:
            for key in keys:
                self._held.pop(key, None)
            self._changed.notify_all()

    def _finish(self, key: str, outcome: _Held) -> None:
        with self._changed:
            if key in self._held:  # else nobody waits for it any more
                self._held[key] = outcome
                self._changed.notify_all()


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:500]}" if text else type(error).__name__
