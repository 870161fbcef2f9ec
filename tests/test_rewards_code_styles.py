"""Styles in which data sets write assert tests: right programs pass, wrong ones and cheats do not."""

import pytest
from sandboxes import needs_sandbox

from rewards.code import run_tests

pytestmark = needs_sandbox

RIGHT = """
import asyncio, collections
def solve(x): return x * x
def kind(x): return type(x)
def fail(): raise ValueError("no")
async def later(x):
    await asyncio.sleep(0)
    return x * x
def gen(n): yield from range(n)
class Solution:
    def f(self, x): return x * x
class Box:
    def __init__(self, x): self.x = x
def pair(x): return collections.namedtuple("Pair", "a b")(x, x)
def raises(kind): raise kind("given")
def third(x): return x / 3
def count(text): return collections.Counter(text)
def nothing(x): return None
"""
WRONG = RIGHT.replace("x * x", "x + x + 1").replace("(x, x)", "(x, 0)").replace("x / 3", "x / 4")

# Each passes with RIGHT and fails with WRONG.
STYLES = {
    "EvalPlus": """
def is_floats(x): return isinstance(x, float)
def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp): atol = 1e-6
    assert out == exp if atol == 0 else abs(out - exp) <= atol, f"out: {out}, exp: {exp}"
inputs, results = [[2], [3]], [4, 9]
for i, (inp, exp) in enumerate(zip(inputs, results)): assertion(solve(*inp), exp, 0)
""",
    "HumanEval": "METADATA = {}\ndef check(candidate):\n    assert candidate(5) == 25\ncheck(solve)",
    "class": "s = Solution(); assert s.f(3) == 9",
    "bound method": "candidate = Solution().f\nassert candidate(3) == 9",
    "TestCase without a runner": "import unittest\nclass T(unittest.TestCase):\n"
    "    def test_it(self): self.assertEqual(solve(3), 9)",
    "TestCase and main": "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
    "        with self.subTest(1): self.assertEqual(solve(3), 9)\nunittest.main()",
    "main without exit": "import unittest\nclass T(unittest.TestCase):\n"
    "    def test_it(self): self.assertAlmostEqual(third(1), 1 / 3)\nunittest.main(argv=['x'], exit=False)",
    "test functions": "def test_it():\n    assert solve(3) == 9",
    "async test functions": "async def test_it():\n    assert await later(3) == 9",
    "test methods": "class TestIt:\n    def setup_method(self): self.x = 3\n"
    "    def test_it(self): assert solve(self.x) == 9",
    "from solution": "from solution import solve as s\ndef test_it(): assert s(3) == 9",
    "from solution, all": "from solution import *\nassert solve(3) == 9",
    "import solution": "import solution\nassert solution.solve(3) == 9",
    "asyncio.run": "import asyncio\nassert asyncio.run(later(3)) == 9",
    "gather": "import asyncio\nasync def main(): return await asyncio.gather(later(3), later(4))\n"
    "assert asyncio.run(main()) == [9, 16]",
    "namedtuple": "p = pair(3)\nassert p == (3, 3) and p.b == 3 and p._fields == ('a', 'b')",
    "isclose": "assert isclose(third(1), 1 / 3)",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n"
    "    x: int\nassert C(solve(3)) == C(9)",
    "annotations": "def run(x: List[int]) -> Optional[int]: return solve(*x)\nassert run([3]) == 9",
}
ALSO_RIGHT = {
    "type": "assert type(solve(3)) is int and kind(3) is int and kind('') == str",
    "exception class": "try:\n    raises(KeyError)\nexcept KeyError as e:\n    assert e.args == ('given',)",
    "None": "assert nothing(3) is None",
    "generator": "assert list(gen(3)) == [0, 1, 2] and sum(gen(4)) == 6",
    "deepcopy": "import copy\nb = Box([1])\nc = copy.deepcopy(b)\nb.x = [2]\n"
    "assert c.x == [1] and copy.copy(b).x == [2]",
    "assertRaises": "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
    "        with self.assertRaises(ValueError): fail()",
    "Counter": "assert Counter('aab') == count('aab')",
}


def outcome(program: str, code: str) -> str:
    result = run_tests(program, [{"type": "assert", "code": code}]).outcomes[0]
    return result if result == "passed" else f"{result}: {result.detail}"


@pytest.mark.parametrize("name", [*STYLES, *ALSO_RIGHT])
def test_right_programs_pass(name: str) -> None:
    assert outcome(RIGHT, {**STYLES, **ALSO_RIGHT}[name]) == "passed"


@pytest.mark.parametrize("name", STYLES)
def test_wrong_programs_fail(name: str) -> None:
    assert outcome(WRONG, STYLES[name]).startswith("wrong_answer")


def test_a_program_named_like_a_builtin() -> None:
    program = "def sum(a, b): return a * b"
    assert outcome(program, "assert sum(10, 15) == 150") == "passed"
    assert outcome(program, "assert sum(10, 15) == 25").startswith("wrong_answer")
    check = "def check(candidate):\n    assert abs(candidate(2, 3) - 6) < 1\ncheck(sum)"
    assert outcome(program, check) == "passed"
    # ... but not where the name could serve to judge
    assert outcome(program + "\nabs = lambda x: 0", check.replace("- 6", "- 9")).startswith("wrong_answer")
    cheat = "def sum(a, b): return 0\ndef abs(x): return 0"
    assert outcome(cheat, "assert abs(sum(10, 15) - 150) < 1e-6").startswith("sandbox_error")


CHEATS = {
    "isclose": "isclose = lambda *a, **k: True",
    "Counter": "class C:\n    def __eq__(s, o): return True\nhit = []\ndef Counter(x): return 'the same'",
    "deepcopy": "def deepcopy(x): return 0",
}


@pytest.mark.parametrize(
    "name, code",
    [
        ("isclose", "assert isclose(solve(2), 4)"),
        ("Counter", "assert Counter(solve(2)) == Counter([4])"),
        ("deepcopy", "wanted = deepcopy([4])\nassert solve(2) == wanted"),
    ],
)
def test_helpers_that_a_test_forgot_to_import_are_real(name: str, code: str) -> None:
    assert outcome(CHEATS[name] + "\ndef solve(x): return 0", code) != "passed"


def test_numpy_is_never_the_programs() -> None:
    program = "class np:\n    allclose = lambda *a, **k: True\ndef solve(x): return 0"
    assert outcome(program, "assert np.allclose(solve(2), 4)").startswith("sandbox_error: the test needs")
    result = run_tests(
        program, [{"type": "assert", "code": "assert np.allclose(solve(2), 4)"}], site_packages=True, memory_mb=4096
    )
    assert result.outcomes == ("wrong_answer",)


def test_a_test_that_cannot_tell_programs_apart_says_nothing() -> None:
    for code in ("assert True", "def check(candidate):\n    assert candidate(1) == 2", "import math\nmath.sqrt(4)"):
        assert outcome(RIGHT, code).startswith("sandbox_error: the test uses nothing of the program")
    assert outcome(RIGHT, "import no_such_module\nassert solve(2) == 4").startswith("sandbox_error")
    # The program's own failed import is its own fault.
    assert outcome("import no_such_module\ndef solve(x): return 4", "assert solve(2) == 4").startswith("runtime_error")


def test_a_metaclass_given_to_the_program_makes_no_classes_here() -> None:
    program = "def solve(t): return t('E', (), {'__eq__': lambda s, o=None: True})()"
    assert outcome(program, "assert solve(type) == 5").startswith("runtime_error")
