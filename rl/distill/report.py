"""The figures of a distillation: `summary.json` for programs, `report.md` for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from data.select import Stage
from data.traces import Trace

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_EXCERPT = 240


def summarise(traces: Sequence[Trace], stages: Sequence[Stage], tokens_by: str) -> dict[str, Any]:
    """Counts per verdict and filter, problems solved, quantiles of lengths."""
    kept = [trace for trace in traces if trace.dropped is None]
    correct = [trace for trace in traces if trace.verdict == "correct"]
    groups = {"all": traces, "correct": correct, "kept": kept}
    return {
        "problems": len({trace.id for trace in traces}),
        "problems_correct": len({trace.id for trace in correct}),
        "problems_kept": len({trace.id for trace in kept}),
        "samples": len(traces),
        "kept": len(kept),
        "verdicts": dict(sorted(Counter(trace.verdict or "none" for trace in traces).items())),
        "filters": [{"name": s.name, "came": s.came, "kept": s.kept, "dropped": s.dropped} for s in stages],
        "tokens_by": tokens_by,
        "quantiles": list(_QUANTILES),
        "tokens": {name: quantiles([trace.tokens for trace in group]) for name, group in groups.items()},
        "thinking_tokens": {
            name: quantiles([trace.thinking_tokens for trace in group]) for name, group in groups.items()
        },
        "teachers": dict(sorted(Counter(trace.teacher or "unnamed" for trace in traces).items())),
        "sources": dict(sorted(Counter(trace.source for trace in traces).items())),
    }


def quantiles(values: Sequence[int]) -> list[int]:
    """Of nearest rank, so that each is one of the values; empty of nothing."""
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in _QUANTILES] if ordered else []


def report(summary: dict[str, Any], traces: Sequence[Trace]) -> str:
    """Markdown. Nothing in it depends on time or machine, so equal traces give equal reports."""
    lines = [
        "# Distillation",
        "",
        f"{summary['samples']} traces of {summary['problems']} problems; {summary['problems_correct']} problems with a "
        f"correct one. Kept: {summary['kept']} traces of {summary['problems_kept']} problems.",
        "",
        *_table(["teacher", "traces"], [[name, str(count)] for name, count in summary["teachers"].items()]),
        *_table(["source", "traces"], [[name, str(count)] for name, count in summary["sources"].items()]),
        "## Verdicts",
        "",
        *_table(
            ["verdict", "traces", "share"],
            [[v, str(n), f"{n / summary['samples']:.1%}"] for v, n in summary["verdicts"].items()],
        ),
        "## Filters",
        "",
        "In this order; a trace is counted where it is left out first.",
        "",
        *_table(["filter", "came", "kept", "left out"], [_filter_row(stage) for stage in summary["filters"]]),
        f"## Lengths, in tokens ({summary['tokens_by']})",
        "",
        *_table(
            ["traces", *(f"{q:.0%}" for q in summary["quantiles"])],
            [
                [f"{which}, {part}", *map(str, summary[field][which])]
                for which in ("all", "correct", "kept")
                for field, part in (("tokens", "whole"), ("thinking_tokens", "reasoning"))
                if summary[field][which]
            ],
        ),
        "## Examples",
        "",
        *_examples(traces),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _filter_row(stage: dict[str, Any]) -> list[str]:
    reasons = "; ".join(f"{reason} ({count})" for reason, count in stage["dropped"].items())
    return [stage["name"], str(stage["came"]), str(stage["kept"]), reasons]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    line = ["| " + " | ".join(row) + " |" for row in [list(columns), ["---"] * len(columns), *cells]]
    return [*line, ""]


def _examples(traces: Sequence[Trace]) -> list[str]:
    """The first trace left out for each reason, and the first kept: how its reasoning begins and its answer ends."""
    first: dict[str, Trace] = {}
    for trace in traces:
        first.setdefault(trace.dropped or "kept", trace)
    lines = []
    for reason in sorted(first, key=lambda name: (name != "kept", name)):
        trace = first[reason]
        lines += [
            f"### {_one_line(reason)}",
            "",
            f"problem {_one_line(trace.id)}, sample {trace.sample}, gold {_one_line(trace.gold)!r}, verdict "
            f"{trace.verdict}, {trace.tokens} tokens",
            "",
            *(
                f"    {name:<10} {text}"
                for name, text in (
                    ("prompt", _cut(trace.prompt, head=True)),
                    ("reasoning", _cut(trace.thinking, head=True)),
                    ("ends in", _cut(trace.answer or trace.thinking, head=False)),
                )
            ),
            "",
        ]
    return lines


def _cut(text: str, *, head: bool) -> str:
    line = _one_line(text)
    if len(line) <= _EXCERPT:
        return line
    return f"{line[:_EXCERPT]} …" if head else f"… {line[-_EXCERPT:]}"


def _one_line(text: str) -> str:
    """Traces are untrusted: no control character and no line break of theirs reaches a report or a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
