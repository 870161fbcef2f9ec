"""Checks of `rollout`'s engine, mode and workers before a run, and of a teacher's; what `rl check` prints of them."""

from __future__ import annotations

import ipaddress
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from rl.check_rounding import check_rounding
from rl.check_tables import config_of
from rl.recipe import EvalRecipe, EvaluateSpec, GRPORecipe, RunSpec
from rl.recipe_gkd import GKDRecipe
from rl.recipe_io import RecipeError
from rl.recipe_workers import Engine, WorkersSpec


def check_sampling(recipe: RunSpec) -> list[str]:
    """Where the recipe's model is sampled; raises RecipeError for what cannot run here, returns warnings."""
    if isinstance(recipe, GRPORecipe | GKDRecipe):
        return check_rollout(recipe)
    return _check_workers_of(recipe) if isinstance(recipe, EvalRecipe) else []


def check_rollout(recipe: GRPORecipe | GKDRecipe) -> list[str]:
    rollout = recipe.rollout
    workers = rollout.workers
    if rollout.engine == "vllm" and rollout.draft_tokens:
        raise RecipeError(
            "rollout.draft_tokens: vLLM drafts by settings of its own (workers.options.speculative_config); set it to 0"
        )
    if rollout.engine == "vllm":
        check_temperature("rollout.temperature", rollout.temperature)
        _check_probe(workers)
    warnings = _check_evaluation(recipe) + check_rounding(recipe)
    if rollout.mode == "colocate" and find_spec("vllm") is None:
        warnings.append("rollout.engine: vLLM is not installed here; run in an environment that has it")
    if rollout.mode == "server" and workers is not None:
        warnings += check_workers("rollout.", rollout.engine, workers)
    return warnings + _check_routing(recipe)


def check_temperature(field: str, temperature: float) -> None:
    """Of sampling by vLLM."""
    from rl.rollout.vllm_engine import COLDEST, HOTTEST

    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise RecipeError(f"{field}: vLLM samples at temperatures of {COLDEST} to {HOTTEST} or 0, not {temperature}")


def _check_probe(workers: WorkersSpec | None) -> None:
    """Whether vLLM can score it: that takes room for one token more."""
    from rl.rollout.probe import LENGTH

    limit = workers.options.get("max_model_len") if workers else None
    if isinstance(limit, int) and 0 < limit <= LENGTH:
        raise RecipeError(
            f"rollout.workers.options.max_model_len: {limit} tokens; the probe after each update wants {LENGTH + 1}: "
            "raise it, or leave it out"
        )


def _check_evaluation(recipe: GRPORecipe | GKDRecipe) -> list[str]:
    """What the run's own sampler, which evaluates too, makes of `evaluate`."""
    spec, rollout = recipe.evaluate, recipe.rollout
    if spec is None or rollout.mode == "inprocess":
        return []
    if rollout.engine == "vllm":
        _check_fits("rollout.", spec, rollout.workers)
    return [
        f"evaluate.{name} means nothing with rollout.mode: {rollout.mode}, where the run's own sampler evaluates: the "
        "settings of `rollout` hold"
        for name in ("max_slots", "draft_tokens")
        if name in spec.model_fields_set
    ]


def _check_routing(recipe: GRPORecipe | GKDRecipe) -> list[str]:
    """A mixture of experts whose recorded routing training is to meet, and a sampler that records none."""
    import torch

    rollout = recipe.rollout
    if not isinstance(recipe, GRPORecipe) or rollout.mode == "inprocess" or not recipe.moe.replay_routing:
        return []
    config = config_of(recipe.model)
    if "moe" not in recipe.model_fields_set and (config is None or config.model_type != "deepseek_v3"):
        return []
    spec = rollout.workers or WorkersSpec()
    if spec.urls:
        return ["moe.replay_routing: the owner of rollout.workers.urls must have started them with record_routing=true"]
    options, field = spec.options, "rollout.workers.options"
    off = [name for name in ("record_routing", "enable_return_routed_experts") if options.get(name) is False]
    if off:
        return [f"{field}.{off[0]}: false, so that moe.replay_routing has nothing to replay; remove one of the two"]
    if rollout.engine == "vllm" and options.get("pipeline_parallel_size", 1) != 1:
        return [f"{field}.pipeline_parallel_size: with it vLLM records no routing for moe.replay_routing"]
    if rollout.engine == "vllm" and not torch.cuda.is_available():
        return ["moe.replay_routing: vLLM records routing on a GPU only, and here is none"]
    return []


def _check_workers_of(recipe: EvalRecipe) -> list[str]:
    if recipe.workers is None:
        return []
    if recipe.engine == "vllm":
        _check_fits("", recipe.evaluate, recipe.workers)
    return check_workers("", recipe.engine, recipe.workers)


def _check_fits(field: str, spec: EvaluateSpec, workers: WorkersSpec | None) -> None:
    """Into what vLLM can do. field: as of `check_workers`."""
    check_temperature("evaluate.temperature", spec.temperature)
    limit = workers.options.get("max_model_len") if workers else None
    if isinstance(limit, int) and 0 < limit <= spec.max_tokens:
        raise RecipeError(
            f"evaluate.max_tokens: {spec.max_tokens} tokens and a prompt do not fit into "
            f"{field}workers.options.max_model_len ({limit})"
        )


def check_workers(field: str, engine: Engine, spec: WorkersSpec) -> list[str]:
    """field: whose workers they are, with a dot; nothing of those at the top of a recipe."""
    warnings = []
    if engine == "vllm" and spec.count and spec.python is None and find_spec("vllm") is None:
        warnings.append(
            f"{field}engine: vLLM is not installed here; run in an environment that has it, or name the interpreter "
            f"of one: {field}workers.python"
        )
    if spec.secret_file is not None:
        from rl.rollout.workers.command import read_secret

        try:
            read_secret(Path(spec.secret_file).expanduser())
        except (OSError, ValueError) as error:
            raise RecipeError(f"{field}workers.secret_file: {error}") from error
    if spec.python is not None and shutil.which(os.path.expanduser(spec.python)) is None:
        raise RecipeError(f"{field}workers.python: {spec.python} is not an interpreter that can be run")
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if spec.count and world > local and _loopback(spec.host):
        raise RecipeError(
            f"{field}workers.host: the trainer runs on several hosts, and workers at a loopback address are reached "
            "from the first alone; give the first host's address in a network that you trust"
        )
    beyond = [url for url in spec.urls if url.startswith("http://") and not _loopback(urlsplit(url).hostname or "")]
    if beyond or not _loopback(spec.host):
        warnings.append(
            f"{field}workers: secret, prompts and weights travel unencrypted beyond this host; only in a network that "
            "you trust, or through a tunnel"
        )
    return warnings


def rollout_table(recipe: GRPORecipe | GKDRecipe) -> list[str]:
    rollout = recipe.rollout
    lines = [f"engine                    {rollout.engine}, {rollout.mode}"]
    if recipe.evaluate is not None and rollout.mode != "inprocess":
        lines[0] += "; evaluates too"
    spec = rollout.workers
    if rollout.mode != "server" or spec is None:
        return lines
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return [
        *lines,
        f"workers                   {source(spec)}, shared by {world} process(es)",
        f"weights                   {spec.chosen_transport}, in pieces of {spec.bucket_mb} MiB"
        + (", those of FP8 products in FP8" if spec.weights == "fp8" else ""),
        f"lost after                {spec.deadline_s:g} s of silence"
        + (f", then started again, at most {spec.max_restarts} times" if spec.count else ", until it answers again"),
    ]


def source(spec: WorkersSpec) -> str:
    """Where workers come from."""
    return f"{spec.count} started at {spec.host}" if spec.count else ", ".join(spec.urls)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
