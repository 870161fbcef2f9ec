"""Workers that keep the weights that they loaded, such as a teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from rl.recipe_workers import Engine
from rl.rollout.workers.client import Unreachable
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe, Worker
from rl.rollout.workers.transfer import Spool
from rl.rollout.workers.wire import AS_LOADED


class FrozenFleet(Fleet):
    """A worker is ready as soon as it answers, also after a restart: nothing is sent to it, and no probe is asked for.

    engine: what the workers must run. spool: stays empty.
    """

    def __init__(self, workers: Sequence[Worker], spool: Spool, engine: Engine, settings: FleetSettings):
        super().__init__(workers, spool, Probe([], 0.0), settings)
        self.version, self.engine = AS_LOADED, engine

    def start(self) -> None:
        super().start()
        self.watch()

    def _first_answer(self, worker: Worker) -> None:
        if worker.process is None:
            self._check(worker)  # before its requests are dropped: they may be another's
        super()._first_answer(worker)

    def _bring_up_to_date(self, worker: Worker) -> None:
        self._check(worker)
        worker.up, worker.reason = True, ""
        self.settings.say(f"worker {worker.client.url} is back")

    def _check(self, worker: Worker) -> None:
        """Raises Unreachable unless the worker samples with what it loaded."""
        health = worker.client.health()
        if health.fault:
            raise Unreachable(health.fault)
        if health.engine != self.engine:
            raise Unreachable(f"its engine is {health.engine}, not {self.engine}")
        if health.version != AS_LOADED:
            raise Unreachable(f"a trainer has sent it other weights (version {health.version}): start it anew")
