"""The quickstart's GRPO in bfloat16 and in FP8, from the same cold start: what is learnt, by seed.

    python benchmarks/fp8_grpo.py OUT_FOLDER [--seeds 0 1 2] [--workers 2]

The stages `cold-start` and `grpo` of recipes/quickstart.yaml, the second twice: in bfloat16 instead of float32, and
with `precision: fp8` besides. All of a seed's runs draw with the same random streams and see the same problems in the
same order. Reported: the mean reward of each quarter of the steps, accuracy on the 500 held-out problems, and how far
sampler and trainer are apart. Writes rewards.png (needs the extra `bench`) and summary.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import learning
import yaml

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PRECISIONS = ("bf16", "fp8")
COMPARISON = learning.Comparison(PRECISIONS, ("mismatch/k3", "mismatch/max"))


def recipe(seed: int, out: Path) -> dict[str, Any]:
    quickstart = yaml.safe_load(QUICKSTART.read_text())
    grpo = quickstart["stages"]["grpo"]
    model = {"path": "${start.model}", "dtype": "bfloat16"}
    variants = {precision: {**grpo, "model": model, "precision": precision} for precision in PRECISIONS}
    return {
        "pipeline": "stages",
        "output_dir": str(out / f"seed-{seed}"),
        "seed": seed,
        "values": quickstart["values"],
        "stages": {"start": quickstart["stages"]["cold-start"], **variants},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=common.cores(), help="seeds at a time, one thread each")
    given = parser.parse_args()
    learning.run_recipes({f"seed-{seed}": recipe(seed, given.out) for seed in given.seeds}, given.out, given.workers)
    COMPARISON.report(given.seeds, given.out)
