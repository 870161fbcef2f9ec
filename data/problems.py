"""`load_problems`: every source in one shape, with errors that say where, why and what to do."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from data.answers import canonical_integer, clean_answer, last_boxed, split_gsm8k
from data.errors import DataError, did_you_mean
from data.sources import Row, count_rows, read_rows
from data.spec import GeneratorSpec, HeldOutSpec, Kind, ProblemSpec
from data.split import held_out, normalise_statement
from data.templates import TemplateSpec, resolve_template, to_messages

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

OUR_COLUMNS = ("id", "prompt", "problem", "answer", "kind", "source")
# The source columns tried, in order, for a name that is left out or "auto". Only unambiguous ones: a
# `solution` may be a worked one, so it is never taken for an answer. Reasoning must be asked for.
USUAL_COLUMNS = {
    "prompt": ("prompt", "problem", "question", "Problem", "query"),
    "answer": ("answer", "final_answer", "expected_answer", "Answer"),
    "reasoning": ("reasoning", "solution", "thinking"),
}


def load_problems(spec: Mapping[str, Any] | ProblemSpec) -> "Dataset":
    """Load problems as a data set with these columns, then every other column of the source unchanged:

    - `id` (str): unique; without a mapped column a hash of source and normalised statement
    - `prompt` (chat messages): the statement in the template; messages in the source are kept as they are
    - `problem` (str): the bare statement
    - `answer` (str): cleaned; "" for code problems without one
    - `kind` ("integer" | "math" | "code") and `source` (str)
    - `reasoning` (str or None): only where the source has one

    A source column whose name clashes with one of ours is kept as `source_<name>`.

    Raises DataError: bad spec, missing file or column, unreadable or bad row, nothing left.
    """
    spec = _as_spec(spec)
    raw = list(read_rows(spec))
    columns = find_columns(raw, spec)
    gsm8k = is_gsm8k(raw, columns, spec)
    rows: list[dict[str, Any]] = []
    skipped: list[DataError] = []
    for row in raw:
        try:
            rows.append(shape_row(row, columns, spec, gsm8k))
        except DataError as error:
            if spec.on_error == "stop":
                raise
            skipped.append(error)
    if skipped:
        logger.warning("skipped %d of %d rows; the first: %s", len(skipped), len(raw), skipped[0])
    _make_ids(rows, mapped="id" in columns)
    return _to_dataset(_select(rows, spec, len(raw)))


def describe_problems(spec: Mapping[str, Any] | ProblemSpec) -> tuple[list[str], int | None]:
    """(column names, number of rows) of what `load_problems` would give, for checks before a run.

    The columns come from the first hundred rows; DataError as `load_problems` raises it, as far as these
    show it. The number is None for a hub data set and where rows may be dropped (`held_out`,
    `on_error: skip`). A generator's count is taken at its word.
    """
    spec = _as_spec(spec)
    sampled = spec
    if spec.generator is not None:
        few = spec.generator.model_copy(update={"count": min(spec.generator.count, 100)})
        sampled = spec.model_copy(update={"generator": few})
    raw = list(islice(read_rows(sampled, streaming=True), 100))
    columns = find_columns(raw, spec)
    gsm8k = is_gsm8k(raw, columns, spec)
    names = dict.fromkeys(OUR_COLUMNS)
    for row in raw:
        try:
            names |= dict.fromkeys(shape_row(row, columns, spec, gsm8k))
        except DataError:
            if spec.on_error == "stop":
                raise
    known = spec.held_out is None and spec.on_error == "stop"
    count = count_rows(spec) if known else None
    return list(names), count if count is None or spec.limit is None else min(count, spec.limit)


def find_columns(rows: Iterable[Row], spec: ProblemSpec) -> dict[str, str]:
    """Our name -> source column, for all names that are mapped or found; DataError for a missing one."""
    available = list(dict.fromkeys(name for row in rows for name in row.values))
    if not available:
        raise DataError("problems", "the source has no rows", "Check the path or the split.")
    there = f"the source has {', '.join(available)}"
    columns: dict[str, str] = {}
    for ours, theirs in ({"prompt": "auto", "answer": "auto"} | spec.columns).items():
        if theirs != "auto" or ours not in USUAL_COLUMNS:
            if theirs not in available and theirs.partition(".")[0] not in available:
                hint = did_you_mean(theirs, available) or "Name one of these."
                raise DataError(f"columns.{ours}", f"there is no column {theirs!r}; {there}", hint)
            columns[ours] = theirs
            continue
        usual = [name for name in USUAL_COLUMNS[ours] if name in available]
        if usual:
            columns[ours] = usual[0]
        elif not (ours == "answer" and (spec.kind == "code" or "kind" in spec.columns)):
            tried = ", ".join(USUAL_COLUMNS[ours])
            raise DataError(f"columns.{ours}", f"no column is named {tried}; {there}", f"Map {ours} to one.")
    return columns


def shape_row(row: Row, columns: Mapping[str, str], spec: ProblemSpec, gsm8k: bool) -> dict[str, Any]:
    """One row with our columns (the id still empty unless mapped) and its extras; DataError if it is bad."""
    get = {ours: cell(row.values, theirs) for ours, theirs in columns.items()}
    template = resolve_template(spec.template)
    tests = _shown_tests(get.get("tests"), row.place) if "{tests}" in template.user else ""
    problem, prompt = _read_prompt(get.pop("prompt"), row.place, template, tests)
    kind = get.pop("kind", spec.kind)
    if kind is not None and kind not in get_args(Kind):
        raise DataError(row.place, f"kind is {kind!r}", f"Use one of {', '.join(get_args(Kind))}.")
    answer, reasoning = _read_answer(get.pop("answer", None), row.place, kind, spec, gsm8k)
    shaped = {
        "id": clean_answer(get.pop("id", None)),
        "prompt": prompt,
        "problem": problem,
        "answer": answer,
        "kind": kind or ("integer" if canonical_integer(answer) is not None else "math"),
        "source": str(get.pop("source", None) or spec.source or row.source),
    }
    if reasoning is not None:
        shaped["reasoning"] = reasoning
    shaped |= get  # an explicit columns.reasoning wins over what the answer column holds
    for name, value in row.values.items():
        if name in columns.values():
            continue
        kept = name
        while kept in shaped or (kept != name and kept in row.values):
            kept = f"source_{kept}"
        shaped[kept] = value
    return shaped


def _shown_tests(value: Any, place: str) -> str:
    """Tests as a prompt shows them: one assert statement a line."""
    if not isinstance(value, list) or not value or not all(isinstance(test, str) for test in value):
        reason = "the template shows {tests}, and the column tests is no list of statements"
        raise DataError(place, reason, "Map columns.tests to one, such as MBPP's test_list, or use template: code.")
    return "\n".join(test.strip() for test in value)


def _read_prompt(value: Any, place: str, template: TemplateSpec, tests: str) -> tuple[str, list[dict[str, Any]]]:
    """(statement, messages). Ready-made messages pass unchanged; their last turn is the statement."""
    if isinstance(value, str) and value.strip():
        return value.strip(), to_messages(value.strip(), template, tests)
    if not value or isinstance(value, str):
        raise DataError(place, "the prompt is missing or empty", "Mend the row, or set on_error: skip.")
    messages_ok = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not messages_ok or not value[-1]["content"].strip():
        reason = "the prompt is neither text nor a list of messages with role and content"
        raise DataError(place, reason, "Map columns.prompt to another column, or set on_error: skip.")
    return value[-1]["content"].strip(), value


def _read_answer(value: Any, place: str, kind: str | None, spec: ProblemSpec, gsm8k: bool) -> tuple[str, str | None]:
    """(clean answer, reasoning that the answer column holds besides it)."""
    reasoning = None
    if isinstance(value, dict | list):
        reason = f"the answer is a {type(value).__name__}, not a text or a number"
        raise DataError(place, reason, "Reach into it with a dot, as in columns.answer: reward_model.ground_truth.")
    if gsm8k:
        parts = split_gsm8k(clean_answer(value))
        if parts is None:
            raise DataError(place, "the answer has no '####'", "Use answer_format: plain, or on_error: skip.")
        reasoning, value = parts
    elif spec.answer_format == "boxed":
        value = last_boxed(clean_answer(value))
        if value is None:
            reason = "the answer column has no complete \\boxed{}"
            raise DataError(place, reason, "Use answer_format: plain, or on_error: skip.")
    answer = clean_answer(value)
    if not answer and kind != "code":
        raise DataError(place, "the answer is missing or empty", "Mend the row, or set on_error: skip.")
    integer = canonical_integer(answer)
    if kind == "integer" and integer is None:
        raise DataError(place, f"the answer {answer!r} is no integer", "Use kind: math, or on_error: skip.")
    return integer if integer is not None and kind in (None, "integer") else answer, reasoning


def is_gsm8k(rows: list[Row], columns: Mapping[str, str], spec: ProblemSpec) -> bool:
    """Whether the answer column holds reasoning and, behind `####`, the answer."""
    if spec.answer_format != "auto" or "answer" not in columns:
        return spec.answer_format == "gsm8k"
    answers = (cell(row.values, columns["answer"]) for row in rows)
    given = [answer for answer in answers if answer is not None]
    return bool(given) and all(isinstance(answer, str) and "####" in answer for answer in given)


def cell(values: Any, column: str) -> Any:
    """The value of a column, by its whole name or else by a dotted path into nested ones; None if absent."""
    if not isinstance(values, dict) or column in values:
        return values.get(column) if isinstance(values, dict) else None
    head, dot, rest = column.partition(".")
    return cell(values.get(head), rest) if dot else None


def _make_ids(rows: list[dict[str, Any]], mapped: bool) -> None:
    """Stable ids by content, "-2" behind the second of the same statement; mapped ones are checked."""
    seen: Counter[str] = Counter()
    for row in rows:
        if not mapped:
            key = f"{row['source']}\0{normalise_statement(row['problem'])}"
            row["id"] = hashlib.sha256(key.encode()).hexdigest()[:16]
        seen[row["id"]] += 1
        if seen[row["id"]] > 1 and mapped:
            raise DataError("columns.id", f"{row['id']!r} is not unique", "Leave it out to get ids by content.")
        if not row["id"]:
            raise DataError("columns.id", "a row has an empty id", "Leave it out to get ids by content.")
        if seen[row["id"]] > 1:
            row["id"] += f"-{seen[row['id']]}"


def _select(rows: list[dict[str, Any]], spec: ProblemSpec, read: int) -> list[dict[str, Any]]:
    """Split, then shuffle, then limit."""
    if spec.held_out is not None:
        side, wanted = spec.held_out, spec.held_out.part == "held_out"
        rows = [r for r in rows if held_out(r["problem"], side.fraction, side.salt) == wanted]
    if spec.shuffle_seed is not None:
        # Sorting by a keyed hash shuffles the same way whatever order the rows came in.
        rows = sorted(rows, key=lambda r: hashlib.sha256(f"{spec.shuffle_seed}\0{r['id']}".encode()).digest())
    if not rows:
        fix = "Check held_out and on_error; the log tells why rows were skipped."
        raise DataError("problems", f"none of the {read} rows is left", fix)
    return rows[: spec.limit]


def _to_dataset(rows: list[dict[str, Any]]) -> "Dataset":
    import datasets
    import pyarrow as pa

    names = list(dict.fromkeys([*OUR_COLUMNS, *(name for row in rows for name in row)]))
    table = {name: [row.get(name) for row in rows] for name in names}
    try:
        return datasets.Dataset.from_dict(table)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        for name, values in table.items():
            try:
                datasets.Dataset.from_dict({name: values})
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as culprit:
                fix = "Give all its cells the same type, for example text."
                raise DataError(name, f"the column cannot be stored ({culprit})", fix) from culprit
        raise DataError("problems", f"the table cannot be stored ({error})", "Simplify its extras.") from error


def _as_spec(spec: Mapping[str, Any] | ProblemSpec) -> ProblemSpec:
    if isinstance(spec, ProblemSpec):
        return spec
    try:
        return ProblemSpec.model_validate(dict(spec))
    except ValidationError as error:
        # Of a union's errors (template: a name or a mapping) the deepest is the one that was meant.
        first = max(error.errors(), key=lambda e: len(e["loc"]))
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, DataError):
            raise cause from None
        field = ".".join(map(str, first["loc"])) or "problems"
        fix = "See data/spec.py for what is allowed."
        if first["type"] == "extra_forbidden":
            models = (ProblemSpec, GeneratorSpec, HeldOutSpec, TemplateSpec)
            known = [name for model in models for name in model.model_fields]
            fix = did_you_mean(str(first["loc"][-1]), known) or fix
        raise DataError(field, first["msg"].removeprefix("Value error, "), fix) from error
