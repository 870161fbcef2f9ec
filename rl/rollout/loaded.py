"""A sampler over workers with the weights that they loaded, of a model that nobody trains: docs/rollouts.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.policy.load import DTYPES, is_local, load_model
from rl.policy.processes import Processes
from rl.recipe_io import RecipeError
from rl.recipe_model import ModelSpec
from rl.recipe_workers import Engine, WorkersSpec
from rl.rollout.workers.fleet import Fleet, FleetSettings
from rl.rollout.workers.frozen import FrozenFleet
from rl.rollout.workers.opening import open_fleet, workers_of
from rl.rollout.workers.sampler import WorkerSampler
from rl.rollout.workers.transfer import Spool
from rl.run.checkpoint import write_folder


@dataclass(frozen=True)
class Served:
    """What workers are to load and how they are to run it.

    longest: prompt and completion, in tokens. seed: of random weights, and vLLM's own. field: the recipe's name of
    what `model` and `workers` belong to, with a dot, or nothing.
    """

    engine: Engine
    model: ModelSpec
    tokenizer: Any
    max_slots: int
    longest: int
    seed: int
    threads: int | None
    field: str = ""

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The engine's; `given` in the recipe has the last word."""
        options: dict[str, Any] = {"dtype": self.model.dtype, "max_slots": self.max_slots}
        if self.engine == "vllm":
            options |= {"max_model_len": self.longest, "seed": self.seed}
            limit = given.get("max_model_len")
            if isinstance(limit, int) and 0 < limit < self.longest:
                raise RecipeError(
                    f"{self.field}workers.options.max_model_len: {limit} tokens are fewer than the longest prompt and "
                    f"completion have, {self.longest}; raise it, or leave it out"
                )
        elif self.threads is not None:
            options["threads"] = self.threads
        return {**options, **given}

    def source(self, target: Path) -> str:
        """The recipe's folder or hub id, if it is the model as it is; else `target`, which is written."""
        spec = self.model
        if spec.path is not None and not (spec.config or spec.tokenizer or spec.revision):
            return str(Path(spec.path).expanduser().resolve()) if is_local(spec.path) else spec.path
        model = load_model(
            spec, self.tokenizer, seed=self.seed, dtype=DTYPES[spec.dtype], field=f"{self.field}model"
        )  # fmt: skip

        def fill(path: Path) -> None:
            model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)

        write_folder(target, fill)
        return str(target)


@contextmanager
def loaded_workers(
    spec: WorkersSpec, served: Served, folder: Path, processes: Processes, say: Callable[[str], None]
) -> Iterator[WorkerSampler]:
    """Called on every process; the workers end with it, unless they are others'. folder: for logs, and a model that
    has to be written."""

    def fleet(secret: str) -> Fleet:
        spool = Spool(folder / "weights", limit=0)
        workers = workers_of(
            spec,
            secret,
            folder,
            engine=served.engine,
            model=served.source(folder / "model") if spec.count else "",
            options=served.options(spec.options),
            bucket_folder=spool.folder,
        )
        settings = FleetSettings(
            transport="files", start_timeout_s=spec.start_timeout_s, max_restarts=spec.max_restarts, say=say
        )
        return FrozenFleet(workers, spool, served.engine, settings)

    clients, made = open_fleet(
        spec, f"{served.field}workers", folder, fleet, rank=processes.rank, gather=processes.gather
    )
    sampler = WorkerSampler(clients, made, probe=None, in_flight=spec.in_flight, wait_s=spec.start_timeout_s)
    try:
        yield sampler
        processes.barrier()  # the others may still be asking
    finally:
        sampler.close()
