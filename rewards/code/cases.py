"""Tests as data sets write them, and the two kinds that they become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FIELDS = {"stdio": ("input", "output"), "assert": ("code",)}


@dataclass(frozen=True)
class StdioTest:
    """The program as a script: `input` on standard input must give `output` on standard output."""

    input: str
    output: str


@dataclass(frozen=True)
class AssertTest:
    """Code that uses the program's names and raises on failure."""

    code: str


Test = StdioTest | AssertTest


def parse_tests(tests: Sequence[Mapping[str, Any]]) -> list[Test]:
    """Raises ValueError naming the entry and the field. Fields with the value None count as absent: a table
    whose rows have different fields fills them up with None. Other unknown fields are ignored."""
    if isinstance(tests, (str, bytes)) or not isinstance(tests, Sequence):
        raise ValueError(f"tests must be a list of dicts, not {type(tests).__name__}")
    return [_parse(i, test) for i, test in enumerate(tests)]


def _parse(i: int, test: object) -> Test:
    if not isinstance(test, Mapping):
        raise ValueError(f"tests[{i}] must be a dict with a key 'type', not {type(test).__name__}")
    kind = test.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(f"tests[{i}].type must be 'stdio' or 'assert', not {kind!r}")
    for name in _FIELDS[kind]:
        value = test.get(name)
        if not isinstance(value, str):
            raise ValueError(f"tests[{i}].{name} must be a string, not {_kind(value)}")
    if kind == "stdio":
        return StdioTest(test["input"], test["output"])
    if not test["code"].strip():
        raise ValueError(f"tests[{i}].code is blank, which every program would pass")
    return AssertTest(test["code"])


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__
