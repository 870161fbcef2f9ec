"""Seconds per GRPO step with rollouts beside the training (`rollout.ahead: 1`) and without, and what is learnt.

    python benchmarks/rollout_ahead.py [key=value ...] --model MODEL_FOLDER [--steps 20] [--seeds 0 1 2]

Each setting trains the same recipe in a process of its own, with one worker process that samples:
    ahead 0, pinned      trainer on one half of the cores, worker on the other: each idles while the other works
    ahead 1, pinned      the same halves, both at work
    ahead 0, all cores   trainer and worker take turns on all cores, as one would run it without `ahead`
The last one tells how much of the gain is left when pinning is no handicap to `ahead: 0`.

key=value change the recipe: `data.path=...`, `rollout.max_tokens=256`, `rollout.engine=vllm` together with
`rollout.workers.python=VENV/bin/python`. A model folder comes from `benchmarks/fetch_smollm2.py`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import common

PHASES = ("wait", "rollout", "train", "sync")
UNMEASURED = 2  # first steps: of `ahead: 1` the first rollout has no training beside it


def settings_of(cores: list[int]) -> list[dict[str, Any]]:
    """Name, steps ahead, and the cores of trainer and worker."""
    half = len(cores) // 2
    first, second = cores[:half], cores[half:]
    return [
        {"name": "ahead 0, pinned", "ahead": 0, "trainer": first, "worker": second},
        {"name": "ahead 1, pinned", "ahead": 1, "trainer": first, "worker": second},
        {"name": "ahead 0, all cores", "ahead": 0, "trainer": cores, "worker": cores},
    ]


def recipe_of(task: dict[str, Any]) -> dict[str, Any]:
    """Additions in a line of digits: short prompts, a verifier that takes no time, something to learn."""
    worker = task["worker"]
    threads = str(len(worker))
    return {
        "pipeline": "grpo",
        "output_dir": str(Path(task["scratch"]) / "run"),
        "seed": task["seed"],
        "threads": len(task["trainer"]),
        "model": {"path": task["model"]},
        "data": {"generator": {"families": ["addition"], "levels": [1], "count": 1000}, "template": "plain"},
        "rewards": [{"name": "math"}],
        "rollout": {
            "mode": "server",
            "ahead": task["ahead"],
            "max_tokens": 128,
            "workers": {
                "count": 1,
                "cores": [",".join(map(str, worker))],
                "env": {"OMP_NUM_THREADS": threads},
            },
        },
        "optimizer": {"learning_rate": 5e-6},
        "grpo": {
            "steps": task["steps"],
            "prompts_per_step": 8,
            "samples_per_prompt": 8,
            "correction": {"kind": "tis"},  # in every setting: the same objective
        },
        "checkpoint": {"every": 100_000},
        "log": {"samples_every": 0},
    }


def train(task: dict[str, Any]) -> dict[str, Any]:
    """One run, on the trainer's cores; its metrics."""
    os.sched_setaffinity(0, task["trainer"])
    import yaml

    from rl.check import preflight
    from rl.recipe_io import load_recipe
    from rl.run.metrics import read_metrics
    from rl.runner import run

    file = Path(task["scratch"]) / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(task), sort_keys=False))
    recipe = load_recipe(str(file), task["changes"])
    preflight(recipe)
    run(recipe)
    return {"metrics": [line for line in read_metrics(Path(recipe.output_dir)) if not line.get("evaluation")]}


def step_table(results: list[dict[str, Any]]) -> str:
    columns = ["setting", "step s", "min", "max", *(f"{phase} s" for phase in PHASES), "staleness"]
    rows = []
    for result in results:
        lines = [line for run in result["runs"] for line in run[UNMEASURED:]]
        steps = [line["time/step"] for line in lines]
        phases = [median(line.get(f"time/{phase}", 0.0) for line in lines) for phase in PHASES]
        seconds = [f"{s:.1f}" for s in (median(steps), min(steps), max(steps), *phases)]
        rows.append([result["name"], *seconds, f"{max(line.get('staleness/max', 0.0) for line in lines):g}"])
    return common.markdown_table(columns, rows)


def comparison(results: list[dict[str, Any]]) -> str:
    seconds = {r["name"]: median(line["time/step"] for run in r["runs"] for line in run[UNMEASURED:]) for r in results}
    ahead = seconds.pop("ahead 1, pinned")
    return (
        "A step with ahead 1: " + ", ".join(f"{s / ahead:.2f} times as fast as {n}" for n, s in seconds.items()) + "."
    )


def reward_table(results: list[dict[str, Any]], parts: int = 4) -> str:
    """Mean reward over seeds (± deviation) of each quarter of the steps."""
    columns = ["reward", *(f"quarter {i + 1}" for i in range(parts))]
    rows = []
    for result in results:
        cells = []
        for i in range(parts):
            means = []
            for run in result["runs"]:
                size = len(run) / parts
                means.append(fmean(line["reward"] for line in run[int(i * size) : int((i + 1) * size)]))
            cells.append(f"{fmean(means):.3f}" + (f" ± {stdev(means):.3f}" if len(means) > 1 else ""))
        rows.append([result["name"], *cells])
    return common.markdown_table(columns, rows)


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Reward over steps and over seconds; a thin line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for number, result in enumerate(results):
        for i, run in enumerate(result["runs"]):
            rewards = [line["reward"] for line in run]
            seconds = [sum(line["time/step"] for line in run[: n + 1]) for n in range(len(run))]
            for axis, x in zip(axes, ([line["step"] for line in run], seconds), strict=True):
                axis.plot(x, rewards, color=f"C{number}", lw=1, label=None if i else result["name"])
    for axis, label in zip(axes, ("step", "seconds"), strict=True):
        axis.set_xlabel(label)
    axes[0].set_ylabel("reward")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores at least are needed: one for the trainer, one for the worker")
    if arguments.steps <= UNMEASURED + 1:
        raise SystemExit(f"--steps must be above {UNMEASURED + 1}: the first {UNMEASURED} are not measured")
    shared = {"model": str(Path(arguments.model).resolve()), "steps": arguments.steps, "changes": arguments.changes}
    results = [{**setting, "runs": []} for setting in settings_of(cores)]
    for seed in arguments.seeds:  # turn about, against drift of the machine
        for result in results:
            threads = len(result["trainer"])
            task = {**shared, **{k: v for k, v in result.items() if k != "runs"}, "seed": seed, "threads": threads}
            result["runs"].append(common.run_worker(__file__, task)["metrics"])
    machine = common.machine(len(cores))
    print(f"{machine['cpu']}, {len(cores)} cores, torch {machine['torch']}; {len(arguments.seeds)} seed(s)\n")
    print(step_table(results), comparison(results), reward_table(results), sep="\n\n")
    if arguments.plot:
        plot(results, arguments.plot)
    common.write_json(arguments.json, {"settings": shared, "machine": machine, "results": results})


if __name__ == "__main__":
    parser = common.common_arguments(__doc__)
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plot", metavar="OUT", help="reward curves, as an image (needs matplotlib)")
    given = parser.parse_args()
    if given.worker:
        settings = json.loads(Path(given.worker).read_text())
        Path(settings["result"]).write_text(json.dumps(train(settings)))
    elif given.model is None:
        parser.error("--model is required")
    else:
        main(given)
