"""Checks of `rollout.ahead` before anything is loaded."""

from __future__ import annotations

from rl.recipe import GRPORecipe, GRPORolloutSpec
from rl.recipe_io import RecipeError


def check_ahead(recipe: GRPORecipe) -> list[str]:
    rollout, grpo = recipe.rollout, recipe.grpo
    if not rollout.ahead:
        return []
    check_sampler(rollout, own_weights=rollout.mode == "server", midway=rollout.engine == "vllm")
    warnings = []
    if grpo.correction.kind == "none" and grpo.old_logprobs == "trainer":
        warnings.append(
            f"rollout.ahead: samples are {rollout.ahead} step(s) old, and nothing corrects for it: π_old is the "
            "trainer's when a step begins, so its ratio does not see their age; set grpo.correction.kind: tis (or "
            "grpo.old_logprobs: sampler, whose ratio does)"
        )
    if rollout.ahead > 1 and not rollout.in_flight:
        warnings.append(
            "rollout.ahead: more than 1 only makes samples older, unless rollout.in_flight lets the trainer go on "
            "without waiting for a rollout's end"
        )
    return warnings


def check_sampler(rollout: GRPORolloutSpec, *, own_weights: bool, midway: bool) -> None:
    """What rollouts ahead ask of a sampler: of the one that the recipe names, and of the one that is there.

    own_weights: it has a copy, which training does not touch. midway: it takes new ones while it samples.
    """
    if not own_weights:
        raise RecipeError(
            "rollout.ahead needs a sampler with weights of its own: set rollout.mode: server, with rollout.workers, or "
            "ahead: 0"
        )
    if rollout.in_flight and not midway:
        raise RecipeError(
            "rollout.in_flight: this sampler takes weights between rollouts only; set rollout.engine: vllm, or "
            "in_flight: false"
        )
