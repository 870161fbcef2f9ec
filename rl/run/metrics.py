"""`metrics.jsonl`, one line a step, and optional copies to wandb and TensorBoard."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from rl.recipe import LogSpec
from rl.run.checkpoint import write_file


class Metrics:
    """Appends {"step": n, name: number, ...} lines. Timings are named `time/...`: all else is reproducible."""

    def __init__(self, folder: Path, spec: LogSpec, recipe: dict[str, Any]):
        self.path = folder / "metrics.jsonl"
        self.wandb = self.tensorboard = None
        if spec.wandb:
            import wandb

            run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same when resumed
            self.wandb = wandb.init(
                project=spec.wandb, dir=folder, config=recipe, name=folder.name, id=run_id, resume="allow"
            )
        if spec.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def truncate(self, last_step: int) -> None:
        """Drops what comes after the checkpoint of last_step, and a line that a kill left unfinished.

        An evaluation of its own, at the end, comes after the checkpoint of the same step.
        """
        if not self.path.exists():
            return
        lines = [(line, json.loads(line)) for line in _whole_lines(self.path)]
        kept = [
            line
            for line, values in lines
            if values["step"] < last_step or (values["step"] == last_step and "evaluation" not in values)
        ]
        write_file(self.path, lambda p: p.write_text("".join(kept), encoding="utf-8"))

    def write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **{k: _plain(v) for k, v in values.items()}})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every complete line of a run's metrics."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _plain(value: Any) -> Any:
    """JSON has no NaN: None stands for a number that there was nothing to compute from."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
