"""The data card: where the problems are from, what each filter took out and why, the settings. No dates, no paths."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from data.curation.pipeline import Curated
from data.curation.problem import Dropped, Problem
from data.curation.spec import SourceSpec

EXAMPLES = 3
_SHOWN = 200  # characters of an example


def write_card(
    title: str,
    sources: Sequence[SourceSpec],
    rows_read: Mapping[str, int],
    curated: Curated,
    evaluation: Mapping[str, int],
    settings: str,
    content: str,
) -> str:
    """The card as Markdown. rows_read: by source; evaluation: problems of each evaluation set."""
    parts = [
        f"# {title}",
        f"{len(curated.problems)} problems of {sum(rows_read.values())} rows. "
        f"Answers: {_answers(curated.problems)}. SHA-256 of the content: `{content}`.",
        "## Sources",
        _sources(sources, rows_read, curated),
        "## Filters, in order",
        _table(
            ["filter", "in", "out", "dropped"],
            [[c.filter, str(c.read), str(c.kept), str(c.read - c.kept)] for c in curated.counts],
        ),
    ]
    if evaluation:
        parts += ["## Evaluation sets", _evaluation(evaluation, curated)]
    parts += ["## What was dropped, and why", *_dropped(curated.dropped)]
    parts += ["## Settings", f"```yaml\n{settings.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _answers(problems: Sequence[Problem]) -> str:
    kinds = Counter(problem.kind for problem in problems)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def _sources(sources: Sequence[SourceSpec], rows_read: Mapping[str, int], curated: Curated) -> str:
    kept = Counter(problem.source for problem in curated.problems)
    rows = [
        [
            source.name,
            source.hub or source.url or "local file",
            source.licence or "not stated",
            str(rows_read.get(source.name, 0)),
            str(kept[source.name]),
        ]
        for source in sources
    ]
    return _table(["source", "from", "licence", "rows", "kept"], rows)


def _evaluation(evaluation: Mapping[str, int], curated: Curated) -> str:
    found = Counter(dropped.reason for dropped in curated.dropped if dropped.filter == "evaluation sets")
    rows = [[name, str(size), str(found[f"in the evaluation set {name}"])] for name, size in evaluation.items()]
    return _table(["set", "its problems", "found and dropped"], rows)


def _dropped(dropped: Sequence[Dropped]) -> list[str]:
    groups: dict[tuple[str, str], list[Dropped]] = defaultdict(list)
    for one in dropped:
        groups[one.filter, one.reason].append(one)
    parts = []
    for (name, reason), members in groups.items():
        parts.append(f"### {name}: {reason} ({len(members)})")
        # Spread over the set: its first rows are often of one kind.
        examples = members[:: max(1, -(-len(members) // EXAMPLES))][:EXAMPLES]
        parts.append("\n".join(_example(one) for one in examples))
    return parts or ["Nothing."]


def _example(one: Dropped) -> str:
    answer = f", answer {_code(one.raw_answer)}" if one.raw_answer else ""
    detail = f": {_code(one.detail)}" if one.detail else ""
    statement = f"\n  {_code(one.statement)}" if one.statement else ""
    return f"- {one.source}, {one.place}{answer}{detail}{statement}"


def _code(text: str) -> str:
    """One line of code that Markdown leaves alone, cut to size."""
    line = " ".join(text.split())
    line = line if len(line) <= _SHOWN else f"{line[: _SHOWN // 2]} ... {line[-_SHOWN // 2 :]}"
    fence = "``" if "`" in line else "`"
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
