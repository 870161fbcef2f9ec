"""What can be known of a distillation's sources before anything is asked or read as a whole."""

from __future__ import annotations

from itertools import islice

from data.errors import DataError
from data.problems import describe_problems
from data.trace_import import read_source
from data.trace_spec import TraceSource
from rewards.http_json import bearer
from rewards.language import language_share
from rl.recipe_distill import ApiTeacher, DistillRecipe, LocalTeacher
from rl.recipe_io import RecipeError

_TRIED = 20
TRACE_COLUMNS = ("id", "problem", "answer", "kind", "source")  # what rewards see of traces without problems


def check_source(spec: TraceSource) -> list[str]:
    """Raises RecipeError if the file is missing or none of its first rows is a trace; returns warnings."""
    if spec.hub is not None:
        return [f"traces.hub: {spec.hub} is fetched when the run starts"]
    try:
        rows = list(islice(read_source(spec), _TRIED))
    except DataError as error:
        raise RecipeError(f"traces.{error}" if error.field == "path" else f"traces: {error}") from error
    if all(isinstance(row, DataError) for row in rows):
        why = f"none of the first rows is of the shape {spec.adapter!r}; {rows[0]}" if rows else "there are no rows"
        raise RecipeError(f"traces.adapter: {why}")
    return []


def check_settings(recipe: DistillRecipe) -> list[str]:
    """Raises RecipeError for a language that is not known and a key that is not set; returns warnings."""
    try:
        if recipe.select.language is not None:
            language_share("", recipe.select.language)
    except ValueError as error:
        raise RecipeError(f"select.language: {error}") from error
    try:
        key = bearer(recipe.teacher.api_key_env) if isinstance(recipe.teacher, ApiTeacher) else {}
    except ValueError as error:
        raise RecipeError(f"teacher.{error}") from error
    if key and isinstance(recipe.teacher, ApiTeacher) and recipe.teacher.base_url.startswith("http://"):
        return ["teacher.base_url: the key travels over http, for everybody between here and there to read"]
    return []


def check_teacher(teacher: LocalTeacher, made: list[str]) -> list[str]:
    """Raises RecipeError for a model that is not here, and for workers that cannot serve it; returns warnings.

    made: models of earlier stages.
    """
    from rl.check import check_model
    from rl.check_rollout import check_temperature, check_workers

    warnings = check_model("teacher.model", teacher.model, made)
    if teacher.workers is None:
        return warnings
    warnings += check_workers("teacher.", teacher.engine, teacher.workers)
    if teacher.engine == "local":
        return warnings
    check_temperature("teacher.temperature", teacher.temperature)
    need, limit = teacher.max_prompt_tokens + teacher.max_tokens, teacher.workers.options.get("max_model_len")
    if isinstance(limit, int) and 0 < limit < need:
        raise RecipeError(
            f"teacher.workers.options.max_model_len: {limit} tokens are fewer than max_prompt_tokens + max_tokens = "
            f"{need}; raise it, or lower one of these"
        )
    if limit is None and teacher.workers.count:
        warnings += _check_positions(teacher, need, made)
    return warnings


def _check_positions(teacher: LocalTeacher, need: int, made: list[str]) -> list[str]:
    from rl.check_tables import config_of

    config = None if teacher.model.path in made else config_of(teacher.model, "teacher.model")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or need <= positions:
        return []
    return [
        f"teacher: max_prompt_tokens + max_tokens = {need}, beyond the {positions} positions of the model: vLLM may "
        "refuse to start; lower one"
    ]


def sampling_table(recipe: DistillRecipe) -> list[str]:
    """What a teacher will be asked for, for `rl check`."""
    from rl.check_rollout import source

    teacher, problems = recipe.teacher, _count(recipe)
    if teacher is None:
        return ["nothing is sampled: the traces exist"]
    lines = []
    if isinstance(teacher, LocalTeacher) and teacher.workers is not None:
        lines.append(f"workers                   {teacher.engine}, {source(teacher.workers)}")
    if problems is None:
        asked = f"traces asked for          {teacher.samples} of each problem; how many these are, only the run tells"
        return [*lines, asked]
    traces = problems * teacher.samples
    tokens = traces * teacher.max_tokens
    lines += [
        f"traces asked for          {problems} problems x {teacher.samples} samples = {traces}",
        f"completion tokens         {tokens:,} at most",
    ]
    if isinstance(teacher, ApiTeacher) and teacher.output_price is not None:
        lines.append(f"cost of completions       {tokens * teacher.output_price / 1e6:,.2f} at most")
    return lines


def _count(recipe: DistillRecipe) -> int | None:
    """Problems, as far as that is known without loading them: not of the hub, of a split or of an earlier stage."""
    if recipe.data is None:
        return None
    try:
        return describe_problems(recipe.data)[1] if recipe.data.hub is None else None
    except DataError:
        return None
