"""The sampler that a recipe asks for: in this process, in vLLM beside the trainer, or in worker processes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from rl.policy.backend import Backend
from rl.policy.policy import Policy
from rl.recipe import GRPORecipe
from rl.recipe_gkd import GKDRecipe
from rl.recipe_io import RecipeError
from rl.recipe_workers import WorkersSpec
from rl.rollout.local import LocalSampler
from rl.rollout.probe import probe_tokens
from rl.rollout.starting import model_folder, write_starting_model
from rl.rollout.sync import Sync, probe_logprobs
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.command import read_secret
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe, Worker
from rl.rollout.workers.launch import WorkerProcess, write_secret
from rl.rollout.workers.receiving import shared_folder
from rl.rollout.workers.sampler import WorkerSampler
from rl.rollout.workers.transfer import Spool
from rl.run.folder import Run

Sampling = GRPORecipe | GKDRecipe


def make_sampler(
    recipe: Sampling,
    policy: Policy,
    backend: Backend,
    tokenizer: Any,
    run: Run,
    *,
    record_routing: bool = False,
    sampler: Any = None,
) -> Sync:
    """The sampler, and what keeps it at the trainer's weights. Called on every process of the trainer.

    Unless it shares the trainer's weights, it has none before the first `send`. sampler: one that is made already.
    """
    rollout = recipe.rollout
    probe = probe_tokens(min(len(tokenizer), policy.model.config.get_text_config().vocab_size))
    tolerance = (rollout.workers or WorkersSpec()).probe_tolerance
    if sampler is not None:
        return Sync(sampler, backend, policy, probe, tolerance, as_in_files=False)
    if rollout.mode == "inprocess":
        sampler = LocalSampler(
            backend.sampler_model(),
            tokenizer,
            max_slots=rollout.max_slots,
            slots=policy.packed,
            draft_tokens=rollout.draft_tokens,
            record_routing=record_routing,
        )
    elif rollout.mode == "colocate":
        sampler = _colocated(recipe, backend, tokenizer, run)
    else:
        sampler = _served(recipe, policy, backend, tokenizer, run, Probe(probe, tolerance), record_routing)
    sampler.progress = lambda done, all_: run.progress.update(f"{done}/{all_} completions")
    fp8 = rollout.workers is not None and rollout.workers.weights == "fp8"
    return Sync(sampler, backend, policy, probe, tolerance, as_in_files=rollout.engine == "vllm", fp8=fp8)


def _colocated(recipe: Sampling, backend: Backend, tokenizer: Any, run: Run) -> Any:
    from rl.rollout.vllm_engine import VLLMEngine
    from rl.rollout.vllm_sampler import VLLMSampler

    options = _options(recipe, record_routing=False)
    write_starting_model(recipe, backend, tokenizer, run)
    own = {name: options.pop(name) for name in ("dtype", "max_model_len", "max_slots", "seed") if name in options}
    engine = VLLMEngine(str(model_folder(recipe, run)), **own, sleeping=True, extra=options)
    return VLLMSampler(engine)


# ---- workers -----------------------------------------------------------------------------------------


def _served(
    recipe: Sampling, policy: Policy, backend: Backend, tokenizer: Any, run: Run, probe: Probe, routing: bool
) -> WorkerSampler:
    spec = recipe.rollout.workers
    assert spec is not None
    fleet, secret, error = None, "", None
    if spec.count:
        write_starting_model(recipe, backend, tokenizer, run)
    if backend.rank == 0:
        try:
            secret = _secret(spec, run)
            fleet = _fleet(recipe, spec, backend, run, secret, probe, routing)
            fleet.start()
        except (RuntimeError, ValueError, OSError) as reason:
            error = str(reason)
    urls = [worker.client.url for worker in fleet.workers] if fleet else []
    urls, secret, error = backend.gather((urls, secret, error))[0]
    if error is not None:
        raise RecipeError(f"rollout.workers: {error}")
    return WorkerSampler(
        [WorkerClient(url, secret, spec.deadline_s) for url in urls],
        fleet,
        probe=lambda: probe_logprobs(policy, probe.tokens),
        share=backend.gather,
        in_flight=spec.in_flight,
        wait_s=spec.start_timeout_s,
    )


def _fleet(
    recipe: Sampling,
    spec: WorkersSpec,
    backend: Backend,
    run: Run,
    secret: str,
    probe: Probe,
    routing: bool,
) -> Fleet:
    spool = Spool(spool_folder(spec.folder, run.folder, backend.weight_bytes), spec.bucket_mb << 20)
    if spec.urls:
        workers = [Worker(WorkerClient(url, secret, spec.deadline_s)) for url in spec.urls]
    else:
        workers = [_started(recipe, spec, run, number, spool, secret, routing) for number in range(spec.count or 0)]
    settings = FleetSettings(
        transport=spec.chosen_transport,
        start_timeout_s=spec.start_timeout_s,
        max_restarts=spec.max_restarts,
        collective_host=spec.collective_host,
        collective_backend=spec.collective,
        say=run.progress.line,
    )
    return Fleet(workers, spool, probe, settings)


def _started(
    recipe: Sampling, spec: WorkersSpec, run: Run, number: int, spool: Spool, secret: str, routing: bool
) -> Worker:
    folder = run.folder / "workers"
    process = WorkerProcess(
        number,
        folder,
        engine=recipe.rollout.engine,
        model=str(model_folder(recipe, run)),
        secret_file=Path(spec.secret_file).expanduser() if spec.secret_file else folder / "secret",
        host=spec.host,
        port=spec.ports[number] if spec.ports else 0,
        bucket_folder=spool.folder,
        python=spec.python,
        env=spec.env_of(number),
        cores=spec.cores[number] if spec.cores else None,
        options=_options(recipe, routing),
    )
    return Worker(WorkerClient(process.url, secret, spec.deadline_s), process)


def _options(recipe: Sampling, record_routing: bool) -> dict[str, Any]:
    """The engine's, as far as other fields of the recipe say them; `workers.options` has the last word."""
    rollout = recipe.rollout
    options: dict[str, Any] = {"dtype": recipe.model.dtype, "max_slots": rollout.max_slots}
    if rollout.engine == "vllm":
        options |= {"max_model_len": rollout.max_prompt_tokens + rollout.max_tokens, "seed": recipe.seed}
    else:
        options |= {"draft_tokens": rollout.draft_tokens, "record_routing": record_routing}
        if recipe.precision.kind == "fp8":
            options["precision"] = recipe.precision.model_dump(mode="json")
        if recipe.threads is not None:
            options["threads"] = recipe.threads
    return {**options, **(rollout.workers.options if rollout.workers else {})}


def _secret(spec: WorkersSpec, run: Run) -> str:
    if spec.secret_file is not None:
        return read_secret(Path(spec.secret_file).expanduser())
    return write_secret(run.folder / "workers" / "secret")


def spool_folder(given: str | None, output: Path, bytes_: int) -> Path:
    """Always the same for a run, so that what one that was killed leaves behind is found again: in shared memory if
    there is room for the weights twice (the new ones while the old ones are still there), else in the output folder."""
    if given is not None:
        return Path(given).expanduser()
    memory = shared_folder()
    if shutil.disk_usage(memory).free < 2.2 * bytes_:
        return output / "workers" / "weights"
    name = hashlib.sha256(f"{os.getuid()} {output.resolve()}".encode()).hexdigest()[:16]
    return memory / f"r1forge-{name}"
