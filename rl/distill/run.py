"""`pipeline: distill`: the four steps in order, and the files that they leave."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

from data.select import select
from data.traces import pieces, write_traces
from rewards import load_reward
from rl.distill.importing import import_traces
from rl.distill.pool import write_pool
from rl.distill.report import report, summarise
from rl.distill.sample import Sampled, sample_teacher
from rl.distill.tally import Tally
from rl.distill.verify import Encode, verify
from rl.policy.load import load_tokenizer
from rl.policy.processes import Processes
from rl.recipe_distill import ApiTeacher, DistillRecipe
from rl.recipe_io import RecipeError
from rl.recipe_model import ModelSpec
from rl.run.checkpoint import write_file
from rl.run.folder import identity, versions
from rl.run.progress import Progress

POOL, TRACES, REPORT, SUMMARY = "pool.parquet", "traces.parquet", "report.md", "summary.json"


def run_distill(recipe: DistillRecipe, processes: Processes) -> dict[str, Any]:
    """Sampling is shared by all processes unless the teacher is asked by API; the rest is the first one's."""
    folder, progress = Path(recipe.output_dir), Progress(enabled=processes.rank == 0)
    if processes.rank == 0:
        _open(recipe, folder)
    processes.barrier()
    sampled = sample_teacher(recipe, folder, processes, progress) if recipe.teacher is not None else None
    summary = _finish(recipe, folder, sampled, progress) if processes.rank == 0 else None
    shared: dict[str, Any] = processes.gather(summary)[0]
    return shared


def _open(recipe: DistillRecipe, folder: Path) -> None:
    """What was received stays: the journal's keys tell what of it still is an answer to what the recipe asks. To start
    over puts it aside, as it may have been paid for."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "journal"
    if recipe.resume == "never" and journal.exists():
        journal.rename(next(p for n in count(1) if not (p := folder / f"journal.{n}").exists()))
    for name in (POOL, TRACES, REPORT, SUMMARY):
        (folder / name).unlink(missing_ok=True)
    write_file(folder / "recipe.yaml", lambda p: p.write_text(identity(recipe), encoding="utf-8"))
    write_file(folder / "versions.json", lambda p: p.write_text(json.dumps(versions(), indent=1)))


def _finish(recipe: DistillRecipe, folder: Path, sampled: Sampled | None, progress: Progress) -> dict[str, Any]:
    """Import (without a teacher), verify, select, write; the summary last, which marks the run as complete."""
    if sampled is not None:
        progress.line(sampled.tally.line())
        pairs, origin = sampled.pairs, {"sampling": {**sampled.tally.record(), **_cost(recipe, sampled.tally)}}
    else:
        imported = import_traces(recipe)
        progress.line(imported.line())
        pairs, origin = imported.pairs, {"import": imported.record()}
    encode, tokens_by = _encoding(recipe, sampled)
    rewards = [load_reward(spec) for spec in recipe.rewards]
    with progress.phase("verifying"):
        verified = verify(pairs, rewards, encode=encode, language=recipe.select.language, progress=progress)
    traces, stages = select(verified, recipe.select, seed=recipe.seed)
    kept = [trace for trace in traces if trace.dropped is None]
    summary = {
        "pipeline": "distill",
        "pool": str(folder / POOL),
        "traces": str(folder / TRACES),
        **summarise(traces, stages, tokens_by),
        **origin,
    }
    write_file(folder / TRACES, lambda p: write_traces(traces, p))
    write_file(folder / POOL, lambda p: write_pool(kept, p))
    write_file(folder / REPORT, lambda p: p.write_text(report(summary, traces), encoding="utf-8"))
    _show(progress, folder, summary)
    if not kept:
        worst = max(stages, key=lambda stage: stage.came - stage.kept)
        raise RecipeError(
            f"select: none of {len(traces)} traces is left; most went at {worst.name}: {folder / REPORT} tells why"
        )
    if sampled is not None and sampled.tally.failed:
        progress.line(f"{sampled.tally.failed.total()} traces are missing: the same command asks for them again")
    else:
        text = json.dumps(summary, indent=1)
        write_file(folder / SUMMARY, lambda p: p.write_text(text, encoding="utf-8"))
    return summary


def _encoding(recipe: DistillRecipe, sampled: Sampled | None) -> tuple[Encode, str]:
    """How to cut text into tokens, and the name of it."""
    tokenizer, name = (sampled.tokenizer if sampled else None), "the teacher's tokenizer"
    if recipe.tokenizer is not None:
        tokenizer, name = load_tokenizer(ModelSpec(path=recipe.tokenizer)), recipe.tokenizer
    if tokenizer is None:
        return pieces, "words, numbers and signs"
    return lambda text: tokenizer.encode(text, add_special_tokens=False), name


def _cost(recipe: DistillRecipe, tally: Tally) -> dict[str, float]:
    teacher = recipe.teacher
    if not isinstance(teacher, ApiTeacher) or (teacher.input_price is None and teacher.output_price is None):
        return {}
    bill = tally.prompt_tokens * (teacher.input_price or 0.0) + tally.completion_tokens * (teacher.output_price or 0.0)
    return {"cost": bill / 1e6}


def _show(progress: Progress, folder: Path, summary: dict[str, Any]) -> None:
    rows = [
        [stage["name"], str(stage["came"]), str(stage["came"] - stage["kept"]), str(stage["kept"])]
        for stage in summary["filters"]
    ]
    progress.table(str(folder), ["filter", "came", "left out", "kept"], rows)
    verdicts = ", ".join(f"{name} {count}" for name, count in summary["verdicts"].items())
    progress.line(
        f"verdicts: {verdicts}; kept {summary['kept']} of {summary['samples']} traces, "
        f"{summary['problems_kept']} of {summary['problems']} problems -> {folder / POOL}"
    )
