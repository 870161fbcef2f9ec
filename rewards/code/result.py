"""What `run_tests` returns."""

from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal[
    "passed", "wrong_answer", "runtime_error", "timeout", "memory", "output_limit", "sandbox_error"
]  # fmt: skip
OUTCOMES: tuple[str, ...] = get_args(Verdict)


class Outcome(str):
    """The outcome of one test: a string, one of OUTCOMES, with a short `detail` for people.

    sandbox_error: nothing is known about the program, because the sandbox did not start, the test itself is no
    program or a remote sandbox failed. Whatever happens once a program runs counts against the program.
    """

    detail: str

    def __new__(cls, outcome: Verdict, detail: str = "") -> "Outcome":
        made = super().__new__(cls, outcome)
        made.detail = detail
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """What copy and pickle pass to __new__."""
        return str(self), self.detail


@dataclass(frozen=True)
class CodeResult:
    """passed of total tests; `outcomes` has one entry per test, in order."""

    passed: int
    total: int
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, outcomes: list[Outcome]) -> "CodeResult":
        return cls(sum(outcome == "passed" for outcome in outcomes), len(outcomes), tuple(outcomes))

    @property
    def all_passed(self) -> bool:
        """Every test passed, and there was one."""
        return 0 < self.total == self.passed
