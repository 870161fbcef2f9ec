"""Traces that lie in one file, and the problems that they answer in another."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data.errors import DataError, did_you_mean
from data.split import normalise_statement
from data.traces import Trace


def join_problems(
    traces: Iterable[Trace | DataError], problems: Sequence[Mapping[str, Any]], column: str | None
) -> Iterator[tuple[Trace, Mapping[str, Any]] | DataError]:
    """Each trace with the problem that it answers, whose id, statement, gold and kind it takes over.

    column: of the problems, equal to a trace's id; None: the statements are equal once normalised. A trace of no
    known problem is an error to be counted.
    """
    if column is not None and problems and column not in problems[0]:
        there = f"the problems have {', '.join(problems[0])}"
        raise DataError("traces.join", f"there is no column {column!r}; {there}", did_you_mean(column, problems[0]))
    known = {str(p[column]) if column is not None else normalise_statement(str(p["problem"])): p for p in problems}
    numbers: Counter[str] = Counter()
    for trace in traces:
        if isinstance(trace, DataError):
            yield trace
            continue
        problem = known.get(trace.id if column is not None else normalise_statement(trace.prompt))
        if problem is None:
            what = f"trace {trace.id!r} of {trace.source}"
            fix = "on_error: skip leaves such traces out; if there is one, check traces.join."
            yield DataError(what, "no problem of `data` is its problem", fix)
            continue
        taken = {"id": problem["id"], "prompt": problem["problem"], "gold": problem["answer"], "kind": problem["kind"]}
        yield replace(trace, **taken, sample=numbers[problem["id"]]), problem
        numbers[problem["id"]] += 1
