"""What `rl check` knows of a distillation from a local teacher."""

from __future__ import annotations

import os

from rl.check import check_longest, check_model, check_positions
from rl.policy.load import is_local, load_tokenizer
from rl.policy.vocabulary import shared_vocabulary
from rl.recipe_gkd import GKDRecipe
from rl.recipe_io import RecipeError
from rl.recipe_model import ModelSpec


def check_distillation(recipe: GKDRecipe, made: list[str]) -> list[str]:
    """Teacher, vocabularies and batches; raises RecipeError, returns warnings. made: models of earlier stages."""
    spec, rollout = recipe.gkd, recipe.rollout
    warnings = check_model("teacher", recipe.teacher, made)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.prompts_per_step < world:
        raise RecipeError(
            f"gkd.prompts_per_step: {spec.prompts_per_step} prompts are fewer than the {world} processes; raise it"
        )
    if spec.prompts_per_step % world:
        warnings.append(f"gkd: {spec.prompts_per_step} prompts a step do not divide evenly over {world} processes")
    warnings += check_longest("gkd", spec.tokens_per_microbatch, rollout)
    for field, model in (("model", recipe.model), ("teacher", recipe.teacher)):
        warnings += check_positions(field, model, rollout, made)
    if _tokenizer_is_here(recipe.model, made) and _tokenizer_is_here(recipe.teacher, made):
        shared_vocabulary(load_tokenizer(recipe.model), load_tokenizer(recipe.teacher, "teacher"))
    if recipe.evaluate is None:
        warnings.append("evaluate: not given; nothing will be measured on held-out problems")
    return warnings


def distillation_batches(recipe: GKDRecipe) -> list[str]:
    spec, world = recipe.gkd, int(os.environ.get("WORLD_SIZE", "1"))
    size = spec.prompts_per_step * spec.samples_per_prompt
    return [
        f"completions per update    {spec.prompts_per_step} prompts x {spec.samples_per_prompt} samples = {size}, "
        f"or {size} solutions ({size / world:g} per process, {world} process(es))",
        f"on the student's samples  {spec.on_policy:.0%} of the steps",
        f"tokens per micro-batch    {spec.tokens_per_microbatch} at most, per process",
        f"in all                    {spec.steps} updates, {spec.steps * size} completions",
    ]


def _tokenizer_is_here(spec: ModelSpec, made: list[str]) -> bool:
    source = spec.tokenizer or spec.path
    return source is None or (source not in made and is_local(source))
