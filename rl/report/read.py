"""The folder of a run, or of a pipeline of runs, as plain data. Nothing here knows of HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rl.recipe_io import nearest
from rl.run.folder import STAGES
from rl.run.metrics import read_metrics

_LONGEST_DOCUMENT = 200_000  # characters of a data card or the like


class ReportError(ValueError):
    """The folder is no run, or a file of it cannot be read; the message says which and why."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one problem set after a step."""

    step: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class RunData:
    """One run: `grpo`, `sft`, `eval` or any other pipeline that keeps the same files."""

    name: str
    folder: Path
    pipeline: str = ""  # empty: nothing has been written yet
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics, one a step
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)  # by problem set
    summary: dict[str, Any] | None = None  # None: not complete
    documents: dict[str, str] = field(default_factory=dict)  # what it wrote for people, by file name

    @property
    def started(self) -> bool:
        return bool(self.pipeline)

    @property
    def complete(self) -> bool:
        return self.summary is not None


@dataclass(frozen=True)
class Report:
    """What a report is about: the runs in order, and of a pipeline its recipe."""

    name: str
    runs: list[RunData]
    stages: bool
    recipe_text: str = ""


def read_report(folder: Path) -> Report:
    """Reads a run, or a folder of runs. Raises ReportError."""
    name = folder.resolve().name
    if _is_run(folder):
        return Report(name, [read_run(folder, name)], stages=False)
    recipe_text = _text(folder / STAGES)
    if recipe_text:
        named = _mapping(_yaml(recipe_text, folder / STAGES).get("stages"))
        return Report(name, [read_run(folder / str(stage), str(stage)) for stage in named], True, recipe_text)
    found = [path for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    if not found:
        raise ReportError(_no_run(folder))
    # Without the pipeline's recipe the stages stand in the order in which they were begun.
    found.sort(key=lambda path: (_begun(path), path.name))
    return Report(name, [read_run(path, path.name) for path in found], stages=True)


def read_run(folder: Path, name: str) -> RunData:
    """A run in any state: not begun, under way, killed in the middle of a line, or complete."""
    if not _is_run(folder):
        return RunData(name, folder)
    recipe_text = _text(folder / "recipe.yaml")
    recipe = _yaml(recipe_text, folder / "recipe.yaml") if recipe_text else {}
    summary = _json(folder / "summary.json")
    lines = _metrics(folder)
    return RunData(
        name=name,
        folder=folder,
        pipeline=str(recipe.get("pipeline") or (summary or {}).get("pipeline") or "unknown"),
        recipe=recipe,
        recipe_text=recipe_text,
        versions={str(k): str(v) for k, v in (_json(folder / "versions.json") or {}).items()},
        training=[line for line in lines if "evaluation" not in line],
        evaluations=_evaluations(lines, summary),
        summary=summary,
        documents={path.name: _text(path)[:_LONGEST_DOCUMENT] for path in sorted(folder.glob("*.md"))},
    )


def number(value: Any) -> float | None:
    """A metric as a finite number; None for what is none (JSON's null, a list, a flag)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _evaluations(lines: list[dict[str, Any]], summary: Mapping[str, Any] | None) -> dict[str, list[Evaluation]]:
    found: dict[str, list[Evaluation]] = {}
    for line in lines:
        for name, metrics in _by_set(line).items():
            found.setdefault(name, []).append(Evaluation(line["step"], metrics))
    if not found:  # `eval` writes no metrics, only a summary
        found = {name: [Evaluation(0, m)] for name, m in _by_set(_mapping((summary or {}).get("evaluation"))).items()}
    return found


def _by_set(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`eval/SET/METRIC` by set and metric; a metric's name may hold slashes."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        if key.startswith("eval/") and key.count("/") > 1:
            _, name, metric = key.split("/", 2)
            found.setdefault(name, {})[metric] = number(value)
    return found


# ---- files ---------------------------------------------------------------------------------------


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "summary.json").is_file()


def _begun(folder: Path) -> float:
    recipe = folder / "recipe.yaml"
    return (recipe if recipe.is_file() else folder / "summary.json").stat().st_mtime


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"no folder {folder}{nearest(folder.name, beside)}"
    return f"{folder} is not the folder of a run: neither it nor a folder in it has a recipe.yaml or summary.json"


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    try:
        lines = read_metrics(folder)
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: {error}") from error
    for line in lines:
        if not isinstance(line, dict) or number(line.get("step")) is None:
            raise ReportError(f"{path}: a line is not a mapping with a number `step`: {str(line)[:80]}")
    return lines


def _text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise ReportError(f"{path}: {error}") from error


def _json(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    try:
        return _mapping(json.loads(text)) if text else None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error


def _yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ReportError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
