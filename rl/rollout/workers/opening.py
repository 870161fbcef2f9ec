"""The workers that a recipe names: started or found by the first process, then known to all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.recipe_io import RecipeError
from rl.recipe_workers import Engine, WorkersSpec
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.command import read_secret
from rl.rollout.workers.fleet import Fleet, Worker
from rl.rollout.workers.launch import WorkerProcess, write_secret


def open_fleet(
    spec: WorkersSpec,
    field: str,
    folder: Path,
    make: Callable[[str], Fleet],
    *,
    rank: int,
    gather: Callable[[Any], list[Any]],
) -> tuple[list[WorkerClient], Fleet | None]:
    """Clients of all workers, once every one of them answers, and on the first process their fleet. Called on every
    process of `gather`.

    folder: for a new secret. make: the fleet, given the secret; on the first process. field: the recipe's name of
    `spec`, for errors.
    """
    fleet, secret, error = None, "", None
    if rank == 0:
        try:
            given = spec.secret_file
            secret = read_secret(Path(given).expanduser()) if given else write_secret(folder / "secret")
            fleet = make(secret)
            fleet.start()
        except RecipeError as reason:
            error = str(reason)
        except (RuntimeError, ValueError, OSError) as reason:
            error = f"{field}: {reason}"
    urls = [worker.client.url for worker in fleet.workers] if fleet else []
    urls, secret, error = gather((urls, secret, error))[0]
    if error is not None:
        raise RecipeError(error)
    return [WorkerClient(url, secret, spec.deadline_s) for url in urls], fleet


def workers_of(
    spec: WorkersSpec,
    secret: str,
    folder: Path,
    *,
    engine: Engine,
    model: str,
    options: dict[str, Any],
    bucket_folder: Path,
) -> list[Worker]:
    """Those of `spec.urls`, or `spec.count` processes that are still to be started. folder: for their logs."""
    if spec.urls:
        return [Worker(WorkerClient(url, secret, spec.deadline_s)) for url in spec.urls]
    processes = [
        WorkerProcess(
            number,
            folder,
            engine=engine,
            model=model,
            secret_file=Path(spec.secret_file).expanduser() if spec.secret_file else folder / "secret",
            host=spec.host,
            port=spec.ports[number] if spec.ports else 0,
            bucket_folder=bucket_folder,
            python=spec.python,
            env=spec.env_of(number),
            cores=spec.cores[number] if spec.cores else None,
            options=options,
        )
        for number in range(spec.count or 0)
    ]
    return [Worker(WorkerClient(process.url, secret, spec.deadline_s), process) for process in processes]
