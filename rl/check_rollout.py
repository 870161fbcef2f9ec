"""Checks of `rollout`'s engine, mode and workers before a run, and what `rl check` prints of them."""

from __future__ import annotations

import ipaddress
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from rl.check_rounding import check_rounding
from rl.recipe import GRPORecipe
from rl.recipe_io import RecipeError
from rl.recipe_workers import WorkersSpec


def check_rollout(recipe: GRPORecipe) -> list[str]:
    """Raises RecipeError for what cannot run here; returns warnings."""
    rollout = recipe.rollout
    workers = rollout.workers
    if rollout.engine == "vllm" and rollout.draft_tokens:
        raise RecipeError(
            "rollout.draft_tokens: vLLM drafts by settings of its own (workers.options.speculative_config); set it to 0"
        )
    warnings = []
    here = rollout.mode == "colocate" or (workers is not None and bool(workers.count) and workers.python is None)
    if rollout.engine == "vllm" and here and find_spec("vllm") is None:
        other = "" if rollout.mode == "colocate" else ", or name the interpreter of one: rollout.workers.python"
        warnings.append(f"rollout.engine: vLLM is not installed here; run in an environment that has it{other}")
    warnings += check_rounding(recipe)
    return warnings + (_check_workers(workers) if workers is not None and rollout.mode == "server" else [])


def _check_workers(spec: WorkersSpec) -> list[str]:
    warnings = []
    if spec.secret_file is not None:
        from rl.rollout.workers.command import read_secret

        try:
            read_secret(Path(spec.secret_file).expanduser())
        except (OSError, ValueError) as error:
            raise RecipeError(f"rollout.workers.secret_file: {error}") from error
    if spec.python is not None and shutil.which(os.path.expanduser(spec.python)) is None:
        raise RecipeError(f"rollout.workers.python: {spec.python} is not an interpreter that can be run")
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if spec.count and world > local and _loopback(spec.host):
        raise RecipeError(
            "rollout.workers.host: the trainer runs on several hosts, and workers at a loopback address are reached "
            "from the first alone; give the first host's address in a network that you trust"
        )
    beyond = [url for url in spec.urls if url.startswith("http://") and not _loopback(urlsplit(url).hostname or "")]
    if beyond or not _loopback(spec.host):
        warnings.append(
            "rollout.workers: secret, prompts and weights travel unencrypted beyond this host; only in a network that "
            "you trust, or through a tunnel"
        )
    return warnings


def rollout_table(recipe: GRPORecipe) -> list[str]:
    rollout = recipe.rollout
    lines = [f"engine                    {rollout.engine}, {rollout.mode}"]
    spec = rollout.workers
    if rollout.mode != "server" or spec is None:
        return lines
    world = int(os.environ.get("WORLD_SIZE", "1"))
    source = f"{spec.count} started at {spec.host}" if spec.count else ", ".join(spec.urls)
    return [
        *lines,
        f"workers                   {source}, shared by {world} process(es)",
        f"weights                   {spec.chosen_transport}, in pieces of {spec.bucket_mb} MiB"
        + (", those of FP8 products in FP8" if spec.weights == "fp8" else ""),
        f"lost after                {spec.deadline_s:g} s of silence"
        + (f", then started again, at most {spec.max_restarts} times" if spec.count else ", until it answers again"),
    ]


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
