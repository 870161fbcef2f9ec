"""Real programs and their tests: reference solutions pass, another task's solution does not."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from sandboxes import needs_sandbox

from rewards.code import CodeResult, extract_program, run_many, run_tests
from rewards.code.reward import read_tests

CODE = Path(__file__).parents[1].parent / "shared" / "data" / "code"

pytestmark = [
    pytest.mark.skipif(not CODE.is_dir(), reason="the shared development data is not on this machine"),
    needs_sandbox,
]
# HumanEval/32's own solution takes half a second per case, and machines may be busy.
LIMITS: dict[str, Any] = {"timeout_s": 60, "total_timeout_s": 180}
NEMO = "nemo-gym-code-gen-stdin"
SAMPLE = 7  # every n-th task in the fast tests; all are in the slow ones

Task = tuple[str, str, list[dict[str, str]]]  # name, reference program, tests


def _rows(name: str) -> list[dict[str, Any]]:
    path = CODE / name
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _humaneval() -> list[Task]:
    return [
        (
            row["task_id"],
            row["prompt"] + row["canonical_solution"],
            read_tests([f"{row['test']}\ncheck({row['entry_point']})"]),
        )
        for row in _rows("humaneval/HumanEval.jsonl.gz")
    ]


def _mbpp() -> list[Task]:
    return [
        (f"MBPP/{row['task_id']}", row["code"], read_tests(row["test_list"], row["test_setup_code"]))
        for row in _rows("mbpp/mbpp_601_974.jsonl")
    ]


def _judge(tasks: list[Task], every: int) -> None:
    chosen = range(0, len(tasks), every)
    right = run_many([(tasks[i][1], tasks[i][2]) for i in chosen], **LIMITS)
    assert _names(tasks, chosen, right, passed=False) == []
    # The next task's solution has other names, so nothing of it can be right.
    other = run_many([(tasks[(i + 1) % len(tasks)][1], tasks[i][2]) for i in chosen], **LIMITS)
    assert _names(tasks, chosen, other, passed=True) == []


def _names(tasks: list[Task], chosen: range, results: list[CodeResult], *, passed: bool) -> list[Any]:
    """Tasks whose result is `passed` when it should not be, or the other way round."""
    return [
        (tasks[i][0], [(str(outcome), outcome.detail) for outcome in result.outcomes])
        for i, result in zip(chosen, results, strict=True)
        if result.all_passed == passed
    ]


def test_humaneval_sample() -> None:
    assert len(_humaneval()) == 164
    _judge(_humaneval(), SAMPLE)


def test_mbpp_sample() -> None:
    assert len(_mbpp()) == 374
    _judge(_mbpp(), SAMPLE)


@pytest.mark.slow
def test_humaneval() -> None:
    _judge(_humaneval(), 1)


@pytest.mark.slow
def test_mbpp() -> None:
    _judge(_mbpp(), 1)


def test_verl_stdin_cases() -> None:
    rows = _rows("verl-stdin/cases.jsonl")
    scores = []
    for row in rows:
        result = run_tests(row["code"], read_tests(row["tests"]), **LIMITS)
        scores.append(result.passed / result.total)
    # The source rounds to one decimal: one of eleven outputs of the second case is wrong.
    assert [round(score, 1) for score in scores] == [row["expected_score"] for row in rows] == [1.0, 0.9]


def test_nemo_gym_rollouts() -> None:
    """Completions of a model with rewards that another harness gave to their extracted programs."""
    problems = {_question(row): row["verifier_metadata"]["unit_tests"] for row in _rows(f"{NEMO}/example.jsonl")}
    rows = _rows(f"{NEMO}/example_rollouts.jsonl")
    programs = [extract_program(row["extracted_model_output"]) for row in rows]
    assert [program.strip() for program in programs if program] == [row["extracted_model_code"] for row in rows]
    tests = [problems[_question(row)] for row in rows]
    jobs = [(str(program), read_tests(row)) for program, row in zip(programs, tests, strict=True)]
    exact = run_many(jobs, compare="exact", **LIMITS)
    assert [float(result.all_passed) for result in exact] == [row["reward"] for row in rows]
    # That harness compares line by line. Two of its refusals are of the right words on other lines.
    tokens = run_many(jobs, **LIMITS)
    assert [result.all_passed for result in tokens] == [False, True, True, False, True]


def _question(row: dict[str, Any]) -> str:
    return str(row["responses_create_params"]["input"][0]["content"])
