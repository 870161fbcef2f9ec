"""`pipeline: data`: raw problem files to a clean problem set, as Parquet with a data card.

The filters are pure and live in `data/curation/`; here are the files around them and the filter that needs a model.
Everything but the samples is made anew in each run, in a minute or so, and is the same, byte for byte, for the same
inputs. Samples are kept (see rl/difficulty.py), so a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data.curation.adapters import read_source, read_statements, short_place
from data.curation.card import write_card
from data.curation.contamination import ContaminationIndex, EvaluationProblem
from data.curation.output import content_hash, records, write_parquet
from data.curation.pipeline import Count, Curated, apply_filters
from data.curation.problem import Dropped, Problem
from data.errors import DataError
from data.sources import find_files
from rl.policy.processes import Processes
from rl.recipe_data import DataRecipe
from rl.recipe_io import RecipeError
from rl.run.checkpoint import write_file
from rl.run.progress import Progress

OUTPUTS = ("problems.parquet", "card.md", "dropped.jsonl", "summary.json")
RESULTS = "difficulty.jsonl"


def run_curation(recipe: DataRecipe, processes: Processes) -> dict[str, Any]:
    """Curates, or returns the summary of a finished run of the same recipe on the same inputs."""
    folder = Path(recipe.output_dir)
    progress = Progress(enabled=processes.rank == 0)
    inputs = input_hashes(recipe)
    # The first process decides for all: the others might look when it has already begun.
    done: dict[str, Any] | None = processes.gather(_finished(recipe, folder, inputs))[0]
    if done is not None:
        progress.line(f"{folder} is complete: {done['kept']} problems")
        return done
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*OUTPUTS, *([RESULTS] if recipe.resume == "never" else [])):
            (folder / name).unlink(missing_ok=True)
    curated, rows_read, evaluation = filtered(recipe, progress)
    rates = _measure(recipe, curated, folder, processes, progress)
    if not curated.problems:
        reasons = ", ".join(f"{c.filter} {c.read - c.kept}" for c in curated.counts if c.read > c.kept)
        raise RecipeError(f"sources: no problem is left of {sum(rows_read.values())} (dropped: {reasons})")
    rows = records(curated.problems, rates)
    summary: dict[str, Any] = {
        "pipeline": "data",
        "problems": str(folder / "problems.parquet"),
        "card": str(folder / "card.md"),
        "read": sum(rows_read.values()),
        "kept": len(rows),
        "content": content_hash(rows),
        "counts": [asdict(count) for count in curated.counts],
        "recipe": _identity(recipe),
        "inputs": inputs,
    }
    if processes.rank == 0:
        card = write_card(
            recipe.title, recipe.sources, rows_read, curated, evaluation, _settings(recipe), summary["content"]
        )
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in curated.dropped)
        write_file(folder / "problems.parquet", lambda path: write_parquet(rows, path))
        write_file(folder / "card.md", lambda path: path.write_text(card, encoding="utf-8"))
        write_file(folder / "dropped.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
        text = json.dumps(summary, indent=1)
        write_file(folder / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
        progress.table(
            str(folder), ["filter", "in", "out"], [[c.filter, str(c.read), str(c.kept)] for c in curated.counts]
        )
    processes.gather(None)  # a later stage may read the files in any process
    return summary


def filtered(recipe: DataRecipe, progress: Progress) -> tuple[Curated, dict[str, int], dict[str, int]]:
    """The problems that pass the pure filters, the rows of each source, and the problems of each evaluation set."""
    curated, rows_read = _read(recipe, progress)
    specs = recipe.decontaminate.sets
    statements = [
        EvaluationProblem(spec.name, place, statement) for spec in specs for place, statement in read_statements(spec)
    ]
    evaluation = ContaminationIndex(statements, recipe.decontaminate) if specs else None
    sizes = Counter(statement.set for statement in statements)
    apply_filters(curated, recipe.filters, recipe.duplicates, evaluation, progress.bar)
    return curated, rows_read, {spec.name: sizes[spec.name] for spec in specs}


def _read(recipe: DataRecipe, progress: Progress) -> tuple[Curated, dict[str, int]]:
    problems: list[Problem] = []
    dropped: list[Dropped] = []
    rows_read: dict[str, int] = {}
    for i, source in enumerate(recipe.sources):
        bad: list[DataError] = []

        def on_bad(error: DataError, bad: list[DataError] = bad, field: str = f"sources.{i}") -> None:
            if recipe.on_error == "stop":
                raise RecipeError(f"{field}: {error} (or set on_error: skip)")
            bad.append(error)

        try:
            found = list(read_source(source, on_bad))
        except DataError as error:
            raise RecipeError(f"sources.{i}: {error}") from error
        problems += found
        dropped += [
            Dropped("rows", e.reason.partition(" (")[0], e.reason, source.name, short_place(e.field)) for e in bad
        ]
        rows_read[source.name] = len(found) + len(bad)
        progress.line(f"{source.name}: {len(found)} problems, {len(bad)} bad rows")
    return Curated(problems, dropped, [Count("rows", len(problems) + len(dropped), len(problems))]), rows_read


def _measure(
    recipe: DataRecipe, curated: Curated, folder: Path, processes: Processes, progress: Progress
) -> list[float] | None:
    """Filters by difficulty in place; the pass rates of what is left, if the recipe asks for them."""
    spec = recipe.difficulty
    if spec is None or not curated.problems:
        return None
    from rl.difficulty import Difficulty, in_band

    measured = Difficulty(spec, recipe.seed, folder / RESULTS, processes).outcomes(curated.problems, progress)
    outcomes = [in_band(problem, rate, spec) for problem, rate in zip(curated.problems, measured, strict=True)]
    kept = [rate for rate, outcome in zip(measured, outcomes, strict=True) if isinstance(outcome, Problem)]
    curated.settle("difficulty", outcomes)
    return [rate for rate in kept if isinstance(rate, float)]


def input_hashes(recipe: DataRecipe) -> dict[str, list[str]]:
    """What the sources and evaluation sets hold, by name: SHA-256 of files, id and revision on the hub."""
    found: dict[str, list[str]] = {}
    for role, specs in (("sources", recipe.sources), ("decontaminate", recipe.decontaminate.sets)):
        for spec in specs:
            if spec.path is not None:
                found[f"{role}.{spec.name}"] = [_sha256(path) for path in find_files(spec.path)]
            else:
                found[f"{role}.{spec.name}"] = [f"{spec.hub or spec.generator}@{spec.revision}"]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finished(recipe: DataRecipe, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    if recipe.resume != "auto" or not all((folder / name).is_file() for name in OUTPUTS):
        return None
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    same = summary["recipe"] == _identity(recipe) and summary["inputs"] == inputs
    return summary if same else None


def _identity(recipe: DataRecipe) -> str:
    return hashlib.sha256(_settings(recipe).encode()).hexdigest()


def _settings(recipe: DataRecipe) -> str:
    """What the result depends on, as YAML, without the folders of this machine: inputs are known by their hashes."""
    settings = recipe.model_dump(mode="json", exclude={"output_dir", "resume", "threads"}, exclude_none=True)
    for spec in [*settings["sources"], *settings["decontaminate"]["sets"]]:
        if "path" in spec:
            paths = [spec["path"]] if isinstance(spec["path"], str) else spec["path"]
            spec["path"] = [Path(path).name for path in paths]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
