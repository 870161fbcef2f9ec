"""GRPO with rollouts ahead in one process: a LocalSampler over a copy of the policy stands for a worker.

As a script, `python ahead_runs.py RECIPE [key=value ...]`, what `python -m rl` is to the other recipes.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import recipes
from rl.grpo import GRPO
from rl.policy.processes import Processes
from rl.recipe_io import load_recipe, validate
from rl.rollout import LocalSampler


def own_sampler(training: GRPO, dtype: torch.dtype = torch.float32) -> LocalSampler:
    model = copy.deepcopy(training.policy.model).requires_grad_(False).to(dtype).eval()
    rollout = training.recipe.rollout
    return LocalSampler(model, training.tokenizer, max_slots=rollout.max_slots, slots=training.policy.packed)


def train(folder: Path, ahead: int, sampler: Any = own_sampler, **changes: Any) -> GRPO:
    """Runs the small recipe of the tests; `changes` are dotted."""
    torch.set_num_threads(1)  # as the script below: the last bits of sums depend on it
    recipe = recipes.grpo(folder, rollout__ahead=ahead, **changes)
    training = GRPO(validate(recipe), Processes(), sampler)
    training.run()
    return training


def samples(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """All that was trained on, by step."""
    files = sorted((folder / "samples").glob("step_*.parquet"))
    return {int(file.stem.removeprefix("step_")): pq.read_table(file).to_pylist() for file in files}


def tokens(folder: Path) -> dict[int, list[tuple[str, list[int]]]]:
    """(id of the problem, completion) of all samples, by step."""
    return {step: [(row["id"], row["token_ids"]) for row in rows] for step, rows in samples(folder).items()}


def versions(folder: Path) -> dict[int, set[int]]:
    return {step: {row["weights_version"] for row in rows} for step, rows in samples(folder).items()}


def launch_two(recipe: Path, *overrides: str) -> list[str]:
    """This script in two gloo processes; their outputs. Both must end well."""
    port = str(recipes.free_port())
    running = []
    for rank in ("0", "1"):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = recipes.environment(**names, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        running.append(
            subprocess.Popen(
                [sys.executable, __file__, str(recipe), *overrides],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    outputs = []
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    return outputs


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    GRPO(load_recipe(arguments[0], arguments[1:]), Processes(), own_sampler).run()


if __name__ == "__main__":
    main(sys.argv[1:])
