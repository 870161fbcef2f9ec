"""Started by a launcher: runs training recipes one after another, and says what of the weights this process held."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rl.gkd import GKD
from rl.grpo import GRPO
from rl.policy import shards
from rl.policy.processes import Processes
from rl.recipe_io import load_recipe
from rl.sft import SFT
from rl.training import Training


def held(parameter: Any) -> int:
    """Numbers of a parameter in this process's memory between updates."""
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else shards.local(parameter).numel()


def train(path: Path, processes: Processes) -> Training:
    recipe = load_recipe(str(path), [])
    trainer = {"sft": SFT, "grpo": GRPO, "gkd": GKD}[recipe.pipeline](recipe, processes)
    if path.stem.startswith("poisoned"):
        poison(trainer)
    trainer.run()
    return trainer


def poison(trainer: Training) -> None:
    """The first loss of the last process is no number."""
    real, calls = trainer.backend.backward, []

    def backward(loss: torch.Tensor) -> None:
        calls.append(loss)
        last = trainer.processes.rank == trainer.processes.world - 1
        real(loss * float("nan") if last and len(calls) == 1 and trainer.updates == 0 else loss)

    trainer.backend.backward = backward


def main(*paths: str) -> None:
    torch.set_num_threads(1)
    processes = Processes()
    for path in map(Path, paths):
        trainer = train(path, processes)
        parameters = list(trainer.backend.model.parameters())
        found = {"held": sum(held(p) for p in parameters), "all": trainer.parameters}
        (trainer.folder.folder / f"held_{processes.rank}.json").write_text(json.dumps(found))
    processes.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
