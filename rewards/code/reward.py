"""The reward `code`: does the program pass its tests? (DeepSeek-R1, arXiv 2501.12948, section 2.2.1)

    score "all":       r = 1 if every test passes, else 0
    score "fraction":  r = tests passed / tests

The program is the completion's last fenced block. None where a row has no tests, or where nothing can be said
because the sandbox failed: never a 0 for what is not the program's fault.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..accuracy import JudgedScore
from ..cpus import share_of_cpus
from ..errors import RewardError
from ..messages import Completion, completion_text
from .backends import SandboxUnavailable
from .cases import parse_tests
from .compare import Compare, check_compare
from .extract import extract_program
from .limits import Limits
from .result import CodeResult
from .run import check_sandbox, run_many


def code_reward(
    completions: Sequence[Completion],
    tests: Sequence[Any],
    setup: Sequence[str | None] | None = None,
    *,
    score: Literal["all", "fraction"] = "all",
    timeout_s: float = Limits.timeout_s,
    total_timeout_s: float = Limits.total_timeout_s,
    memory_mb: int = Limits.memory_mb,
    max_processes: int = Limits.max_processes,
    max_file_mb: int = Limits.max_file_mb,
    max_output_mb: float = Limits.max_output_mb,
    compare: Compare = "tokens",
    float_tolerance: float | None = None,
    sandbox: str = "auto",
    site_packages: bool = False,
    workers: int | None = None,
    prefill: str = "",
) -> list[float | None]:
    """One score per completion, with its verdict (see `rewards.accuracy.JudgedScore`).

    tests: per row, what `read_tests` reads; setup: code that runs before each assert test and, like it, uses the
    program's names. workers: programs at a time (default: the CPUs of this process's share of the machine).
    Raises RewardError if an argument is wrong or the sandbox is not available.
    """
    options: dict[str, Any] = {
        "timeout_s": timeout_s,
        "total_timeout_s": total_timeout_s,
        "memory_mb": memory_mb,
        "max_processes": max_processes,
        "max_file_mb": max_file_mb,
        "max_output_mb": max_output_mb,
        "compare": compare,
        "float_tolerance": float_tolerance,
        "sandbox": sandbox,
        "site_packages": site_packages,
    }
    check(score=score, workers=workers, **options)
    setups = setup if setup is not None else [None] * len(tests)
    cases = [read_tests(row, before or "") for row, before in zip(tests, setups, strict=True)]
    programs = [extract_program(prefill + completion_text(completion)) for completion in completions]
    pairs = zip(programs, cases, strict=True)
    asked = [(program, case) for program, case in pairs if program is not None and case]
    results = iter(run_many(asked, workers=workers or share_of_cpus(), **options))
    return [
        None if not case else JudgedScore(0.0, "unparsed") if program is None else _score(next(results), score)
        for program, case in zip(programs, cases, strict=True)
    ]


def check(
    *, score: str = "all", workers: int | None = None, sandbox: str = "auto", site_packages: bool = False, **args: Any
) -> None:
    """Raises RewardError if `code_reward` could not work with these arguments on this machine."""
    if score not in ("all", "fraction"):
        raise RewardError(f"reward 'code': score must be 'all' or 'fraction', not {score!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise RewardError(f"reward 'code': workers must be a positive whole number, not {workers!r}")
    try:
        check_compare(args.pop("compare", "tokens"), args.pop("float_tolerance", None))
        Limits(**args)
        check_sandbox(sandbox, site_packages=site_packages)
    except (ValueError, SandboxUnavailable) as error:
        raise RewardError(f"reward 'code': {error}") from None


def read_tests(row: Any, setup: str = "") -> list[dict[str, str]]:
    """The tests of one row: a list of test dicts, a list of strings (assert statements, as in MBPP's `test_list`),
    {"inputs": [...], "outputs": [...]}, or the JSON text of any of these; None and empty lists give no tests.

    Raises ValueError for anything else.
    """
    if isinstance(row, str):
        try:
            row = json.loads(row) if row.strip() else None
        except ValueError as error:
            raise ValueError(f"tests: not JSON ({error})") from None
    if row is None:
        return []
    if isinstance(row, Mapping) and isinstance(row.get("inputs"), list) and isinstance(row.get("outputs"), list):
        if len(row["inputs"]) != len(row["outputs"]):
            raise ValueError(f"tests: {len(row['inputs'])} inputs for {len(row['outputs'])} outputs")
        pairs = zip(row["inputs"], row["outputs"], strict=True)
        row = [{"type": "stdio", "input": given, "output": wanted} for given, wanted in pairs]
    if isinstance(row, Mapping) or not hasattr(row, "__iter__"):
        raise ValueError(f"tests must be a list of dicts or strings, or the JSON text of one, not {row!r:.80}")
    tests = [{"type": "assert", "code": test} if isinstance(test, str) else test for test in row]
    parse_tests(tests)
    prefix = f"{setup}\n" if setup.strip() else ""
    return [{**test, "code": prefix + test["code"]} if test["type"] == "assert" else dict(test) for test in tests]


def _score(result: CodeResult, score: str) -> JudgedScore | None:
    failures = [outcome for outcome in result.outcomes if outcome != "passed"]
    if any(outcome == "sandbox_error" for outcome in failures):
        return None
    if not failures:
        return JudgedScore(1.0, "correct")
    value = result.passed / result.total if score == "fraction" else 0.0
    return JudgedScore(value, "timeout" if failures[0] == "timeout" else "wrong")
