"""A curated set as rows, as a Parquet file and as a hash of its content."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.curation.problem import Problem
from data.split import normalise_statement

TEST_FIELDS = ("type", "input", "output", "code")


def records(problems: Sequence[Problem], rates: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """One row a problem, all with the same columns. `tests` and `setup` are there if there is a code problem."""
    kept = list(dict.fromkeys(name for problem in problems for name in problem.kept))
    code = any(problem.kind == "code" for problem in problems)
    seen: Counter[str] = Counter()
    rows = []
    for i, problem in enumerate(problems):
        # As `load_problems` makes ids: by content, so that they outlive a change of order.
        key = f"{problem.source}\0{normalise_statement(problem.statement)}"
        identity = hashlib.sha256(key.encode()).hexdigest()[:16]
        seen[identity] += 1
        row: dict[str, Any] = {
            "id": identity if seen[identity] == 1 else f"{identity}-{seen[identity]}",
            "problem": problem.statement,
            "answer": problem.answer,
            "kind": problem.kind,
            "source": problem.source,
            "place": problem.place,
            "raw_answer": problem.raw_answer,
        }
        if code:
            row["tests"] = [{name: test.get(name) for name in TEST_FIELDS} for test in problem.tests or []]
            row["setup"] = problem.setup
        if rates is not None:
            row["pass_rate"] = rates[i]
        rows.append(row | {name: problem.kept.get(name) for name in kept})
    return rows


def content_hash(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the rows, whatever library writes them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The same rows give the same bytes, by one version of pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    test = pa.struct([(name, pa.string()) for name in TEST_FIELDS])
    types = {"tests": pa.list_(test), "pass_rate": pa.float64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")
