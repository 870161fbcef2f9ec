"""Checks of `rollout.ahead` before anything is loaded."""

from __future__ import annotations

from rl.recipe import GRPORecipe
from rl.recipe_io import RecipeError

NEEDS_A_SERVER = (
    "rollout.ahead needs a sampler with weights of its own: set rollout.mode: server, with rollout.workers, or ahead: 0"
)


def check_ahead(recipe: GRPORecipe) -> list[str]:
    rollout, grpo = recipe.rollout, recipe.grpo
    if not rollout.ahead:
        return []
    if rollout.mode != "server":
        raise RecipeError(NEEDS_A_SERVER)
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
