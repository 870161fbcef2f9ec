"""A tiny mixture of experts from scratch, balanced in four ways: loads and losses, paired by seed.

    python benchmarks/moe_balance.py OUT_FOLDER [--steps 400] [--seeds 0 1 2] [--workers 2]

Ways: `bias` (V3: biases, and the sequence-wise loss at 1e-4), `none`, and a pure auxiliary loss at 1e-3 (what the paper
on loss-free balancing compares with) and at 1e-2 (Switch Transformer's). Every way sees the same documents in the same
order from the same initial weights. Reported over the last tenth of the updates: the largest over the mean load (mean
over layers and updates) and the training loss, with differences to `bias` of the same seed and their standard error.
Runs are ordinary recipes; one that is complete is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import common
import learning

WAYS = {
    "bias": {"bias_speed": 0.001, "bias_until": 1.0, "sequence_loss": 1e-4},
    "none": {"bias_speed": 0.0, "sequence_loss": 0.0},
    "auxiliary 1e-3": {"bias_speed": 0.0, "sequence_loss": 1e-3},
    "auxiliary 1e-2": {"bias_speed": 0.0, "sequence_loss": 1e-2},
}


def recipe(way: str, seed: int, steps: int, folder: Path) -> dict[str, object]:
    return {
        "pipeline": "sft",
        "output_dir": str(folder),
        "seed": seed,
        "threads": 1,
        "model": {"scratch": {"preset": "tiny", "config": {"initializer_range": 0.02}}, "dtype": "float32"},
        "data": {"generator": {"levels": [1, 2], "count": 20000, "seed": seed}, "template": "short-think"},
        "optimizer": {"learning_rate": 2e-3, "warmup_updates": 20, "schedule": "cosine"},
        "sft": {"steps": steps, "batch_size": 32},
        "moe": WAYS[way],
        "checkpoint": {"every": 10 * steps},
    }


def name_of(way: str, seed: int) -> str:
    return f"{way.replace(' ', '-')}-{seed}"


def measure(way: str, seed: int, out: Path) -> tuple[float, float]:
    """(largest over mean load, loss) of the last tenth of the updates."""
    rows = learning.rows_of(out / name_of(way, seed))
    rows = rows[-len(rows) // 10 :]
    loads = [value for row in rows for name, value in row.items() if name.startswith("moe/max_over_mean/")]
    return mean(loads), mean(row["loss"] for row in rows)


def table(seeds: list[int], out: Path) -> str:
    found = {way: [measure(way, seed, out) for seed in seeds] for way in WAYS}
    rows = []
    for way, values in found.items():
        differences = [v[1] - b[1] for v, b in zip(values, found["bias"], strict=True)]
        error = learning.standard_error(differences)
        paired = "" if way == "bias" else f"{mean(differences):+.4f}" + ("" if error is None else f" ± {error:.4f}")
        loads = [v[0] for v in values]
        rows.append([way, f"{mean(loads):.2f}", f"{max(loads):.2f}", f"{mean(v[1] for v in values):.4f}", paired])
    columns = ["way", "max/mean load", "of the worst seed", "loss, nats", "loss minus that of bias"]
    return common.markdown_table(columns, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=common.cores(), help="runs at a time, one thread each")
    given = parser.parse_args()
    jobs = [(way, seed) for seed in given.seeds for way in WAYS]
    recipes = {name_of(*job): recipe(*job, given.steps, given.out / name_of(*job)) for job in jobs}
    learning.run_recipes(recipes, given.out, given.workers)
    print(table(given.seeds, given.out))
