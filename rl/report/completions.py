"""Which completions the report carries: a bounded number, spread over steps, some of every verdict.

A run may hold millions; the page must open in a browser. Each source (the training, each evaluated set) gets an equal
part of the budget, each verdict an equal part of its source's, and what one cannot use goes to the others. So rare
verdicts are over-represented on purpose, and the page says of how many its completions are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.report.read import ReportError, RunData, number
from rl.samples import sample_files

LONGEST_COMPLETION, LONGEST_PROMPT = 12_000, 6_000  # characters; the middle of a longer text is left out
_COLUMNS = (
    "step", "group", "id", "prompt_text", "completion", "answer", "reward", "components", "verdict", "advantage",
    "finish_reason", "tokens",
)  # fmt: skip
_Place = tuple[int, int]  # file, row


@dataclass(frozen=True)
class Source:
    """Completions of a run's training or of one evaluated set. total: how many there are; rows: those chosen."""

    run: str
    name: str
    total: int
    rows: list[dict[str, Any]]


def choose(runs: Sequence[RunData], budget: int) -> list[Source]:
    """At most `budget` completions of all runs together. Raises ReportError."""
    found = [
        (run.name, "training" if name is None else name, [path for _, path in sorted(files)])
        for run in runs
        for name, files in sorted(sample_files(run.folder).items(), key=lambda item: item[0] or "")
    ]
    verdicts = [[_verdicts(path) for path in files] for _, _, files in found]
    totals = [sum(map(len, listed)) for listed in verdicts]
    return [
        Source(run, name, total, _rows(files, pick(listed, part)))
        for (run, name, files), listed, total, part in zip(found, verdicts, totals, shares(totals, budget), strict=True)
    ]


def pick(verdicts: Sequence[Sequence[str | None]], budget: int) -> list[_Place]:
    """Places (file, row) of at most `budget` rows: equal numbers of each verdict, evenly spread over the files."""
    places: dict[str | None, list[_Place]] = {}
    for file, listed in enumerate(verdicts):
        for row, verdict in enumerate(listed):
            places.setdefault(verdict, []).append((file, row))
    parts = shares([len(of_one) for of_one in places.values()], budget)
    return sorted(place for of_one, part in zip(places.values(), parts, strict=True) for place in _spread(of_one, part))


def shares(sizes: Sequence[int], budget: int) -> list[int]:
    """The budget in equal parts, none above its size; what small ones leave goes to the others, the first first."""
    parts = [0] * len(sizes)
    left = min(budget, sum(sizes))
    while left:
        open_ = [i for i, size in enumerate(sizes) if parts[i] < size]
        for n, i in enumerate(open_):
            given = min(sizes[i] - parts[i], -(-left // (len(open_) - n)))
            parts[i] += given
            left -= given
    return parts


def shortened(text: str, limit: int) -> str:
    """Beginning and end of a long text, with a line that says how much is left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _spread(places: Sequence[_Place], count: int) -> list[_Place]:
    """`count` of the places in equal distances, the last among them: late steps are the interesting ones."""
    return [places[len(places) - 1 - (i * len(places)) // count] for i in range(count)]


def _verdicts(path: Path) -> list[str | None]:
    import pyarrow.parquet as pq

    try:
        found: list[str | None] = pq.read_table(path, columns=["verdict"])["verdict"].to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"{path} is not a file of samples: {error}") from error
    return found


def _rows(files: Sequence[Path], places: Sequence[_Place]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    by_file: dict[int, list[int]] = {}
    for file, row in places:
        by_file.setdefault(file, []).append(row)
    rows = []
    for file, of_file in by_file.items():
        known = [name for name in _COLUMNS if name in pq.read_schema(files[file]).names]
        table = pq.read_table(files[file], columns=known).take(of_file)
        rows += [_record(row) for row in table.to_pylist()]
    return rows


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the page's browser knows it."""
    return {
        "step": row.get("step"),
        "group": row.get("group"),
        "id": str(row.get("id")),
        "prompt": shortened(str(row.get("prompt_text") or ""), LONGEST_PROMPT),
        "completion": shortened(str(row.get("completion") or ""), LONGEST_COMPLETION),
        "answer": shortened(str(row.get("answer")), LONGEST_PROMPT),
        "reward": number(row.get("reward")),
        "components": _components(row.get("components")),
        "verdict": row.get("verdict"),
        "advantage": number(row.get("advantage")),
        "finish": row.get("finish_reason"),
        "tokens": row.get("tokens"),
    }


def _components(text: Any) -> dict[str, float | None]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return {str(name): number(value) for name, value in found.items()} if isinstance(found, dict) else {}
