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
from pathlib import Path
from typing import Any

import learning

ENGINES = learning.Comparison(("local", "vllm", "vllm-ahead"), ("mismatch/k3", "mismatch/max", "sync/probe"))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of vLLM's environment")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    recipes = {f"seed-{seed}": recipe(seed, options) for seed in options.seeds}
    learning.run_recipes(recipes, options.out)
    ENGINES.report(options.seeds, options.out)


if __name__ == "__main__":
    main()
