"""Which traces of a pool to keep: filters with a name each, then duplicates and a number per problem.

Pure: rewards, language and repetition shares and token counts are measured before (`Trace` holds them). The result
does not depend on the order of the traces.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from data.trace_spec import SelectSpec
from data.traces import Trace, pieces

_SHINGLE = 5
_PARAGRAPHS = re.compile(r"\n[ \t\r]*\n")
_STRAY_TAG = re.compile(r"</?think>")


@dataclass(frozen=True)
class Stage:
    """One line of the report: traces that came to a filter and those that it left out, by reason."""

    name: str
    came: int
    dropped: dict[str, int]

    @property
    def kept(self) -> int:
        return self.came - sum(self.dropped.values())


Reason = Callable[[Trace, SelectSpec], str | None]


def _unfinished(trace: Trace, spec: SelectSpec) -> str | None:
    if not spec.finished:
        return None
    if trace.finish_reason != "stop":
        return f"unfinished: {trace.finish_reason}"
    return None if trace.answer else "unfinished: the reasoning never ends"


def _without_reasoning(trace: Trace, spec: SelectSpec) -> str | None:
    return "no reasoning" if spec.reasoning and not trace.thinking else None


def _stray_tags(trace: Trace, spec: SelectSpec) -> str | None:
    """Tags within the parts would make another split of the text that a student learns."""
    return "stray <think> tags" if _STRAY_TAG.search(f"{trace.thinking}\n{trace.answer}") else None


def _not_correct(trace: Trace, spec: SelectSpec) -> str | None:
    if spec.min_reward is None or (trace.reward is not None and trace.reward >= spec.min_reward):
        return None
    if trace.reward is None:
        return "not correct: no reward applies"
    wrong = trace.verdict is not None and trace.verdict != "correct"
    return f"not correct: {trace.verdict}" if wrong else "not correct: reward below min_reward"


def _mixed_language(trace: Trace, spec: SelectSpec) -> str | None:
    mixed = spec.language is not None and trace.language is not None and trace.language < spec.min_language_share
    return f"language: less than {spec.min_language_share:.0%} {spec.language}" if mixed else None


def _code(trace: Trace, spec: SelectSpec) -> str | None:
    return None if spec.code_blocks or "```" not in trace.thinking else "code block in the reasoning"


def _long_paragraph(trace: Trace, spec: SelectSpec) -> str | None:
    limit = spec.max_paragraph
    long = limit is not None and any(len(part.strip()) > limit for part in _PARAGRAPHS.split(trace.thinking))
    return f"paragraph of over {limit} characters" if long else None


def _repetitive(trace: Trace, spec: SelectSpec) -> str | None:
    limit = spec.max_repetition
    return f"repetition over {limit:.0%}" if limit is not None and trace.repetition > limit else None


def _length(trace: Trace, spec: SelectSpec) -> str | None:
    if trace.tokens < spec.min_tokens:
        return f"shorter than {spec.min_tokens} tokens"
    too_long = spec.max_tokens is not None and trace.tokens > spec.max_tokens
    return f"longer than {spec.max_tokens} tokens" if too_long else None


FILTERS: dict[str, Reason] = {
    "finished": _unfinished,
    "reasoning": _without_reasoning,
    "tags": _stray_tags,
    "correct": _not_correct,
    "language": _mixed_language,
    "code_blocks": _code,
    "paragraphs": _long_paragraph,
    "repetition": _repetitive,
    "length": _length,
}


def select(traces: Iterable[Trace], spec: SelectSpec, *, seed: int = 0) -> tuple[list[Trace], list[Stage]]:
    """Every trace, by problem and sample, with `dropped` set to the first reason against it or None; and the report.

    seed: of `prefer: random`.
    """
    judged = sorted((replace(trace, dropped=None) for trace in traces), key=lambda trace: (trace.id, trace.sample))
    stages = []
    for name, reason in FILTERS.items():
        before = judged
        judged = [t if t.dropped else replace(t, dropped=reason(t, spec)) for t in before]
        stages.append(_stage(name, before, judged))
    passed = judged
    groups = [list(group) for _, group in groupby(judged, key=lambda trace: trace.id)]
    judged = [trace for group in groups for trace in _choose(group, spec, seed)]
    return judged, [*stages, _stage("problem", passed, judged)]


def _stage(name: str, before: Sequence[Trace], after: Sequence[Trace]) -> Stage:
    came = [trace for old, trace in zip(before, after, strict=True) if old.dropped is None]
    reasons = sorted(trace.dropped for trace in came if trace.dropped is not None)
    return Stage(name, len(came), {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)})


# ---- among the traces of one problem -----------------------------------------------------------------


def _choose(group: Sequence[Trace], spec: SelectSpec, seed: int) -> list[Trace]:
    """The traces of a problem; near copies and those over the number per problem now have a reason against them."""
    candidates = sorted((t for t in group if t.dropped is None), key=lambda trace: _rank(trace, spec, seed))
    shingles = {trace.sample: _shingles(trace.thinking or trace.answer) for trace in candidates}
    copies: dict[int, str] = {}
    distinct: list[Trace] = []
    for trace in candidates:
        twin = next((t for t in distinct if _similar(shingles, t, trace, spec.max_similarity)), None)
        if twin is None:
            distinct.append(trace)
        else:
            copies[trace.sample] = "near copy of another trace of the problem"
    if spec.prefer == "diverse":
        distinct = _spread(distinct, shingles)
    surplus = [] if spec.per_problem is None else distinct[spec.per_problem :]
    reasons = copies | {trace.sample: f"over {spec.per_problem} of the problem" for trace in surplus}
    return [replace(t, dropped=t.dropped or reasons.get(t.sample)) for t in group]


def _rank(trace: Trace, spec: SelectSpec, seed: int) -> tuple[float, str, int]:
    """What is preferred comes first."""
    if spec.prefer == "random":
        return 0.0, hashlib.sha256(f"{seed}\0{trace.id}\0{trace.sample}".encode()).hexdigest(), trace.sample
    return float(trace.tokens), "", trace.sample


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = [piece.casefold() for piece in pieces(text)]
    return frozenset(tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))


def _similar(shingles: dict[int, frozenset[tuple[str, ...]]], a: Trace, b: Trace, limit: float | None) -> bool:
    return limit is not None and similarity(shingles[a.sample], shingles[b.sample]) > limit


def similarity(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    """Jaccard's: shared shingles over all; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def _spread(traces: Sequence[Trace], shingles: dict[int, frozenset[tuple[str, ...]]]) -> list[Trace]:
    """The shortest first, then always the one whose nearest neighbour among those taken is farthest."""
    left, taken = list(traces), list(traces[:1])
    left = left[1:]
    while left:
        near = [max(similarity(shingles[t.sample], shingles[other.sample]) for other in taken) for t in left]
        taken.append(left.pop(near.index(min(near))))
    return taken
