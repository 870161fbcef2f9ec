"""The folder of a run: recipe, metrics, samples, checkpoints, the final model and a summary."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rl import yaml_text
from rl.recipe import LogSpec
from rl.recipe_io import RecipeError, dump, validate
from rl.run.checkpoint import Checkpoints, write_file
from rl.run.metrics import Metrics
from rl.run.progress import Progress

STAGES = "stages.yaml"


class Run:
    """Everything a pipeline writes. Only the first process writes; the others may read."""

    def __init__(self, recipe: Any, rank: int, keep: int = 2):
        self.recipe, self.rank = recipe, rank
        self.folder = Path(recipe.output_dir)
        self.progress = Progress(enabled=rank == 0)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep)
        self.summary_path = self.folder / "summary.json"
        if rank == 0:
            self._open()
        log: LogSpec = recipe.log
        self.metrics = Metrics(self.folder, log, recipe.model_dump(mode="json")) if rank == 0 else None

    def _open(self) -> None:
        kept = self.folder / "recipe.yaml"
        if self.recipe.resume == "never" and kept.exists():
            for name in ("checkpoints", "samples", "evaluation", "model", "adapter", "tensorboard"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("metrics.jsonl", "summary.json"):
                (self.folder / name).unlink(missing_ok=True)
        elif kept.exists():
            changed = _difference(_read(kept), identity(self.recipe))
            # A longer run, other logging, checkpointing or workers may go on; anything else is another experiment.
            harmless = ("log", "checkpoint", "evaluate", "threads", "steps", "epochs", "max_seconds", "workers")
            wrong = [field for field in changed if not any(part in harmless for part in field.split("."))]
            if wrong:
                raise RecipeError(
                    f"output_dir: {self.folder} holds a run of another recipe (different: {', '.join(wrong[:5])}); "
                    "give another output_dir, or resume=never to start over (of a stage: stages.NAME.resume=never)"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.summary_path.unlink(missing_ok=True)  # a run that is begun, or made longer, is not complete
        write_file(kept, lambda p: p.write_text(identity(self.recipe), encoding="utf-8"))
        write_file(self.folder / "versions.json", lambda p: p.write_text(json.dumps(versions(), indent=1)))

    @staticmethod
    def completed(recipe: Any) -> dict[str, Any] | None:
        """The summary of a run of exactly this recipe that is complete, if it is to be resumed."""
        folder = Path(recipe.output_dir)
        summary, kept = folder / "summary.json", folder / "recipe.yaml"
        if recipe.resume != "auto" or not (summary.is_file() and kept.is_file()):
            return None
        if _read(kept) != identity(recipe):
            return None
        found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return found

    def rewind(self, step: int) -> None:
        """Forgets metrics and samples of steps after `step`: they are about to be made again."""
        if self.rank or self.metrics is None:
            return
        self.metrics.truncate(step)
        for path in (self.folder / "samples").glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def write_samples(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """All completions of a step or an evaluation, as Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(list(rows))
        write_file(path, lambda p: pq.write_table(table, p, compression="zstd"))

    def finish(self, summary: dict[str, Any]) -> None:
        """Writing the summary marks the run as complete."""
        if self.rank == 0:
            text = json.dumps(summary, indent=1)
            write_file(self.summary_path, lambda p: p.write_text(text, encoding="utf-8"))
            if self.metrics is not None:
                self.metrics.close()


def identity(recipe: Any) -> str:
    """The recipe as it is kept; how it was asked to resume is not part of what it is."""
    return dump(recipe.model_copy(update={"resume": "auto"}))


def _read(kept: Path) -> str:
    """A kept recipe as it would be kept today: fields that have come since then are at their defaults."""
    text = kept.read_text(encoding="utf-8")
    try:
        return identity(validate(yaml_text.parse(text)))
    except RecipeError:  # a field of it has gone, so it is another recipe; the text tells where
        return text


def write_stages(recipe: Any) -> None:
    """The recipe of a pipeline beside the folders of its stages: tells their order, and which are still to come."""
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / STAGES, lambda p: p.write_text(dump(recipe), encoding="utf-8"))


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {"python": sys.version.split()[0], "platform": platform.platform(), **found}


def _difference(old: str, new: str) -> list[str]:
    """Dotted fields in which two YAML documents differ."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}".lstrip(".")).items()}

    a, b = flat(yaml_text.parse(old)), flat(yaml_text.parse(new))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
