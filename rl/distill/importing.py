"""Step 1 without a teacher: existing traces, with the problems that they answer where `data` has these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.errors import DataError
from data.problems import load_problems
from data.trace_import import read_source
from data.trace_join import join_problems
from data.traces import Trace
from rl.distill.verify import Pair, columns_of_trace
from rl.recipe_distill import DistillRecipe

_LISTED = 20


@dataclass
class Imported:
    pairs: list[Pair] = field(default_factory=list)
    bad: int = 0
    errors: list[str] = field(default_factory=list)  # the first of the bad rows

    def record(self) -> dict[str, Any]:
        return {"read": len(self.pairs) + self.bad, "bad": self.bad, "errors": self.errors}

    def line(self) -> str:
        first = f"; the first: {self.errors[0]}" if self.errors else ""
        return f"{len(self.pairs)} traces imported, {self.bad} rows left out{first}"


def import_traces(recipe: DistillRecipe) -> Imported:
    """Raises DataError for a bad row if the recipe says on_error: stop, and for a source without one good row."""
    assert recipe.traces is not None
    source = read_source(recipe.traces)
    found = Imported()
    joined: Iterator[Pair | DataError]
    if recipe.data is None:
        joined = ((t, columns_of_trace(t)) if isinstance(t, Trace) else t for t in source)
    else:
        joined = join_problems(source, [dict(row) for row in load_problems(recipe.data)], recipe.traces.join)
    for pair in joined:
        if not isinstance(pair, DataError):
            found.pairs.append(pair)
            continue
        if recipe.on_error == "stop":
            raise pair
        found.bad += 1
        if len(found.errors) < _LISTED:
            found.errors.append(str(pair))
    if not found.pairs:
        first = f"; the first: {found.errors[0]}" if found.errors else ""
        raise DataError(
            "traces", f"none of {found.bad} rows is a trace{first}", "Check traces.adapter and traces.join."
        )
    return found
