"""`rl check` for `pipeline: data`: files, columns, adapters, and what measures the difficulty."""

from __future__ import annotations

from data.curation.adapters import describe_source
from data.curation.spec import EvaluationSet, SourceSpec
from data.sources import count_rows
from data.templates import resolve_template
from rl.check import check_model, check_rewards
from rl.recipe_data import DataRecipe
from rl.recipe_io import RecipeError

# The columns that a reward sees of a curated problem.
COLUMNS = ["id", "problem", "answer", "kind", "source"]


def check_curation(recipe: DataRecipe, made: list[str]) -> list[str]:
    """Warnings; RecipeError for the first thing that is wrong. `made`: paths that earlier stages will have written."""
    warnings: list[str] = []
    named: list[tuple[str, SourceSpec | EvaluationSet]] = [
        *((f"sources.{i}", source) for i, source in enumerate(recipe.sources)),
        *((f"decontaminate.sets.{i}", one) for i, one in enumerate(recipe.decontaminate.sets)),
    ]
    for field, spec in named:
        if spec.hub is not None:
            warnings.append(f"{field}: {spec.hub} is on the hub; its columns are checked when the run starts")
        elif spec.path not in made:
            try:
                describe_source(spec)
            except ValueError as error:
                raise RecipeError(f"{field}: {error}") from error
    if recipe.difficulty is not None:
        warnings += check_model("difficulty.model", recipe.difficulty.model, made)
        code = [*COLUMNS, "tests", "setup"] if any(source.kind == "code" for source in recipe.sources) else COLUMNS
        check_rewards("difficulty.rewards", recipe.difficulty.rewards, code)
        resolve_template(recipe.difficulty.template)
    if not recipe.decontaminate.sets:
        warnings.append("decontaminate.sets is empty: no evaluation problem is looked for in the sources")
    return warnings


def source_table(recipe: DataRecipe) -> list[str]:
    """A line for each source and evaluation set that is here: its rows and its adapter."""
    lines = []
    for role, specs in (("source", recipe.sources), ("evaluation set", recipe.decontaminate.sets)):
        for spec in specs:
            try:
                shape = f"{count_rows(spec)} rows, adapter {describe_source(spec)}" if spec.hub is None else spec.hub
            except ValueError:  # what an earlier stage will have written
                shape = f"{spec.path}: not here yet"
            lines.append(f"{role:<15} {spec.name:<20} {shape}")
    return lines
