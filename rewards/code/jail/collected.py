"""Tests that a runner would find: TestCase classes, test functions and test methods that nothing in the text calls.

Without this they would never run, and every program would pass.
"""

import ast
import asyncio
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any


def run(tree: ast.Module, module: types.ModuleType) -> None:
    """Raises the first failure."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for name, value in list(module.__dict__.items()):
        if getattr(value, "__module__", None) != module.__name__ or name in read:
            continue
        if inspect.isfunction(value) and name.startswith("test"):
            _call(value)
        elif isinstance(value, type) and _is_test_case(value):
            _run_test_case(value)
        elif isinstance(value, type) and name.startswith("Test"):
            _run_methods(value)


def _is_test_case(kind: type) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(kind, unittest.TestCase)


def _run_test_case(kind: Any) -> None:
    import unittest

    raised: list[BaseException] = []

    class Result(unittest.TestResult):
        def addFailure(self, test: Any, err: Any) -> None:
            raised.append(err[1])

        addError = addFailure

        def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
            if err is not None:
                raised.append(err[1])

        def addUnexpectedSuccess(self, test: Any) -> None:
            raised.append(AssertionError("unexpected success"))

    unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(Result())
    if raised:
        raise raised[0]


def _run_methods(kind: Any) -> None:
    for name in [name for name in dir(kind) if name.startswith("test")]:
        made = kind()
        for step in ("setup_method", name, "teardown_method"):
            if callable(getattr(made, step, None)):
                _call(getattr(made, step))


def _call(function: Callable[..., Any]) -> None:
    """Without arguments: pytest's fixtures and parameters are not for us."""
    result = function()
    if inspect.iscoroutine(result):
        asyncio.run(result)
