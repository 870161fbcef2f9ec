"""Dispatch: one recipe, one pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rewards.cpus import share_of_cpus
from rl.policy.processes import Processes
from rl.recipe import EvalRecipe, GRPORecipe, SFTRecipe, StagesRecipe
from rl.recipe_data import DataRecipe
from rl.recipe_distill import DistillRecipe
from rl.recipe_gkd import GKDRecipe
from rl.run.allocator import keep_freed_memory
from rl.run.folder import Run
from rl.stages import run_stages


def run(recipe: Any) -> dict[str, Any]:
    """Runs a validated recipe in this process, as one of those that the launcher started."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    processes = Processes()
    if isinstance(recipe, StagesRecipe):
        summary = run_stages(recipe, lambda stage: run_pipeline(stage, processes), processes)
    else:
        summary = run_pipeline(recipe, processes)
    if processes.rank == 0:
        report(Path(recipe.output_dir))
    return summary


def report(folder: Path) -> None:
    """Writes the run's HTML report. What the run has made is safe by now: nothing that fails here may undo it."""
    from rl.report.command import write_report
    from rl.report.read import ReportError

    try:
        print(f"report: {write_report(folder)}")
    except ReportError as error:
        print(f"no report: {error}")


def run_pipeline(recipe: Any, processes: Processes) -> dict[str, Any]:
    # Processes that each take all cores spin against each other; a tiny model is fastest on one thread anyway.
    torch.set_num_threads(recipe.threads or share_of_cpus())
    if isinstance(recipe, DataRecipe):
        from rl.curate import run_curation

        return run_curation(recipe, processes)
    # The first process decides whether there is anything to do: the others might look when it has already begun.
    complete: dict[str, Any] | None = processes.gather(Run.completed(recipe))[0]
    if complete is not None:
        return complete
    if isinstance(recipe, GRPORecipe):
        from rl.grpo import run_grpo

        return run_grpo(recipe, processes)
    if isinstance(recipe, SFTRecipe):
        from rl.sft import run_sft

        return run_sft(recipe, processes)
    if isinstance(recipe, GKDRecipe):
        from rl.gkd import run_gkd

        return run_gkd(recipe, processes)
    if isinstance(recipe, EvalRecipe):
        from rl.evaluate import run_evaluation

        return run_evaluation(recipe, processes)
    if isinstance(recipe, DistillRecipe):
        from rl.distill.run import run_distill

        return run_distill(recipe, processes)
    raise TypeError(f"no pipeline for {type(recipe).__name__}")
