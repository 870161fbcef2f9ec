"""The shapes in which programming tasks are published, as a statement and tests that the reward `code` reads.

A statement is complete in itself: what a template of another set would have to add (the signature to fill in, the
tests that name the function) is in it, so that sets can be mixed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import DataError

# What one publisher puts before each task; templates say it their own way.
_BOILERPLATE_END = "```python\n# Your code here\n```"
_PYTHON3 = (3, "PYTHON3")  # of CodeContests' languages


@dataclass(frozen=True)
class Draft:
    """What an adapter makes of a row."""

    statement: str
    answer: str
    raw_answer: str
    tests: list[dict[str, Any]] | None = None
    setup: str = ""


def humaneval(row: Mapping[str, Any]) -> Draft:
    """HumanEval: a signature with its docstring, and a function `check` that takes the finished one."""
    stub, body = _text(row, "prompt"), str(row.get("canonical_solution") or "")
    statement = f"Complete this Python function. Give the whole function.\n\n```python\n{stub.rstrip()}\n```"
    test = f"{_text(row, 'test')}\ncheck({_text(row, 'entry_point')})"
    return _draft(statement, stub + body if body else "", [{"type": "assert", "code": test}])


def mbpp(row: Mapping[str, Any]) -> Draft:
    """MBPP: a sentence, and assert statements that alone give the function's name, so they are shown."""
    asserts = row.get("test_list")
    if not isinstance(asserts, list) or not all(isinstance(test, str) for test in asserts):
        raise DataError("", "test_list is no list of assert statements", "Mend the row, or set on_error: skip.")
    statement = _text(row, "text" if row.get("text") else "prompt").strip()
    shown = "\n".join(test.strip() for test in asserts)
    imports = row.get("test_imports") or []
    setup = "\n".join([*imports, str(row.get("test_setup_code") or "")]).strip()
    return _draft(
        f"{statement}\n\nYour code must pass these tests:\n\n```python\n{shown}\n```",
        str(row.get("code") or ""),
        [{"type": "assert", "code": test} for test in asserts if test.strip()],
        setup,
    )


def apps(row: Mapping[str, Any]) -> Draft:
    """APPS and TACO: `input_output` as JSON text, on standard input or, with `fn_name`, as arguments of a function."""
    cases = _object(row.get("input_output"), "input_output")
    statement = _text(row, "question").strip()
    starter = str(row.get("starter_code") or "").strip()
    if starter:
        statement += f"\n\nStart from this code:\n\n```python\n{starter}\n```"
    name = cases.get("fn_name")
    tests = _calls(cases, name, starter) if name else _stdio(cases)
    return _draft(statement, _first(row.get("solutions")), tests)


def code_contests(row: Mapping[str, Any]) -> Draft:
    """CodeContests: public, private and generated tests, each as a list of inputs and a list of outputs."""
    tests: list[dict[str, Any]] = []
    for name in ("public_tests", "private_tests", "generated_tests"):
        cases = row.get(name) or {}
        tests += _stdio({"inputs": cases.get("input") or [], "outputs": cases.get("output") or []}, empty=True)
    solutions = row.get("solutions") or {}
    programs = zip(solutions.get("language") or [], solutions.get("solution") or [], strict=False)
    answer = next((program for language, program in programs if language in _PYTHON3), "")
    return _draft(_text(row, "description"), answer, tests)


def nemo_gym(row: Mapping[str, Any]) -> Draft:
    """NeMo Gym: chat messages, and unit tests on standard input among the verifier's metadata."""
    turns = (row.get("responses_create_params") or {}).get("input")
    metadata = row.get("verifier_metadata") or {}
    return _draft(_last_turn(turns), "", _stdio(_object(metadata.get("unit_tests"), "verifier_metadata.unit_tests")))


def verl(row: Mapping[str, Any]) -> Draft:
    """verl: chat messages, and tests as JSON text in reward_model.ground_truth."""
    truth = (row.get("reward_model") or {}).get("ground_truth")
    return _draft(_last_turn(row.get("prompt")), "", _stdio(_object(truth, "reward_model.ground_truth")))


def stdio(row: Mapping[str, Any]) -> Draft:
    """Anything with a statement and `tests`: {"inputs": [...], "outputs": [...]} or a list of test dicts."""
    cases = _json(row.get("tests"), "tests")
    tests = [_ready(case) for case in cases] if isinstance(cases, list) else _stdio(_object(cases, "tests"))
    statement = next((str(row[name]) for name in ("problem", "prompt", "question", "description") if row.get(name)), "")
    return _draft(statement, str(row.get("answer") or row.get("code") or ""), tests, str(row.get("setup") or ""))


def _ready(case: Any) -> dict[str, Any]:
    """A test dict of ours, or one of DeepCoder's, whose type has another name."""
    kind = case.get("type") if isinstance(case, dict) else None
    if kind in ("stdio", "stdin_stdout"):
        return {"type": "stdio", "input": _lines(case.get("input")), "output": _lines(case.get("output"))}
    if kind == "assert" and isinstance(case.get("code"), str):
        return {"type": "assert", "code": case["code"]}
    if isinstance(case, str):
        return {"type": "assert", "code": case}
    raise DataError("", f"a test of type {kind!r}", "Known are stdio (or stdin_stdout) and assert.")


def _draft(statement: str, answer: str, tests: list[dict[str, Any]], setup: str = "") -> Draft:
    if not statement.strip():
        raise DataError("", "the statement is missing or empty", "Mend the row, or set on_error: skip.")
    if not tests:
        raise DataError("", "there are no tests", "Mend the row, or set on_error: skip.")
    return Draft(statement.strip(), answer, answer, tests, setup)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError("", f"{name} is missing or no text", "Mend the row, or set on_error: skip.")
    return value


def _json(value: Any, name: str) -> Any:
    """A value, or what its JSON text says."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError("", f"{name} is not JSON ({error})", "Mend the row, or set on_error: skip.") from error


def _object(value: Any, name: str) -> dict[str, Any]:
    loaded = _json(value, name)
    if not isinstance(loaded, dict):
        raise DataError("", f"{name} holds no inputs and outputs", "Mend the row, or set on_error: skip.")
    return loaded


def _pairs(cases: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    given, wanted = cases.get("inputs"), cases.get("outputs")
    if not isinstance(given, list) or not isinstance(wanted, list) or len(given) != len(wanted):
        raise DataError(
            "", "inputs and outputs are not two lists of one length", "Mend the row, or set on_error: skip."
        )
    return list(zip(given, wanted, strict=True))


def _stdio(cases: Mapping[str, Any], *, empty: bool = False) -> list[dict[str, Any]]:
    pairs = _pairs(cases)
    if not pairs and not empty:
        raise DataError("", "there are no tests", "Mend the row, or set on_error: skip.")
    return [{"type": "stdio", "input": _lines(given), "output": _lines(wanted)} for given, wanted in pairs]


def _lines(value: Any) -> str:
    """Text as it is; a list is one item a line, as some files have it."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _calls(cases: Mapping[str, Any], name: str, starter: str) -> list[dict[str, Any]]:
    """Calls with literal arguments. Outputs are often wrapped in lists of one: then all of a task's are."""
    pairs = _pairs(cases)
    if not name.isidentifier():
        raise DataError("", f"fn_name {name!r} is no name of a function", "Mend the row, or set on_error: skip.")
    wrapped = all(isinstance(wanted, list) and len(wanted) == 1 for _, wanted in pairs)
    function = f"Solution().{name}" if "class Solution" in starter else name
    return [
        {
            "type": "assert",
            "code": f"assert {function}(*{given!r}) == {(wanted[0] if wrapped else wanted)!r}",
        }
        for given, wanted in pairs
        if isinstance(given, list)
    ]


def _last_turn(turns: Any) -> str:
    """The last message of a chat, without its publisher's instructions."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        raise DataError("", "the prompt is no list of messages", "Mend the row, or set on_error: skip.")
    text = str(turns[-1].get("content") or "")
    return text.partition(_BOILERPLATE_END)[2].strip() or text


def _first(solutions: Any) -> str:
    """The first of a list of programs, or of its JSON text; "" if there is none."""
    try:
        found = json.loads(solutions) if isinstance(solutions, str) and solutions.strip() else solutions
    except ValueError:
        return ""
    return str(found[0]) if isinstance(found, list) and found else ""
