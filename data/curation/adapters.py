"""Adapters: from a source's raw row to a statement, an answer and, for code, tests.

To add one, write a function from the raw values to a `Draft` and put it into `ADAPTERS` with the columns by which
`adapter: auto` knows it. Rows that it cannot read raise DataError with the place "" (the caller fills it in).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from data.curation import code_shapes
from data.curation.code_shapes import Draft
from data.curation.problem import Problem
from data.curation.spec import EvaluationSet, SourceSpec
from data.errors import DataError
from data.problems import cell, find_columns, is_gsm8k, shape_row
from data.sources import OnBad, Row, read_rows, stop
from data.spec import Location, ProblemSpec

PREVIEW = 100  # rows from which columns and adapters are found


@dataclass(frozen=True)
class Adapter:
    kind: str
    columns: tuple[str, ...]  # a source that has them all is one for this adapter
    read: Callable[[Mapping[str, Any]], Draft] | None  # None: by columns, as `load_problems` reads


ADAPTERS: dict[str, Adapter] = {
    "humaneval": Adapter("code", ("prompt", "test", "entry_point"), code_shapes.humaneval),
    "mbpp": Adapter("code", ("test_list",), code_shapes.mbpp),
    "apps": Adapter("code", ("question", "input_output"), code_shapes.apps),  # and TACO
    "code-contests": Adapter("code", ("description", "public_tests"), code_shapes.code_contests),
    "nemo-gym": Adapter("code", ("responses_create_params", "verifier_metadata"), code_shapes.nemo_gym),
    "verl": Adapter("code", ("prompt", "reward_model"), code_shapes.verl),
    "stdio": Adapter("code", ("tests",), code_shapes.stdio),
    "columns": Adapter("math", (), None),
}


def read_source(spec: SourceSpec, on_bad: OnBad = stop) -> Iterator[Problem]:
    """The problems of a source. `on_bad` is called for each row that is not one; if it returns, the row is left out.

    Raises DataError for a missing file, a missing column, or rows of no known shape.
    """
    preview, rows = _preview(islice(read_rows(spec, on_bad=on_bad), spec.limit))
    shape = _shaper(spec, preview)
    _check_kept(spec, preview)
    for row in rows:
        try:
            draft = shape(row)
        except DataError as error:
            on_bad(_at(error, row))
            continue
        yield Problem(
            source=spec.name,
            place=short_place(row.place),
            statement=draft.statement,
            answer=draft.answer,
            raw_answer=draft.raw_answer,
            kind="code" if spec.kind == "code" else "math",
            aime=spec.aime,
            tests=draft.tests,
            setup=draft.setup,
            kept={name: _as_text(cell(row.values, name)) for name in spec.keep},
        )


def read_statements(spec: EvaluationSet) -> Iterator[tuple[str, str]]:
    """(place, statement) of an evaluation set; rows without a statement are an error."""
    preview, rows = _preview(read_rows(spec))
    if spec.kind == "code":
        shape = _shaper(spec, preview)
        yield from ((short_place(row.place), shape(row).statement) for row in rows)
        return
    # Answers are of no interest, so none is required: what a problem of kind "code" may do without.
    by_columns = _problem_spec(spec).model_copy(update={"kind": "code", "answer_format": "plain"})
    columns = {"prompt": find_columns(preview, by_columns)["prompt"]}
    for row in rows:
        yield short_place(row.place), str(shape_row(row, columns, by_columns, False)["problem"])


def describe_source(spec: SourceSpec | EvaluationSet) -> str:
    """The adapter of a source, found from its first rows; DataError if they cannot be read by it."""
    preview = list(islice(read_rows(spec, streaming=True, on_bad=lambda _: None), PREVIEW))
    shape = _shaper(spec, preview)
    if isinstance(spec, SourceSpec):
        _check_kept(spec, preview)
        bad: list[DataError] = []
        for row in preview:
            try:
                shape(row)
            except DataError as error:
                bad.append(_at(error, row))
        if len(bad) == len(preview):
            raise bad[0]
    return _adapter_name(spec, preview)


def _at(error: DataError, row: Row) -> DataError:
    """The error with its place, which adapters do not know."""
    return DataError(error.field or row.place, error.reason, error.fix)


def short_place(place: str) -> str:
    """A place without the folders of its file: they differ from machine to machine."""
    return place.rpartition("/")[2]


def _preview(rows: Iterable[Row]) -> tuple[list[Row], Iterator[Row]]:
    iterator = iter(rows)
    first = list(islice(iterator, PREVIEW))
    if not first:
        raise DataError("problems", "the source has no readable rows", "Check the path or the split.")
    return first, chain(first, iterator)


def _adapter_name(spec: SourceSpec | EvaluationSet, preview: Sequence[Row]) -> str:
    if spec.adapter != "auto":
        return spec.adapter
    available = {name for row in preview for name in row.values}
    for name, adapter in ADAPTERS.items():
        if adapter.kind == spec.kind and available.issuperset(adapter.columns):
            return name
    known = "; ".join(f"{name}: {', '.join(a.columns)}" for name, a in ADAPTERS.items() if a.kind == spec.kind)
    raise DataError(
        "adapter",
        f"no adapter knows rows with the columns {', '.join(sorted(available))}",
        f"Known are {known}. Rename columns with `columns`, or name the adapter.",
    )


def _shaper(spec: SourceSpec | EvaluationSet, preview: Sequence[Row]) -> Callable[[Row], Draft]:
    read = ADAPTERS[_adapter_name(spec, [_renamed(row, spec) for row in preview])].read
    if read is not None:
        return lambda row: read(_renamed(row, spec).values)
    by_columns = _problem_spec(spec)
    columns = find_columns(preview, by_columns)
    gsm8k = is_gsm8k(list(preview), columns, by_columns)

    def shape(row: Row) -> Draft:
        shaped = shape_row(row, columns, by_columns, gsm8k)
        raw = cell(row.values, columns["answer"])
        # Of a worked solution only its answer is of interest.
        worked = gsm8k or by_columns.answer_format == "boxed"
        return Draft(shaped["problem"], shaped["answer"], shaped["answer"] if worked else str(raw))

    return shape


def _renamed(row: Row, spec: SourceSpec | EvaluationSet) -> Row:
    """The row with the columns that `columns` names under our names as well (code only: math maps its own)."""
    if spec.kind != "code" or not spec.columns:
        return row
    renamed = {ours: cell(row.values, theirs) for ours, theirs in spec.columns.items()}
    return replace(row, values={**row.values, **renamed})


def _problem_spec(spec: Location) -> ProblemSpec:
    return ProblemSpec.model_validate({name: getattr(spec, name) for name in Location.model_fields})


def _check_kept(spec: SourceSpec, preview: Sequence[Row]) -> None:
    available = list(dict.fromkeys(name for row in preview for name in row.values))
    for name in spec.keep:
        if name not in available and name.partition(".")[0] not in available:
            there = ", ".join(available)
            raise DataError("keep", f"there is no column {name!r}; the source has {there}", "Name one of these.")


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
