"""A Markdown table from finished `pipeline: stages` runs that differ in their seed.

python benchmarks/summarise_stages.py runs/quickstart-0 runs/quickstart-1 runs/quickstart-2
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


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


if __name__ == "__main__":
    main(sys.argv[1:])
