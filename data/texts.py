"""Whole texts for continued pre-training, out of the same files and hub data sets as problems."""

from collections.abc import Iterator
from itertools import islice

from data.errors import DataError, did_you_mean
from data.sources import read_rows
from data.spec import ProblemSpec, TextSpec


def load_texts(spec: TextSpec, *, streaming: bool = False) -> Iterator[str]:
    """The texts of a column, in the source's order; DataError for a missing file or column, or a row without text."""
    source = ProblemSpec(path=spec.path, hub=spec.hub, config=spec.config, revision=spec.revision, split=spec.split)
    for row in islice(read_rows(source, streaming=streaming), spec.limit):
        if spec.column not in row.values:
            there = f"there is no column {spec.column!r}; the source has {', '.join(row.values)}"
            raise DataError("column", there, did_you_mean(spec.column, row.values) or "Name one of these.")
        text = row.values[spec.column]
        if not isinstance(text, str) or not text.strip():
            raise DataError(row.place, f"{spec.column} holds no text ({text!r})", "Mend or remove this row.")
        yield text
