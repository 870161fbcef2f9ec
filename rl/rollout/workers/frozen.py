"""Workers that keep the weights that they loaded, such as a teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from rl.recipe_workers import Engine
from rl.rollout.workers.client import Stranger
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

    def _meet(self, worker: Worker) -> None:
        self._check(worker)  # before its requests are dropped: they may be another's
        super()._meet(worker)

    def _bring_up_to_date(self, worker: Worker) -> None:
        self._check(worker)
        worker.up, worker.reason = True, ""
        self.settings.say(f"worker {worker.client.url} is back")

    def _check(self, worker: Worker) -> None:
        """Raises Stranger unless the worker samples with what it loaded, Unreachable if it is not there."""
        health = worker.client.health()
        if health.fault:
            raise Stranger(health.fault)
        if health.engine != self.engine:
            raise Stranger(f"its engine is {health.engine}, not {self.engine}")
        if health.version != AS_LOADED:
            raise Stranger(f"a trainer has sent it other weights (version {health.version}): start it anew")
