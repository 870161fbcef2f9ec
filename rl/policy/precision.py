"""`precision: fp8` of a recipe: which layers compute in FP8, and by whose kernels."""

from __future__ import annotations

from typing import Any

import torch

from rl.policy.processes import Processes
from rl.policy.sharding import Sharding
from rl.recipe_io import RecipeError
from rl.recipe_model import PrecisionSpec
from rl.run.progress import Progress


def apply_precision(
    model: Any, spec: PrecisionSpec, processes: Processes, progress: Progress, *, whole: bool = False
) -> None:
    """Turns layers of a model into FP8 ones where the recipe asks for it, and says so in the log.

    The model may still be elsewhere than on the process's device, where it will run. whole: it stays so, whatever the
    launcher's configuration shards.
    """
    if spec.kind != "fp8":
        return
    if not whole:
        check_sharding(spec, processes.sharding)
    # Under FSDP2 gathered weights exist around their use only: there is nothing to keep a quantised copy of.
    keep_weights = whole or processes.sharding.kind == "none"
    progress.line(convert(model, spec, processes.device, keep_weights=keep_weights))


def check_sharding(spec: PrecisionSpec, sharding: Sharding) -> None:
    """RecipeError if what the launcher's configuration asks for cannot train in this precision."""
    if spec.kind == "fp8" and sharding.kind == "zero":
        raise RecipeError("precision: fp8 trains replicated or under FSDP2, not with DeepSpeed; choose another backend")


def convert(model: Any, spec: PrecisionSpec, device: torch.device, *, keep_weights: bool = True) -> str:
    """Turns layers of a model, which will run on `device`, into FP8 ones; returns what to say of it."""
    from model.fp8.convert import to_fp8

    backend = backend_for(spec, device)
    try:
        found = to_fp8(model, backend=backend, device=device, skip=spec.skip, keep_weights=keep_weights)
    except ValueError as error:
        raise RecipeError(f"precision: {error}") from error
    return (
        f"precision: {len(found.converted)} layers with {found.parameters:,} parameters in FP8 by backend {backend} on "
        f"{device.type}, {len(found.kept)} layers not"
    )


def backend_for(spec: PrecisionSpec, device: torch.device) -> str:
    """The name of the backend that the recipe's choice comes to on a device; RecipeError if it cannot run there."""
    from model.fp8.backends import choose

    try:
        return choose(spec.backend, device).name
    except ValueError as error:
        raise RecipeError(f"precision.backend: {error}") from error
