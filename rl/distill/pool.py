"""Selected traces as worked solutions: the rows that `pipeline: sft` reads, with any template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.traces import Trace
from rewards.code.extract import extract_program
from rewards.math import extract_answer

COLUMNS = (
    "id", "prompt", "reasoning", "response", "solution_answer", "answer", "kind", "source", "teacher", "tokens",
    "verdict", "reward",
)  # fmt: skip


def pool_row(trace: Trace) -> dict[str, Any]:
    """`response` is the teacher's text after the reasoning (template `r1-trace`), `solution_answer` the bare answer in
    it, right or wrong (`r1-chat`, `short-think`); `answer` is the gold one, or that where no gold is known."""
    final = _final_answer(trace)
    return {
        "id": f"{trace.id}/{trace.sample}",
        "prompt": trace.prompt,
        "reasoning": trace.thinking,
        "response": trace.answer,
        "solution_answer": final,
        "answer": trace.gold or final,
        "kind": trace.kind,
        "source": trace.source,
        "teacher": trace.teacher,
        "tokens": trace.tokens,
        "verdict": trace.verdict,
        "reward": trace.reward,
    }


def _final_answer(trace: Trace) -> str:
    read = extract_program if trace.kind == "code" else extract_answer
    return (read(trace.response) or trace.answer).strip()


def write_pool(traces: Sequence[Trace], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"tokens": pa.int64(), "reward": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    rows = [pool_row(trace) for trace in traces]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
