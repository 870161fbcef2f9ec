"""Do sampler and trainer round alike? What `rl check` says of `precision` beside engines with weights of their own."""

from __future__ import annotations

from rl.recipe import GRPORecipe
from rl.recipe_gkd import GKDRecipe
from rl.recipe_io import RecipeError
from rl.recipe_model import PrecisionSpec
from rl.recipe_workers import WorkersSpec

BLOCKWISE = "fp8_per_block"  # vLLM's name for weights in blocks of 128 x 128, made of those that it is sent


def check_rounding(recipe: GRPORecipe | GKDRecipe) -> list[str]:
    """Warnings. Nothing breaks where they differ: the sampler draws from another distribution, a little off."""
    rollout = recipe.rollout
    if rollout.mode == "inprocess":
        return []
    spec = rollout.workers or WorkersSpec()
    fp8 = recipe.precision.kind == "fp8"
    if spec.urls:
        warnings = _of_urls(recipe, spec) if fp8 else []
    elif rollout.engine == "local":
        warnings = _of_local(recipe.precision, spec)
    else:
        warnings = _of_vllm(fp8, spec)
    if fp8 and recipe.model.lora is not None:
        warnings.append(
            f"rollout.mode: with precision: fp8 and model.lora, {rollout.mode} rounds merged weights, the trainer "
            "those beside the adapters; inprocess rounds as the trainer does"
        )
    return warnings


def _of_urls(recipe: GRPORecipe | GKDRecipe, spec: WorkersSpec) -> list[str]:
    """Workers that run already: what they do is not known here."""
    if recipe.rollout.engine == "local":
        start = "precision=fp8"
    elif spec.weights == "fp8":
        start = "a checkpoint in FP8 as --model"
    else:
        start = f"quantization={BLOCKWISE}"
    return [f"rollout.workers.urls: with precision: fp8 their owner must have started them with {start}"]


def _of_local(precision: PrecisionSpec, spec: WorkersSpec) -> list[str]:
    try:
        chosen = PrecisionSpec.model_validate(spec.options.get("precision", precision))
    except ValueError as error:
        raise RecipeError(
            f"rollout.workers.options.precision: remove it, the recipe's goes to workers ({error})"
        ) from None
    if (chosen.kind, chosen.skip) == (precision.kind, precision.skip):
        return []
    return ["rollout.workers.options.precision: the workers would round otherwise than the trainer; remove it"]


def _of_vllm(fp8: bool, spec: WorkersSpec) -> list[str]:
    given = spec.options.get("quantization")
    field = "rollout.workers.options.quantization"
    if not fp8 and given is not None:
        return [f"{field}: {given} rounds weights that the trainer does not round; remove it, or set precision: fp8"]
    if fp8 and spec.weights == "model" and given != BLOCKWISE:
        does = "none" if given is None else f"them otherwise ({given})"
        return [
            f"{field}: with precision: fp8 the trainer rounds weights in blocks, vLLM rounds {does}; set {BLOCKWISE}, "
            "or rollout.workers.weights: fp8"
        ]
    return []
