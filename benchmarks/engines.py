"""What is learnt on the quickstart's task with rollouts by the local sampler, by a worker of vLLM, and a step ahead.

    python benchmarks/engines.py OUT_FOLDER --python VENV/bin/python [--steps 60] [--seeds 0 1 2]

A small dense Llama gets the quickstart's cold start (two-digit additions of a teacher who errs). From there GRPO goes
on three times, with the same settings but for `rollout`: engine `local` in the trainer's process, `vllm` in a worker
that gets the weights after every step, and the same with `ahead: 1` and its correction. Reported: the mean reward of
each quarter of the steps, the accuracy on 500 held-out problems, and how far sampler and trainer are apart. Writes
rewards.png (needs the extra `bench`) and summary.json. Runs are ordinary recipes; a stage that is complete is not run
again. `--python` is one that has vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common
import yaml

ENGINES = ("local", "vllm", "vllm-ahead")  # stages
COLOURS = {"local": "tab:blue", "vllm": "tab:orange", "vllm-ahead": "tab:green"}
QUARTERS = 4
MISMATCH = ("mismatch/k3", "mismatch/max", "sync/probe")


def recipe(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Three stages: the cold start, and GRPO from it with either engine."""
    problems = {
        "generator": {"families": ["addition"], "levels": [2], "count": 6000, "seed": 1},
        "held_out": {"fraction": 0.1, "part": "train"},
        "template": "short-think",
    }
    evaluate = {
        "data": {**problems, "held_out": {"fraction": 0.1, "part": "held_out"}, "limit": 500},
        "temperature": 1.0, "top_p": 1.0, "max_tokens": 48, "max_slots": 512, "samples": 4,
    }  # fmt: skip
    scratch = {"layers": 3, "hidden_size": 128, "intermediate_size": 320, "heads": 4, "kv_heads": 2}
    start = {
        "pipeline": "sft",
        "model": {"scratch": scratch, "dtype": "float32"},
        "data": {**problems, "generator": {**problems["generator"], "slips": 0.55}},  # type: ignore[dict-item]
        "optimizer": {"learning_rate": 2e-3, "warmup_updates": 10, "schedule": "cosine"},
        "sft": {"steps": 360, "batch_size": 64},
        "evaluate": evaluate,
    }
    grpo = {
        "pipeline": "grpo",
        "model": {"path": "${start.model}", "dtype": "float32"},
        "data": problems,
        "rewards": [{"name": "math"}],
        "rollout": {"max_prompt_tokens": 64, "max_tokens": 48, "max_slots": 512},
        "optimizer": {"learning_rate": 2e-4, "warmup_updates": 10},
        "grpo": {
            "steps": options.steps, "prompts_per_step": 32, "samples_per_prompt": 8, "minibatches_per_step": 2,
            "loss": {"clip_high": 0.28},
        },
        "log": {"samples_every": 0},
        "evaluate": evaluate,
    }  # fmt: skip
    workers = {"count": 1, "python": str(options.python)}
    vllm = {**grpo, "rollout": {**grpo["rollout"], "engine": "vllm", "mode": "server", "workers": workers}}  # type: ignore[dict-item]
    ahead = {
        **vllm,
        "rollout": {**vllm["rollout"], "ahead": 1},  # type: ignore[dict-item]
        "grpo": {**grpo["grpo"], "correction": {"kind": "tis"}},  # type: ignore[dict-item]
    }
    return {
        "pipeline": "stages",
        "output_dir": str(options.out / f"seed-{seed}"),
        "seed": seed,
        "stages": {"start": start, "local": grpo, "vllm": vllm, "vllm-ahead": ahead},
    }


def train(seed: int, options: argparse.Namespace) -> None:
    path = options.out / f"seed-{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe(seed, options), sort_keys=False))
    with (options.out / f"seed-{seed}.log").open("w") as log:
        subprocess.run([sys.executable, "-m", "rl", str(path)], stdout=log, stderr=log, check=True)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if not row.get("evaluation")]


def accuracy(folder: Path) -> tuple[float, float]:
    """On the held-out problems, with its standard error."""
    found = json.loads((folder / "summary.json").read_text())["evaluation"]
    return found["eval/held_out/avg"], found["eval/held_out/avg_se"]


def quarters(rows: list[dict[str, Any]]) -> list[float]:
    size = len(rows) / QUARTERS
    return [fmean(row["reward"] for row in rows[int(i * size) : int((i + 1) * size)]) for i in range(QUARTERS)]


def summarise(seeds: list[int], out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"start": [accuracy(out / f"seed-{seed}" / "start") for seed in seeds]}
    for engine in ENGINES:
        folders = [out / f"seed-{seed}" / engine for seed in seeds]
        runs = [steps_of(folder) for folder in folders]
        found[engine] = {
            "accuracy": [accuracy(folder) for folder in folders],
            "quarters": [quarters(rows) for rows in runs],
            "reward": [[row["reward"] for row in rows] for rows in runs],
            "seconds": [fmean(row["time/step"] for row in rows) for rows in runs],
            "largest": {name: max(row.get(name, 0.0) for rows in runs for row in rows) for name in MISMATCH},
        }
        gaps = [b[0] - a[0] for a, b in zip(found["local"]["accuracy"], found[engine]["accuracy"], strict=True)]
        error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        found[engine]["above_local"] = {"mean": fmean(gaps), "se": error}
    return found


def tables(seeds: list[int], found: dict[str, Any]) -> str:
    columns = ["seed", "cold start", *(f"after GRPO, {engine}" for engine in ENGINES)]
    rows = []
    for i, seed in enumerate(seeds):
        values = [found["start"][i], *(found[engine]["accuracy"][i] for engine in ENGINES)]
        rows.append([str(seed), *(f"{mean:.1%} ± {error:.1%}" for mean, error in values)])
    parts = ["engine", *(f"quarter {i + 1}" for i in range(QUARTERS)), "step s", *(f"largest {m}" for m in MISMATCH)]
    lines = []
    for engine in ENGINES:
        by_quarter = list(zip(*found[engine]["quarters"], strict=True))
        spread = [f" ± {stdev(values):.3f}" if len(values) > 1 else "" for values in by_quarter]
        means = [f"{fmean(values):.3f}{error}" for values, error in zip(by_quarter, spread, strict=True)]
        largest = [f"{found[engine]['largest'][name]:.2g}" for name in MISMATCH]
        lines.append([engine, *means, f"{fmean(found[engine]['seconds']):.1f}", *largest])
    above = [above_local(engine, found[engine]["above_local"], len(seeds)) for engine in ENGINES[1:]]
    return "\n\n".join([common.markdown_table(columns, rows), *above, common.markdown_table(parts, lines)])


def above_local(engine: str, gap: dict[str, Any], pairs: int) -> str:
    error = "" if gap["se"] is None else f" ± {gap['se']:.1%} (s.e. of {pairs} pairs)"
    return f"{engine} above local: {gap['mean']:+.1%}{error}"


def draw(seeds: list[int], found: dict[str, Any], out: Path, window: int = 5) -> None:
    """Running means of the reward; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for engine in ENGINES:
        for i, rewards in enumerate(found[engine]["reward"]):
            smooth = [fmean(rewards[max(0, k - window + 1) : k + 1]) for k in range(len(rewards))]
            axes.plot(range(1, len(smooth) + 1), smooth, color=COLOURS[engine], lw=1, label=None if i else engine)
    axes.set(xlabel="step", ylabel=f"reward (mean of {window} steps)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "rewards.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of vLLM's environment")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        train(seed, options)
    found = summarise(options.seeds, options.out)
    (options.out / "summary.json").write_text(json.dumps(found, indent=1))
    print(tables(options.seeds, found))
    try:
        draw(options.seeds, found, options.out)
    except ImportError:
        print("matplotlib is not here (pip install 'r1forge[bench]'): no rewards.png")


if __name__ == "__main__":
    main()
