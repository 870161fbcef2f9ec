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
from rl.rollout.probe import LENGTH, probe_tokens
from rl.rollout.starting import model_folder, write_starting_model
from rl.rollout.sync import Sync, probe_logprobs
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe
from rl.rollout.workers.opening import open_fleet, workers_of
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
    evaluated: int = 0,
) -> Sync:
    """The sampler, and what keeps it at the trainer's weights. Called on every process of the trainer.

    Unless it shares the trainer's weights, it has none before the first `send`. sampler: one that is made already.
    evaluated: tokens of the longest sequence of an evaluation.
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
        sampler = _colocated(recipe, _options(recipe, record_routing, evaluated), backend, tokenizer, run)
    else:
        options = _options(recipe, record_routing, evaluated)
        sampler = _served(recipe, options, policy, backend, tokenizer, run, Probe(probe, tolerance))
    sampler.progress = lambda done, all_: run.progress.update(f"{done}/{all_} completions")
    # Of somebody else's worker we do not know what it starts from, should its engine have to be started anew.
    ours = not (rollout.workers and rollout.workers.urls)
    return Sync(
        sampler,
        backend,
        policy,
        probe,
        tolerance,
        as_in_files=rollout.engine == "vllm",
        fp8=rollout.workers is not None and rollout.workers.weights == "fp8",
        keeps_others=ours,
    )


def _colocated(recipe: Sampling, options: dict[str, Any], backend: Backend, tokenizer: Any, run: Run) -> Any:
    from rl.rollout.vllm_engine import VLLMEngine
    from rl.rollout.vllm_sampler import VLLMSampler

    write_starting_model(recipe, backend, tokenizer, run)
    names = ("dtype", "max_model_len", "max_slots", "seed", "empty", "record_routing")
    own = {name: options.pop(name) for name in names if name in options}
    engine = VLLMEngine(str(model_folder(recipe, run)), **own, sleeping=True, extra=options)
    return VLLMSampler(engine)


# ---- workers -----------------------------------------------------------------------------------------


def _served(
    recipe: Sampling,
    options: dict[str, Any],
    policy: Policy,
    backend: Backend,
    tokenizer: Any,
    run: Run,
    probe: Probe,
) -> WorkerSampler:
    spec = recipe.rollout.workers
    assert spec is not None
    if spec.count:
        write_starting_model(recipe, backend, tokenizer, run)
    folder = run.folder / "workers"

    def fleet(secret: str) -> Fleet:
        spool = Spool(spool_folder(spec.folder, run.folder, backend.weight_bytes), spec.bucket_mb << 20)
        model = str(model_folder(recipe, run))
        workers = workers_of(
            spec, secret, folder,
            engine=recipe.rollout.engine, model=model, options=options, bucket_folder=spool.folder,
        )  # fmt: skip
        settings = FleetSettings(
            transport=spec.chosen_transport,
            start_timeout_s=spec.start_timeout_s,
            max_restarts=spec.max_restarts,
            collective_host=spec.collective_host,
            collective_backend=spec.collective,
            say=run.progress.line,
        )
        return Fleet(workers, spool, probe, settings)

    clients, made = open_fleet(spec, "rollout.workers", folder, fleet, rank=backend.rank, gather=backend.gather)
    return WorkerSampler(
        clients,
        made,
        probe=lambda: probe_logprobs(policy, probe.tokens),
        share=backend.gather,
        in_flight=spec.in_flight,
        wait_s=spec.start_timeout_s,
        takes_weights_midway=isinstance(recipe, GRPORecipe) and recipe.rollout.in_flight,
    )


def _options(recipe: Sampling, record_routing: bool, evaluated: int) -> dict[str, Any]:
    """The engine's, as far as other fields of the recipe say them; `workers.options` has the last word."""
    rollout = recipe.rollout
    given = rollout.workers.options if rollout.workers else {}
    options: dict[str, Any] = {
        "dtype": recipe.model.dtype, "max_slots": rollout.max_slots, "record_routing": record_routing,
    }  # fmt: skip
    if rollout.engine == "vllm":
        limit = given.get("max_model_len")
        if isinstance(limit, int) and 0 < limit < evaluated:
            raise RecipeError(
                f"rollout.workers.options.max_model_len: {limit} tokens; evaluation needs {evaluated}, for its longest "
                "prompt and evaluate.max_tokens; raise it, or leave it out"
            )
        longest = max(rollout.max_prompt_tokens + rollout.max_tokens, evaluated, LENGTH + 1)  # vLLM scores and adds one
        # Empty: at the start the folder's weights are the trainer's, or nearly, and would hide one that never arrives.
        options |= {"max_model_len": longest, "seed": recipe.seed, "empty": True}
    else:
        options["draft_tokens"] = rollout.draft_tokens
        if recipe.precision.kind == "fp8":
            options["precision"] = recipe.precision.model_dump(mode="json")
        if recipe.threads is not None:
            options["threads"] = recipe.threads
    return {**options, **given}


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
