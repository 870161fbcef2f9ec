"""Raw shapes: each adapter on a row as its publisher writes it; bad rows and unknown shapes."""

import json
from pathlib import Path
from typing import Any

import pytest

from data import DataError
from data.curation.adapters import ADAPTERS, describe_source, read_source, read_statements
from data.curation.problem import Problem
from data.curation.spec import EvaluationSet, SourceSpec
from rewards.code.reward import read_tests

MATH_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "odyssey": (
        {"Problem_1": {"question": "Find $n$.\n\\end{problem}\n\\noindent", "answer": "16\\\\\n\\noindent"}},
        {},
    ),
    "deepscaler": ({"problem": "Find $n$.", "answer": "016", "solution": "So $\\boxed{016}$.", "difficulty": 4.0}, {}),
    "ai-mo": ({"id": 0, "question": "Find $n$.", "answer": 16.0, "url": "https://example.org", "solution": None}, {}),
    "gsm8k": ({"question": "Find $n$.", "answer": "It is 2*8=<<2*8=16>>16.\n#### 16"}, {}),
    "math": (
        {"problem": "Find $n$.", "solution": "So $n=\\boxed{16}$.", "level": "Level 5"},
        {"columns": {"answer": "solution"}, "answer_format": "boxed"},
    ),
    "verl": (
        {"prompt": [{"role": "user", "content": "Find $n$."}], "reward_model": {"ground_truth": "16"}},
        {"columns": {"answer": "reward_model.ground_truth"}},
    ),
}
STDIO = [{"type": "stdio", "input": "1\n", "output": "2\n"}]
CASES = {"inputs": ["1\n"], "outputs": ["2\n"]}
CALL = {"fn_name": "double", "inputs": [[1], ["a"]], "outputs": [[2], ["aa"]]}
CHAT = "You are helpful.\n```python\n# Your code here\n```\n\nDouble the number."
CODE_ROWS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "humaneval": (
        {"prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n",
         "test": "def check(c): ..."},
        [{"type": "assert", "code": "def check(c): ...\ncheck(f)"}],
    ),
    "mbpp": (
        {"text": "Double the number.", "code": "def f(x): ...", "test_list": ["assert f(1) == 2"],
         "test_setup_code": ""},
        [{"type": "assert", "code": "assert f(1) == 2"}],
    ),
    "apps": ({"question": "Double the number.", "input_output": json.dumps(CASES), "solutions": '["print(2)"]'}, STDIO),
    "code-contests": (
        {"description": "Double the number.", "public_tests": {"input": ["1\n"], "output": ["2\n"]},
         "solutions": {"language": [2, 3], "solution": ["C++", "print(2)"]}},
        STDIO,
    ),
    "nemo-gym": (
        {"responses_create_params": {"input": [{"role": "user", "content": CHAT}]},
         "verifier_metadata": {"unit_tests": CASES}},
        STDIO,
    ),
    "verl": (
        {"prompt": [{"role": "user", "content": "Double the number."}],
         "reward_model": {"ground_truth": json.dumps(CASES)}},
        STDIO,
    ),
    "stdio": ({"problem": "Double the number.", "tests": CASES}, STDIO),
}  # fmt: skip


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str, **fields: Any) -> list[Problem]:
    return list(read_source(SourceSpec(name="s", path=path, **fields)))


@pytest.mark.parametrize("shape", MATH_ROWS)
def test_math_shape(shape: str, tmp_path: Path) -> None:
    row, fields = MATH_ROWS[shape]
    (problem,) = read(write(tmp_path / "rows.jsonl", row), **fields)
    assert (problem.statement, problem.answer, problem.kind) == ("Find $n$.", "16", "math")
    assert problem.place == "rows.jsonl:1"
    spec = EvaluationSet(name="e", path=str(tmp_path / "rows.jsonl"))
    assert list(read_statements(spec)) == [("rows.jsonl:1", "Find $n$.")]


@pytest.mark.parametrize("shape", CODE_ROWS)
def test_code_shape(shape: str, tmp_path: Path) -> None:
    row, tests = CODE_ROWS[shape]
    path = write(tmp_path / "rows.jsonl", row)
    assert describe_source(SourceSpec(name="s", path=path, kind="code")) == shape
    (problem,) = read(path, kind="code")
    assert problem.tests == tests and read_tests(problem.tests) == tests  # as the reward reads them
    assert "number" in problem.statement or "def f(x)" in problem.statement
    assert "You are helpful" not in problem.statement
    assert list(read_statements(EvaluationSet(name="e", path=path, kind="code"))) == [
        ("rows.jsonl:1", problem.statement)
    ]


def test_every_code_adapter_has_a_row_here() -> None:
    assert set(CODE_ROWS) == {name for name, adapter in ADAPTERS.items() if adapter.kind == "code"}


@pytest.mark.parametrize(
    ("starter", "function"), [("", "double"), ("class Solution:\n  def double", "Solution().double")]
)
def test_calls_become_assert_statements(starter: str, function: str, tmp_path: Path) -> None:
    row = {"question": "Double.", "input_output": json.dumps(CALL), "starter_code": starter}
    (problem,) = read(write(tmp_path / "rows.jsonl", row), kind="code")
    assert [test["code"] for test in problem.tests or []] == [
        f"assert {function}(*[1]) == 2",  # each output was in a list of its own
        f"assert {function}(*['a']) == 'aa'",
    ]
    for test in problem.tests or []:  # and they are right
        program = "def double(x): return 2 * x\nclass Solution:\n  def double(self, x): return 2 * x\n"
        exec(program + test["code"], {})


def test_the_name_of_a_called_function_is_no_code(tmp_path: Path) -> None:
    row = {"question": "Double.", "input_output": json.dumps({**CALL, "fn_name": "f(); import os; g"})}
    with pytest.raises(DataError, match="no name of a function"):
        read(write(tmp_path / "rows.jsonl", row), kind="code")


def test_columns_rename_for_an_adapter(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"description": "Double.", "cases": CASES})
    (problem,) = read(path, kind="code", columns={"tests": "cases"})
    assert problem.tests == STDIO


def test_gzipped_lines(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"question": "Q", "answer": "1"}).encode()))
    assert [problem.place for problem in read(str(path))] == ["rows.jsonl.gz:1"]


def test_bad_rows_are_reported_and_left_out(tmp_path: Path) -> None:
    good = {"question": "Q", "answer": "1", "year": 1999}
    path = write(tmp_path / "rows.jsonl", good, "{broken\n", '["no", "object"]\n', {"question": "", "answer": "2"},
                 {"question": "R", "answer": None}, {**good, "question": "S"})  # fmt: skip
    bad: list[DataError] = []
    spec = SourceSpec(name="s", path=path, keep=["year"])
    problems = list(read_source(spec, bad.append))
    assert [problem.statement for problem in problems] == ["Q", "S"] and problems[0].kept == {"year": "1999"}
    assert [error.field.rpartition(":")[2] for error in bad] == ["2", "3", "4", "5"]
    with pytest.raises(DataError, match="rows.jsonl:2: not a JSON object"):
        list(read_source(spec))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "code"}, "no adapter knows rows with the columns answer, question"),
        ({"columns": {"answer": "anser"}}, "did you mean 'answer'"),
        ({"keep": ["url"]}, "there is no column 'url'"),
    ],
)
def test_unknown_columns(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"question": "Q", "answer": "1"})
    with pytest.raises(DataError, match=message):
        describe_source(SourceSpec(name="s", path=path, **fields))
    with pytest.raises(DataError, match=message):
        read(path, **fields)


def test_unknown_adapter() -> None:
    with pytest.raises(ValueError, match="did you mean humaneval|did you mean 'humaneval'"):
        SourceSpec(name="s", path="x.jsonl", kind="code", adapter="humanevl")
