"""What a run is and what it reached, as rows: the table at the top of a report and the facts of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.report.read import Evaluation, RunData, number

COLUMNS = (
    "stage", "kind", "state", "steps", "updates", "time", "problems", "n", "k", "at the start", "avg@k ± s.e.",
    "pass@k", "maj@k",
)  # fmt: skip
_RUN = 6  # columns that tell of the run; the others tell of one of its problem sets
_NO_FACT = ("pipeline", "recipe", "content")  # of a summary: told elsewhere, or long


@dataclass(frozen=True)
class Overview:
    """A table: for each run its rows, one for each problem set (or one). The first `of_run` columns are the same in
    all rows of a run."""

    columns: list[str]
    of_run: int
    bodies: list[list[list[str]]]


def overview(runs: Sequence[RunData], named: bool) -> Overview:
    """Without columns that have no value; `named`: with the name of each run."""
    bodies = [_rows(run) for run in runs]
    used = [i for i in range(0 if named else 1, len(COLUMNS)) if any(row[i] for rows in bodies for row in rows)]
    return Overview(
        [COLUMNS[i] for i in used],
        sum(i < _RUN for i in used),
        [[[row[i] for i in used] for row in rows] for rows in bodies],
    )


def state(run: RunData) -> str:
    """Whether it is done, and if not how far it has come."""
    if run.complete:
        return "complete"
    if not run.started:
        return "not begun"
    planned = _at(run.recipe, f"{run.pipeline}.steps")
    done = max((int(line["step"]) for line in run.training), default=0)
    return f"unfinished, step {done}" + (f" of {planned}" if planned else "")


def facts(run: RunData) -> list[tuple[str, str]]:
    """Name and value of what distinguishes the run: from its recipe, then what its summary says of its outcome."""
    recipe = run.recipe
    told = [
        ("pipeline", run.pipeline),
        ("state", state(run)),
        ("model", _model(_map(recipe.get("model")))),
        ("data", _source(_map(recipe.get("data") or recipe.get("texts")))),
        ("rewards", ", ".join(_reward(reward) for reward in _maps(recipe.get("rewards")))),
        ("batch", _batch(recipe)),
        ("learning rate", _number(_at(recipe, "optimizer.learning_rate"))),
        ("seed", _number(recipe.get("seed"))),
    ]
    skipped = {*(name for name, _ in told), *_NO_FACT, "steps", "updates", "seconds"}
    outcome = [
        (name.replace("_", " "), str(value) if isinstance(value, str) else _number(value))
        for name, value in (run.summary or {}).items()
        if name not in skipped and isinstance(value, str | int | float)
    ]
    return [(name, value) for name, value in [*told, *outcome] if value]


def seconds(value: float | None) -> str:
    """As a person says it: 42 s, 12 min, 3.4 h."""
    if value is None:
        return ""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _rows(run: RunData) -> list[list[str]]:
    summary = run.summary or {}
    spent = number(summary.get("seconds"))
    if spent is None and run.training:
        spent = sum(number(line.get("time/step")) or 0.0 for line in run.training)
    steps = summary.get("steps") or (len(run.training) if run.pipeline == "grpo" else None)
    updates = summary.get("updates") or (len(run.training) if run.pipeline == "sft" else None)
    head = [run.name, run.pipeline, state(run), _number(steps), _number(updates), seconds(spent)]
    return [[*head, *_result(name, points)] for name, points in run.evaluations.items()] or [
        [*head, *[""] * (len(COLUMNS) - _RUN)]
    ]


def _result(name: str, points: Sequence[Evaluation]) -> list[str]:
    last, first = points[-1].metrics, points[0]
    k = int(last.get("samples") or 1)
    start = first.metrics if len(points) > 1 and first.step == 0 else {}
    return [
        name,
        _number(last.get("problems")),
        str(k),
        _share(start, "avg"),
        _share(last, "avg"),
        _share(last, f"pass@{k}"),
        _share(last, f"maj@{k}"),
    ]


def _share(metrics: Mapping[str, float | None], name: str) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return ""
    return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")


def _model(spec: Mapping[str, Any]) -> str:
    scratch = _map(spec.get("scratch"))
    if scratch:
        return f"random weights: {scratch.get('preset') or scratch.get('family') or 'llama'}"
    return " @ ".join(str(spec[name]) for name in ("path", "revision") if spec.get(name))


def _source(spec: Mapping[str, Any]) -> str:
    for name in ("path", "hub"):
        if spec.get(name):
            return str(spec[name])
    families = _map(spec.get("generator")).get("families")
    return f"generated: {', '.join(map(str, families))}" if isinstance(families, list) else ""


def _reward(spec: Mapping[str, Any]) -> str:
    weight = spec.get("weight", 1.0)
    return f"{spec.get('name') or spec.get('path')}" + ("" if weight == 1 else f" × {_number(weight)}")


def _batch(recipe: Mapping[str, Any]) -> str:
    if recipe.get("pipeline") in ("grpo", "gkd"):
        spec = _map(recipe.get(str(recipe["pipeline"])))
        return f"{spec.get('prompts_per_step')} prompts × {spec.get('samples_per_prompt')} samples a step"
    size = _at(recipe, "sft.batch_size")
    return f"{size} documents an update" if size else ""


def _at(value: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        value = _map(value).get(name)
    return value


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _maps(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _number(value: Any) -> str:
    found = number(value)
    if found is None:
        return ""
    return f"{int(found):,}" if found == int(found) and abs(found) < 1e15 else f"{found:.4g}"
