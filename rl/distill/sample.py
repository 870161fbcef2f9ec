"""Step 1: asking a teacher for the traces that the journal does not hold yet."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.traces import Trace, mended, sampling_settings, split_message
from rl.distill.api import Failed, Giveup, ask_all
from rl.distill.journal import Journal, Received, Wanted, missing, read_journals, read_keys
from rl.distill.plan import ApiPlan, Ask, plan_api, plan_local
from rl.distill.tally import Meter, Tally, kind_of
from rl.distill.verify import Pair
from rl.policy.processes import Processes
from rl.recipe_distill import ApiTeacher, DistillRecipe, LocalTeacher
from rl.recipe_io import RecipeError
from rl.run.progress import Progress


@dataclass(frozen=True)
class Sampled:
    pairs: list[Pair]
    tally: Tally
    tokenizer: Any  # the local teacher's; None of an API


def sample_teacher(recipe: DistillRecipe, folder: Path, processes: Processes, progress: Progress) -> Sampled:
    """Everything that the journal holds of what the recipe asks for, once the teacher has been asked for the rest."""
    assert recipe.data is not None and recipe.teacher is not None  # DistillRecipe: data comes with a teacher
    journals, tally = folder / "journal", Tally()
    if isinstance(recipe.teacher, LocalTeacher):
        local = plan_local(recipe, recipe.teacher, processes, progress)
        tally.over_long_prompts = local.over_long
        rows, wanted, tokenizer, ask = local.rows, local.wanted, local.tokenizer, local.ask
    else:
        plan = plan_api(recipe.data, recipe.teacher, recipe.seed)
        rows, wanted, tokenizer = plan.rows, plan.wanted, None

        def ask(left: Sequence[Wanted]) -> Generator[list[Received], None, None]:
            return _ask_api(plan, left if processes.rank == 0 else [], tally, stop=recipe.on_error == "stop")

    _collect(wanted, journals, ask, tally, processes, progress)
    return Sampled(_pairs(recipe, rows, wanted, journals, tally), tally, tokenizer)


def _collect(
    wanted: list[Wanted], journals: Path, ask: Ask, tally: Tally, processes: Processes, progress: Progress
) -> None:
    """Puts each batch on disk as it comes."""
    start = time.monotonic()
    left = missing(wanted, read_keys(journals))
    tally.asked, tally.known = len(wanted), len(wanted) - len(left)
    progress.line(f"sampling: {tally.asked} traces wanted, {tally.known} of them received before")
    processes.barrier()  # everybody has read before anybody writes
    meter = Meter(progress, tally)
    with Journal(journals, processes.rank) as journal, progress.phase("sampling"), closing(ask(left)) as batches:
        for batch in batches:
            journal.append(batch)
            tally.received += len(batch)
            meter.show()
    processes.barrier()
    tally.received = len(left) - len(missing(wanted, read_keys(journals)))  # by all processes
    tally.seconds = time.monotonic() - start


def _ask_api(
    plan: ApiPlan, left: Sequence[Wanted], tally: Tally, *, stop: bool
) -> Generator[list[Received], None, None]:
    """Responses and refusals; failures are counted, or stop the run once all that came with them is on disk."""
    giveup = Giveup(plan.teacher.max_concurrency)
    with closing(ask_all(plan.teacher, left, plan.payload)) as answers:
        for batch in answers:
            for answer in batch:
                tally.retried.update(kind_of(reason) for reason in answer.retried)
                if isinstance(answer.result, Failed):
                    tally.add_failure(answer.result.wanted, answer.result.reason, tally.failed)
            results = [answer.result for answer in batch]
            # A refusal that stops the run is not kept: the next one is to be stopped by it as well.
            yield [result for result in results if isinstance(result, Received) and not (stop and result.error)]
            for result in results:
                _check(result, giveup, stop)


def _check(result: Received | Failed, giveup: Giveup, stop: bool) -> None:
    """Raises RecipeError where asking on makes no sense, or is not wanted."""
    hopeless = isinstance(result, Failed) and result.hopeless
    error = result.reason if isinstance(result, Failed) else result.error
    if error is not None and (hopeless or stop):
        wanted = result.wanted if isinstance(result, Failed) else result
        fix = "mend the teacher's settings" if hopeless else "or set on_error: skip"
        raise RecipeError(
            f"teacher: {error} (problem {wanted.id}, sample {wanted.sample}); what was received is kept, so start "
            f"again, {fix}"
        )
    if giveup.add(result):
        reasons = ", ".join(f"{reason} ({count})" for reason, count in giveup.reasons.most_common(3))
        raise RecipeError(
            f"teacher.base_url: {giveup.limit} requests failed one after another: {reasons}; what was received is "
            "kept: see to the server and start again"
        )


def _pairs(
    recipe: DistillRecipe, rows: Mapping[str, Mapping[str, Any]], wanted: Sequence[Wanted], journals: Path, tally: Tally
) -> list[Pair]:
    """The traces in the order in which they were wanted; refusals and tokens are added to the tally."""
    found, pairs = read_journals(journals), []
    for trace in wanted:
        received = found.get(trace.key)
        if received is None:
            continue
        if received.error is not None:
            tally.add_failure(trace, received.error, tally.refused)
            continue
        tally.prompt_tokens += received.prompt_tokens or 0
        tally.completion_tokens += received.completion_tokens or 0
        pairs.append((_trace(recipe, rows[trace.id], received), rows[trace.id]))
    return pairs


def _trace(recipe: DistillRecipe, row: Mapping[str, Any], received: Received) -> Trace:
    thinking, answer = split_message({"content": received.content, "reasoning_content": received.reasoning})
    trace = Trace(
        id=received.id,
        sample=received.sample,
        prompt=row["problem"],
        thinking=thinking,
        answer=answer,
        gold=row["answer"],
        kind=row["kind"],
        prompt_tokens=received.prompt_tokens,
        teacher=teacher_name(recipe.teacher),
        sampling=_settings(recipe),
        source=row["source"],
        finish_reason=received.finish_reason,
    )
    return mended(trace)


def teacher_name(teacher: LocalTeacher | ApiTeacher | None) -> str:
    if isinstance(teacher, LocalTeacher):
        return teacher.model.path or "scratch"
    return teacher.model if teacher is not None else ""


def _settings(recipe: DistillRecipe) -> str:
    assert recipe.data is not None
    template = recipe.data.template
    settings = {name: getattr(recipe.teacher, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}
    shown = template if isinstance(template, str) else template.model_dump(mode="json")
    return sampling_settings(**settings, seed=recipe.seed, template=shown)
