"""Stages: recipes run one after another, each fed by the ones before it, each skipped when it is complete."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.recipe import GRPORecipe, StagesRecipe, TrainSpec
from rl.recipe_data import DataRecipe
from rl.recipe_distill import DistillRecipe
from rl.recipe_gkd import GKDRecipe
from rl.recipe_io import RecipeError, merge, nearest, validate
from rl.run.folder import write_stages
from rl.run.progress import Progress

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong recipe should be told at once
    from rl.policy.backend import Processes

_REFERENCE = re.compile(r"\$\{([^.}]+)\.([^}]+)\}")


def stage_recipes(recipe: StagesRecipe, summaries: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The validated recipe of each stage. `${NAME.FIELD}` is filled in from the summaries of stages run so far,
    or, where none is given, by a value of the right kind (to check a recipe before anything has run)."""
    recipes: dict[str, Any] = {}
    for name, raw in recipe.stages.items():
        if not isinstance(raw, dict):
            raise RecipeError(f"stages.{name}: must be a mapping of recipe fields")
        known = summaries if summaries is not None else {n: _placeholders(r) for n, r in recipes.items()}
        if summaries is not None and any(n not in summaries for n in _names(raw) - {"values"}):
            break
        base = {"output_dir": str(Path(recipe.output_dir) / name), "seed": recipe.seed}
        try:
            recipes[name] = validate(_fill(merge(base, copy.deepcopy(raw)), {**known, "values": recipe.values}))
        except RecipeError as error:
            lines = str(error).splitlines()
            raise RecipeError("\n".join(f"stages.{name}.{line}" for line in lines)) from error
    return recipes


def run_stages(recipe: StagesRecipe, run_one: Callable[[Any], dict[str, Any]], processes: Processes) -> dict[str, Any]:
    """Runs each stage in order; prints a table of what each one reached."""
    progress = Progress(enabled=processes.rank == 0)
    stage_recipes(recipe)  # every stage is checked before the first one starts
    if processes.rank == 0:
        write_stages(recipe)
    summaries: dict[str, dict[str, Any]] = {}
    for name in recipe.stages:
        stage = stage_recipes(recipe, summaries)[name]
        progress.line(f"== stage {name}: {stage.pipeline} -> {stage.output_dir}")
        inputs = {n: summaries[n] for n in sorted(_names(recipe.stages[name]) & summaries.keys())}
        fed = Path(stage.output_dir) / "inputs.json"
        stale = fed.exists() and json.loads(fed.read_text()) != json.loads(json.dumps(inputs))
        if processes.gather(stale)[0]:  # the first process writes the file below, so it decides for all
            progress.line(f"the stages before {name} have changed: it starts over")
            if not isinstance(stage, DistillRecipe):  # whose journal knows by itself what of it still holds
                stage = stage.model_copy(update={"resume": "never"})
            elif processes.rank == 0:
                (Path(stage.output_dir) / "summary.json").unlink(missing_ok=True)
        if processes.rank == 0:
            fed.parent.mkdir(parents=True, exist_ok=True)
            fed.write_text(json.dumps(inputs))
        summaries[name] = run_one(stage)
    progress.table(f"{recipe.output_dir}", *stage_table(summaries))
    return {"pipeline": "stages", "stages": summaries}


def stage_table(summaries: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row for each stage and problem set that was evaluated."""
    rows = []
    for name, summary in summaries.items():
        results = summary.get("evaluation") or {}
        sets = sorted({key.split("/")[1] for key in results})
        for which in sets:
            get = {k.removeprefix(f"eval/{which}/"): v for k, v in results.items() if k.startswith(f"eval/{which}/")}
            k = int(get["samples"])
            rows.append(
                [
                    name,
                    which,
                    str(int(get["problems"])),
                    f"{get['avg']:.1%} ± {get['avg_se']:.1%} (k={k})",
                    f"{get[f'pass@{k}']:.1%}" if k > 1 else "",
                    f"{summary['seconds']:.0f}" if "seconds" in summary else "",
                ]
            )
    return ["stage", "problems", "n", "avg@k ± s.e.", "pass@k", "training s"], rows


def _names(value: Any) -> set[str]:
    """Stages that a value refers to."""
    if isinstance(value, dict):
        return {n for v in value.values() for n in _names(v)}
    if isinstance(value, list):
        return {n for v in value for n in _names(v)}
    return {m[1] for m in _REFERENCE.finditer(value)} if isinstance(value, str) else set()


def _fill(value: Any, known: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(value, dict):
        filled = {k: _fill(v, known) for k, v in value.items()}
        base = filled.pop("extends", None)
        if base is not None and not isinstance(base, dict):
            raise RecipeError(f"extends: {base!r} is not a mapping; name one, as in extends: ${{values.problems}}")
        return merge(base, filled) if base is not None else filled
    if isinstance(value, list):
        return [_fill(v, known) for v in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _fill(_lookup(whole, known), known)
    return _REFERENCE.sub(lambda match: str(_lookup(match, known)), value)


def _lookup(match: re.Match[str], known: Mapping[str, Mapping[str, Any]]) -> Any:
    stage, field = match[1], match[2]
    if stage not in known:
        raise RecipeError(f"{match[0]}: there is no earlier stage {stage!r}{nearest(stage, known)}")
    if field not in known[stage]:
        raise RecipeError(
            f"{match[0]}: stage {stage!r} has no {field!r}{nearest(field, known[stage])}; "
            f"it has {', '.join(sorted(known[stage]))}"
        )
    return known[stage][field]


def _placeholders(stage: Any) -> dict[str, Any]:
    """What the stage's summary will have, with values of the right kind."""
    if isinstance(stage, DistillRecipe):
        folder = Path(stage.output_dir)
        return {"pool": str(folder / "pool.parquet"), "traces": str(folder / "traces.parquet"), "kept": 1, "samples": 1}
    if isinstance(stage, DataRecipe):
        folder = Path(stage.output_dir)
        return {"problems": str(folder / "problems.parquet"), "card": str(folder / "card.md"), "kept": 1}
    if not isinstance(stage, TrainSpec):
        return {}
    fields = {"model": str(Path(stage.output_dir) / "model"), "seconds": 1.0, "updates": 1}
    return {**fields, "steps": 1} if isinstance(stage, GRPORecipe | GKDRecipe) else fields
