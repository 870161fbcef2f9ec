"""What benchmarks that train share: recipes as processes, and what runs of reinforcement learning learnt, by variant.

A benchmark's folder OUT has a stages run OUT/seed-N for each seed: a stage `start`, and GRPO from it in several
variants that differ in one thing. Runs are ordinary recipes, so one that is complete is not run again.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common
import yaml

QUARTERS = 4
COLOURS = ("tab:blue", "tab:orange", "tab:green")


def run_recipe(recipe: dict[str, Any], out: Path, name: str) -> None:
    """`python -m rl OUT/NAME.yaml`, with its output in OUT/NAME.log."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with (out / f"{name}.log").open("w") as log:
        subprocess.run([sys.executable, "-m", "rl", str(path)], stdout=log, stderr=log, check=True)


def run_recipes(recipes: dict[str, dict[str, Any]], out: Path, workers: int = 1) -> None:
    """Recipes by name, `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda item: run_recipe(item[1], out, item[0]), recipes.items()))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics by step, without evaluations."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if not row.get("evaluation")]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    return [fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def save_plot(draw: Callable[[Any], Any], path: Path) -> None:
    """`draw` gets matplotlib.pyplot and returns a figure. Without matplotlib a line says so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"matplotlib is not here (pip install 'r1forge[bench]'): no {path.name}")
        return
    figure = draw(plt)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclass(frozen=True)
class Comparison:
    """Stages of OUT/seed-N that differ in one thing; the first is what the others are compared with."""

    variants: tuple[str, ...]
    metrics: tuple[str, ...]  # of which the largest value over all steps is reported

    def summarise(self, seeds: Sequence[int], out: Path) -> dict[str, Any]:
        found: dict[str, Any] = {"start": [accuracy(out / f"seed-{seed}" / "start") for seed in seeds]}
        for variant in self.variants:
            folders = [out / f"seed-{seed}" / variant for seed in seeds]
            runs = [rows_of(folder) for folder in folders]
            found[variant] = {
                "accuracy": [accuracy(folder) for folder in folders],
                "quarters": [quarters(rows) for rows in runs],
                "reward": [[row["reward"] for row in rows] for rows in runs],
                "seconds": [fmean(row["time/step"] for row in rows) for rows in runs],
                "largest": {name: max(row.get(name, 0.0) for rows in runs for row in rows) for name in self.metrics},
            }
            pairs = zip(found[self.variants[0]]["accuracy"], found[variant]["accuracy"], strict=True)
            gaps = [other[0] - first[0] for first, other in pairs]
            found[variant]["above_first"] = {"mean": fmean(gaps), "se": standard_error(gaps)}
        return found

    def tables(self, seeds: Sequence[int], found: dict[str, Any]) -> str:
        """Markdown: accuracy by seed, mean differences of pairs, rewards by quarter with the deviation of seeds."""
        rows = []
        for i, seed in enumerate(seeds):
            values = [found["start"][i], *(found[variant]["accuracy"][i] for variant in self.variants)]
            rows.append([str(seed), *(f"{mean:.1%} ± {error:.1%}" for mean, error in values)])
        accuracies = common.markdown_table(["seed", "cold start", *self.variants], rows)
        gaps = [self._gap(variant, found[variant]["above_first"], len(seeds)) for variant in self.variants[1:]]
        parts = [f"quarter {i + 1}" for i in range(QUARTERS)]
        columns = ["reward", *parts, "step s", *(f"largest {name}" for name in self.metrics)]
        rewards = common.markdown_table(columns, [self._reward_row(v, found[v]) for v in self.variants])
        return "\n\n".join([accuracies, *gaps, rewards])

    def _gap(self, variant: str, gap: dict[str, Any], pairs: int) -> str:
        error = "" if gap["se"] is None else f" ± {gap['se']:.1%} (s.e. of {pairs} pairs)"
        return f"{variant} above {self.variants[0]}: {gap['mean']:+.1%}{error}"

    def _reward_row(self, variant: str, of: dict[str, Any]) -> list[str]:
        by_quarter = list(zip(*of["quarters"], strict=True))
        spread = [f" ± {stdev(values):.3f}" if len(values) > 1 else "" for values in by_quarter]
        means = [f"{fmean(values):.3f}{error}" for values, error in zip(by_quarter, spread, strict=True)]
        return [variant, *means, f"{fmean(of['seconds']):.1f}", *(f"{v:.2g}" for v in of["largest"].values())]

    def report(self, seeds: Sequence[int], out: Path) -> None:
        """Prints the tables; writes summary.json and rewards.png."""
        found = self.summarise(seeds, out)
        (out / "summary.json").write_text(json.dumps(found, indent=1))
        print(self.tables(seeds, found))
        save_plot(lambda plt: self.draw(plt, found), out / "rewards.png")

    def draw(self, plt: Any, found: dict[str, Any], window: int = 5) -> Any:
        """Running means of the reward; a line a seed."""
        figure, axes = plt.subplots(figsize=(7, 4))
        for variant, colour in zip(self.variants, COLOURS, strict=False):
            for i, rewards in enumerate(found[variant]["reward"]):
                label = None if i else variant
                axes.plot(
                    range(1, len(rewards) + 1), running_mean(rewards, window), color=colour, linewidth=1, label=label
                )
        axes.set(xlabel="step", ylabel=f"reward (mean of {window} steps)")
        axes.legend()
        return figure


def accuracy(folder: Path) -> tuple[float, float]:
    """On the held-out problems, with its standard error."""
    found = json.loads((folder / "summary.json").read_text())["evaluation"]
    return found["eval/held_out/avg"], found["eval/held_out/avg_se"]


def quarters(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Mean rewards of the quarters of a run."""
    size = len(rows) / QUARTERS
    return [fmean(row["reward"] for row in rows[int(i * size) : int((i + 1) * size)]) for i in range(QUARTERS)]
