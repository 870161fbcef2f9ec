"""A teacher in worker processes, here or on other hosts, with the weights that they loaded: docs/rollouts.md."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rl.distill.asking import Asking, streams_of
from rl.distill.journal import Received
from rl.policy.load import DTYPES, is_local, load_model
from rl.policy.processes import Processes
from rl.recipe_distill import DistillRecipe, LocalTeacher
from rl.recipe_io import RecipeError
from rl.recipe_workers import WorkersSpec
from rl.rollout.workers.fleet import Fleet, FleetSettings
from rl.rollout.workers.frozen import FrozenFleet
from rl.rollout.workers.opening import open_fleet, workers_of
from rl.rollout.workers.sampler import WorkerSampler
from rl.rollout.workers.transfer import Spool
from rl.run.checkpoint import write_folder
from rl.run.progress import Progress


def sample_in_workers(
    recipe: DistillRecipe, asking: Asking, processes: Processes, progress: Progress
) -> Generator[list[Received], None, None]:
    """Responses as they come, a problem's together. Called on every process, each of which asks for its own share."""
    problems = list(asking.wanted)
    with _workers(recipe, asking, processes, progress) as sampler:
        try:
            with closing(sampler.stream(asking.ids(problems), asking.params, streams=streams_of(problems))) as groups:
                for complete in groups:
                    if complete:
                        yield [answer for i, row in complete for answer in asking.received(problems[i], row)]
        except (RuntimeError, ValueError) as error:
            raise RecipeError(f"teacher.workers: {error}; what was received is kept, so start again") from error


@contextmanager
def _workers(
    recipe: DistillRecipe, asking: Asking, processes: Processes, progress: Progress
) -> Iterator[WorkerSampler]:
    """A sampler over the workers, which end with it unless they are others'."""
    teacher, folder = asking.teacher, Path(recipe.output_dir) / "workers"
    spec = teacher.workers
    assert spec is not None  # else it is sampled in this process

    def fleet(secret: str) -> Fleet:
        spool = Spool(folder / "weights", limit=0)
        workers = workers_of(
            spec,
            secret,
            folder,
            engine=teacher.engine,
            model=_served_model(asking, folder / "model") if spec.count else "",
            options=_options(recipe, teacher, spec),
            bucket_folder=spool.folder,
        )
        settings = FleetSettings(
            transport="files",
            start_timeout_s=spec.start_timeout_s,
            max_restarts=spec.max_restarts,
            say=progress.line,
        )
        return FrozenFleet(workers, spool, teacher.engine, settings)

    clients, made = open_fleet(spec, "teacher.workers", folder, fleet, rank=processes.rank, gather=processes.gather)
    sampler = WorkerSampler(clients, made, probe=None, in_flight=spec.in_flight, wait_s=spec.start_timeout_s)
    try:
        yield sampler
        processes.barrier()  # the others may still be asking
    finally:
        sampler.close()


def _served_model(asking: Asking, target: Path) -> str:
    """What workers are started from: the recipe's folder or hub id, if it is the teacher as it is, else `target`."""
    spec = asking.teacher.model
    if spec.path is not None and not (spec.config or spec.tokenizer or spec.revision):
        return str(Path(spec.path).expanduser().resolve()) if is_local(spec.path) else spec.path
    dtype = DTYPES[spec.dtype]
    model = load_model(spec, asking.tokenizer, seed=asking.seed, dtype=dtype, field="teacher.model")

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        asking.tokenizer.save_pretrained(path)

    write_folder(target, fill)
    return str(target)


def _options(recipe: DistillRecipe, teacher: LocalTeacher, spec: WorkersSpec) -> dict[str, Any]:
    """The engine's, as far as other fields of the recipe say them; `workers.options` has the last word."""
    options: dict[str, Any] = {"dtype": teacher.model.dtype, "max_slots": teacher.max_slots}
    if teacher.engine == "vllm":
        options |= {"max_model_len": teacher.max_prompt_tokens + teacher.max_tokens, "seed": recipe.seed}
    elif recipe.threads is not None:
        options["threads"] = recipe.threads
    return {**options, **spec.options}
