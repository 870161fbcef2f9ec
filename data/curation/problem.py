"""What moves through the filters: problems, and the reasons for which they are left out."""

from dataclasses import dataclass, field
from typing import Any

from data.spec import Kind


@dataclass(frozen=True)
class Problem:
    """One problem of a source. `raw_answer` is the source's own, `answer` what the filters made of it."""

    source: str
    place: str  # "file.jsonl:7", to find the raw row
    statement: str
    answer: str  # "" for a code problem without a reference program
    raw_answer: str
    kind: Kind
    aime: bool = False  # the source says that answers lie in 0..999
    tests: list[dict[str, Any]] | None = None  # of code problems, as the reward `code` reads them
    setup: str = ""  # code that runs before each assert test
    kept: dict[str, str | None] = field(default_factory=dict)  # further columns of the source


@dataclass(frozen=True)
class Rejected:
    """Why a filter leaves a problem out: `reason` is one of a few phrases to count by, `detail` is of this row."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Dropped:
    """A problem, or a row that did not become one, and what left it out."""

    filter: str
    reason: str
    detail: str
    source: str
    place: str
    statement: str = ""
    raw_answer: str = ""

    @classmethod
    def of(cls, problem: Problem, name: str, why: Rejected) -> "Dropped":
        return cls(
            name, why.reason, why.detail, problem.source, problem.place, problem.statement, problem.raw_answer
        )  # fmt: skip
