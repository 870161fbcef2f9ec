"""Markdown tables from finished `pipeline: stages` runs that differ in their seed.

python benchmarks/summarise_stages.py runs/quickstart-0 runs/quickstart-1 runs/quickstart-2

One of all stages' held-out accuracy, and one of what each quarter of the steps of reinforcement learning was like.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean


def rows_of(folder: Path) -> list[tuple[str, dict[str, float], float]]:
    """(stage, its held-out metrics, its training seconds), in the order in which the stages ran."""
    found = []
    for path in sorted(folder.glob("*/summary.json"), key=lambda p: p.stat().st_mtime):
        summary = json.loads(path.read_text())
        if "evaluation" not in summary:  # traces and data are not measured
            continue
        prefix = "eval/held_out/"
        metrics = {k.removeprefix(prefix): v for k, v in summary["evaluation"].items() if k.startswith(prefix)}
        found.append((path.parent.name, metrics, summary.get("seconds", math.nan)))
    return found


def mean_of(rows: Sequence[dict[str, float]], name: str) -> float:
    """Over the steps that have it: one without an informative group has no entropy."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else math.nan


def quarters_of(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, int, list[float]]]:
    """(stage, quarter from 1, means of these metrics over its steps) of the stages that have rewards."""
    for path in sorted(folder.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if "reward" in row and not row.get("evaluation")]
        for quarter in range(4) if len(rows) >= 4 else ():
            part = rows[quarter * len(rows) // 4 : (quarter + 1) * len(rows) // 4]
            yield path.parent.name, quarter + 1, [mean_of(part, name) for name in names]


def main(folders: list[str]) -> None:
    print("| run | stage | problems | avg@k ± s.e. | pass@k | maj@k | training s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for folder in map(Path, folders):
        for stage, m, seconds in rows_of(folder):
            k = int(m["samples"])
            more = [f"{m[name]:.1%} ± {m[f'{name}_se']:.1%}" if k > 1 else "" for name in (f"pass@{k}", f"maj@{k}")]
            average = f"{m['avg']:.1%} ± {m['avg_se']:.1%} (k={k})"
            cells = [folder.name, stage, f"{m['problems']:.0f}", average, *more, f"{seconds:.0f}"]
            print("| " + " | ".join(cells) + " |")
    print("\n| run | stage | quarter | reward | informative groups | tokens | truncated | entropy | step s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    names = ("reward", "groups/informative", "length/mean", "length/truncated", "entropy", "time/step")
    for folder in map(Path, folders):
        for stage, quarter, means in quarters_of(folder, names):
            reward, informative, length, truncated, entropy, seconds = means
            print(
                f"| {folder.name} | {stage} | {quarter} | {reward:.3f} | {informative:.0%} | {length:.0f} | "
                f"{truncated:.0%} | {entropy:.2f} | {seconds:.1f} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
