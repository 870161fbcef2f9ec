"""The filters in order, with counts in and out of each."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from data.curation.choices import resolve_choices
from data.curation.contamination import ContaminationIndex
from data.curation.duplicates import find_duplicates
from data.curation.integers import in_range, read_integer, to_integer
from data.curation.problem import Dropped, Problem, Rejected
from data.curation.residue import without_residue
from data.curation.spec import DuplicateSpec, FilterSpec

Filter = Callable[[Problem], Problem | Rejected]
# (name, how many problems) -> what to call with the number of problems done.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Count:
    """What went into a filter and what came out."""

    filter: str
    read: int
    kept: int


@dataclass
class Curated:
    """The problems that are left, and everything that is not, with its reason."""

    problems: list[Problem]
    dropped: list[Dropped] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def settle(self, name: str, outcomes: Sequence[Problem | Rejected]) -> None:
        """Takes one outcome a problem of a filter, and counts."""
        kept = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
        self.dropped += [
            Dropped.of(problem, name, outcome)
            for problem, outcome in zip(self.problems, outcomes, strict=True)
            if isinstance(outcome, Rejected)
        ]
        self.counts.append(Count(name, len(self.problems), len(kept)))
        self.problems = kept


def apply_filters(
    curated: Curated,
    filters: FilterSpec,
    duplicates: DuplicateSpec,
    evaluation: ContaminationIndex | None,
    bar: Bar = lambda name, total: nullcontext(lambda done: None),
) -> Curated:
    """Runs the pure filters in place."""
    steps: list[tuple[str, Filter]] = []
    if filters.residue:
        steps.append(("residue", without_residue))
    if filters.choices:
        steps.append(("choices", resolve_choices))
    steps.append(("integers", to_integer if filters.integer_only else name_kind))
    steps.append(("aime range", in_range))
    if evaluation is not None:
        steps.append(("evaluation sets", lambda problem: _clean(problem, evaluation)))
    for name, one in steps:
        outcomes = []
        with bar(name, len(curated.problems)) as advance:
            for problem in curated.problems:
                outcomes.append(one(problem))
                advance(1)
        curated.settle(name, outcomes)
    with bar("duplicates", len(curated.problems)):
        found = find_duplicates(curated.problems, duplicates)
    curated.settle("duplicates", [found.get(i, problem) for i, problem in enumerate(curated.problems)])
    return curated


def name_kind(problem: Problem) -> Problem:
    """Every answer is kept as it is, but for the spelling of integers."""
    integer = read_integer(problem.answer) if problem.kind != "code" else None
    return problem if integer is None else replace(problem, answer=integer, kind="integer")


def _clean(problem: Problem, evaluation: ContaminationIndex) -> Problem | Rejected:
    match = evaluation.find(problem.statement)
    return problem if match is None else match.rejected(evaluation.spec.ngram)
