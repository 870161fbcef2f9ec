"""The code verifier: outcomes, limits, comparison, the connection between test and program, the reward."""

import json
import os
import time
from typing import Any

import pytest
from sandboxes import needs_sandbox, works

from rewards import RewardError, load_reward
from rewards.code import SandboxUnavailable, backends, extract_program, run_many, run_tests
from rewards.code.compare import same_output
from rewards.code.reward import check, code_reward, read_tests

SANDBOXES = [
    pytest.param(name, marks=pytest.mark.skipif(not works(name), reason=f"{name} does not work on this machine"))
    for name in ("none", "namespaces", "bubblewrap")
]
DOUBLE = "print(int(input()) * 2)"


def stdio(given: str, wanted: str) -> dict[str, str]:
    return {"type": "stdio", "input": given, "output": wanted}


def asserts(*codes: str) -> list[dict[str, str]]:
    return [{"type": "assert", "code": code} for code in codes]


# -- outcomes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_outcomes(sandbox: str) -> None:
    tests = [stdio("4", "8"), stdio("4", "9"), stdio("x", "8"), stdio("-3\n", "-6\n")]
    result = run_tests(DOUBLE, tests, sandbox=sandbox)
    assert result.outcomes == ("passed", "wrong_answer", "runtime_error", "passed")
    assert (result.passed, result.total, result.all_passed) == (2, 4, False)
    assert "ValueError" in result.outcomes[2].detail and "'8" in result.outcomes[1].detail
    cases = asserts("assert f(2) == 4", "assert f(2) == 5", "f(None)", "missing(1)", "assert f([1]) == [1, 1]")
    result = run_tests("def f(x): return x * 2", cases, sandbox=sandbox)
    assert result.outcomes == ("passed", "wrong_answer", "runtime_error", "runtime_error", "passed")


LIMITED: list[tuple[str, dict[str, Any], str]] = [
    ("while True: pass", {"timeout_s": 0.4}, "timeout"),
    ("x = bytearray(300 << 20)", {"memory_mb": 128}, "memory"),
    ("print('x' * (3 << 20))", {"max_output_mb": 1}, "output_limit"),
    ("open('f', 'wb').write(bytes(3 << 20))", {"max_file_mb": 2}, "runtime_error"),
    ("raise SystemExit(3)", {}, "runtime_error"),
]


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_each_limit_has_its_outcome(sandbox: str) -> None:
    for program, limits, outcome in LIMITED:
        tests = [stdio("", "")]
        assert run_tests(program, tests, sandbox=sandbox, **limits).outcomes == (outcome,), program
        # The same program passes, or fails by itself, without the limit.
        if limits and "while" not in program:
            wanted = "x" * (3 << 20) if "print" in program else ""
            assert run_tests(program, [stdio("", wanted)], sandbox=sandbox).all_passed, program


@needs_sandbox
def test_processes_are_limited() -> None:
    program = "import subprocess, sys\nfor _ in range(4): subprocess.Popen(['/bin/sleep', '2'])\nprint(1)"
    assert run_tests(program, [stdio("", "1")], max_processes=8).all_passed
    assert run_tests(program, [stdio("", "1")], max_processes=3).outcomes == ("runtime_error",)


def test_total_time_covers_all_tests() -> None:
    start = time.monotonic()
    result = run_tests("import time; time.sleep(9)", [stdio("", "")] * 5, total_timeout_s=0.6, sandbox="none")
    assert result.outcomes == ("timeout",) * 5 and time.monotonic() - start < 4


@needs_sandbox
def test_a_script_is_an_ordinary_script() -> None:
    program = """
import os, sys, subprocess, multiprocessing, threading, tempfile, decimal
def work(x): return x * x
if __name__ == "__main__":
    assert sys.stdin.buffer is not None and sys.argv == [""]
    text = sys.stdin.read()
    with multiprocessing.get_context("fork").Pool(2) as pool: squares = pool.map(work, range(4))
    with tempfile.NamedTemporaryFile("w+") as file: file.write("x")
    thread = threading.Thread(target=lambda: print(text.upper(), squares)); thread.start()
    sys.stdout.write("é")
"""
    result = run_tests(program, [stdio("a\nß", "éA\nSS [0, 1, 4, 9]")], compare="exact")
    assert result.all_passed or result.outcomes[0].detail.startswith("printed 'A"), result.outcomes[0].detail


@needs_sandbox
def test_strange_input_and_output_never_raise() -> None:
    for output in ("'\\ud800'", "'\\x00' * 9", "'\\u202e'"):
        assert run_tests(f"print({output})", [stdio("\ud800\x00", "y")]).outcomes[0] in (
            "wrong_answer",
            "runtime_error",
        )
    assert run_tests("import os; os.write(1, b'\\xff\\xfe')", [stdio("", "y")]).outcomes == ("wrong_answer",)
    for program in ("\x00", "\ud800", "(" * 100_000, "é = 1\nprint(é)"):
        assert run_tests(program, [stdio("", "1")]).outcomes[0] in ("runtime_error", "passed", "memory")
    big = "1 " * 500_000
    assert run_tests("print(input())", [stdio(big, big)]).all_passed
    assert run_tests("print(1)", [stdio(big, "1")]).all_passed  # input never read


@needs_sandbox
def test_run_many_from_many_threads() -> None:
    jobs = [(f"print(int(input()) + {i})", [stdio("1", str(i + 1 + i % 2))]) for i in range(24)]
    results = run_many(jobs, workers=8)
    assert [result.all_passed for result in results] == [i % 2 == 0 for i in range(24)]
    assert run_many([]) == []


# -- test and program -------------------------------------------------------------------------------

PROGRAM = """
import collections, datetime, decimal, fractions
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
    def __len__(self): return 2
    def __iter__(self): return iter((self.a, self.b))
    def __str__(self): return f"{self.a}-{self.b}"
Point = collections.namedtuple("Point", "x y")
LIMIT = 7
class Custom(ValueError): pass
def same(x): return x
def fail(kind): raise {"value": ValueError("bad"), "custom": Custom("own"), "key": KeyError("k")}[kind]
def sort(xs): xs.sort()
def grow(d): d["new"] = [1]; return d
def apply(f, *args, **keys): return f(*args, **keys)
def count(n):
    for i in range(n): yield i
def a_total(p): return p.total()
def largest(xs, key): return max(xs, key=key)
def depth(node): return 0 if node is None else 1 + max(depth(node.left), depth(node.right))
"""

PASSING = [
    "for x in (None, True, 3, 2**70, -2**5000, 1.5, 'é', b'x', (1, [2]), {1: {2}}, frozenset({1}), range(3), 1j): "
    "assert same(x) == x and type(same(x)) is type(x)",
    "import math\nassert math.isnan(same(math.nan)) and same(math.inf) == math.inf",
    "from decimal import Decimal\nfrom fractions import Fraction\nfrom datetime import *\n"
    "for x in (Decimal('1.50'), Fraction(1, 3), date(2024, 2, 29), datetime(2024, 1, 1, 2), timedelta(days=1)): "
    "assert same(x) == x and type(same(x)) is type(x)",
    "from collections import *\nfor x in (Counter('aab'), OrderedDict(a=1), deque([1, 2], 5), defaultdict(int, a=1)): "
    "assert same(x) == x and type(same(x)) is type(x)",
    "xs = [3, 1, 2]\nsort(xs)\nassert xs == [1, 2, 3]",
    "outer = [[5], [1]]\na, b = outer\nsort(outer)\nassert outer[0] is b and outer[1] is a",
    "d = {}\nassert grow(d) is d and d == {'new': [1]}",
    "xs = []\nxs.append(xs)\nassert same(xs) is xs",
    "p = Pair(1, 2)\nassert p.total() == 3 and p.a == 1 and len(p) == 2 and list(p) == [1, 2] and str(p) == '1-2'",
    "p = Pair(1, 2)\np.a = 5\nassert p.total() == 7 and same(p) is p and a_total(p) == 7",
    "assert isinstance(Pair(1, 2), Pair) and not isinstance(3, Pair)",
    "p = Point(1, 2)\nassert p == (1, 2) and p.x == 1",
    "assert LIMIT == 7 and 2 in Pair(1, 2) and 3 not in Pair(1, 2)",
    "try:\n    fail('value')\nexcept ValueError as e:\n    assert str(e) == 'bad'\nelse:\n    assert False",
    "try:\n    fail('custom')\nexcept ValueError as e:\n    assert str(e) == 'own'",
    "try:\n    fail('key')\nexcept LookupError:\n    pass",
    "assert apply(lambda x, y=1: x + y, 2, y=3) == 5",
    "assert largest(['aa', 'b'], key=len) == 'aa'",
    "def boom(x): raise KeyError(x)\ntry:\n    apply(boom, 1)\nexcept KeyError:\n    pass\nelse:\n    assert False",
    "assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6 and next(count(2)) == 0",
    "assert sorted(same(x for x in (2, 1))) == [1, 2]",
    "class Node:\n    def __init__(self, l=None, r=None): self.left, self.right = l, r\n"
    "assert depth(Node(Node(), None)) == 2",
    "def check(candidate):\n    assert candidate([1]) == [1]\ncheck(same)",
    "assert math.floor(same(1.5)) == 1",
    "import sys\nassert same(1) and 'solution' not in sys.modules and 'PROGRAM' not in globals()",
]


@needs_sandbox
def test_values_objects_and_exceptions_between_test_and_program() -> None:
    result = run_tests(PROGRAM, asserts(*PASSING))
    failed = [(PASSING[i], o, o.detail) for i, o in enumerate(result.outcomes) if o != "passed"]
    assert failed == []


@needs_sandbox
def test_a_test_that_is_no_program_says_nothing_about_the_program() -> None:
    assert run_tests(PROGRAM, asserts("assert ==")).outcomes == ("sandbox_error",)


@needs_sandbox
def test_a_main_block_is_not_run_for_assert_tests() -> None:
    program = "def f(): return 1\nif __name__ == '__main__': print(f(int(input())))"
    assert run_tests(program, asserts("assert f() == 1")).all_passed


@needs_sandbox
def test_installed_packages_only_if_asked() -> None:
    program = "import numpy\ndef f(n): return numpy.arange(n) * 2.0\n"
    tests = asserts("assert f(3).tolist() == [0, 2, 4] and f(3).sum() == 6 and f(3).shape == (3,)")
    assert run_tests(program, tests).outcomes == ("runtime_error",)
    assert run_tests(program, tests, site_packages=True, memory_mb=4096).all_passed


# -- arguments --------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tests": "x"}, "tests must be a list"),
    ({"tests": [3]}, r"tests\[0\] must be a dict"),
    ({"tests": [stdio("", ""), {"type": "unit"}]}, r"tests\[1\]\.type must be"),
    ({"tests": [{"type": "stdio", "input": "x"}]}, r"tests\[0\]\.output must be a string, not missing"),
    ({"tests": [{"type": "assert", "code": 3}]}, r"tests\[0\]\.code must be a string, not int"),
    ({"tests": [{"type": "assert", "code": " \n"}]}, r"tests\[0\]\.code is blank"),
    ({"program": None}, "program must be a string"),
    ({"timeout_s": 0}, "timeout_s must be a positive number"),
    ({"timeout_s": "9"}, "timeout_s must be a number"),
    ({"memory_mb": 3}, "memory_mb must be a whole number of at least 64"),
    ({"compare": "words"}, "compare must be"),
    ({"compare": "exact", "float_tolerance": 0.1}, "float_tolerance needs"),
    ({"float_tolerance": -1}, "float_tolerance must be at least 0"),
    ({"sandbox": "docker"}, "sandbox must be one of"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_tests(**{"program": "", "tests": [], "sandbox": "none", **arguments})


def test_refusals_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        SandboxUnavailable, match="bubblewrap is not installed.*apt install bubblewrap.*`sandbox: none`"
    ):
        run_tests("", [], sandbox="bubblewrap")
    monkeypatch.setattr(backends.sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="needs Linux.*container.*remote.*sandbox: none"):
        backends.candidates("auto")


# -- comparison and extraction ----------------------------------------------------------------------


def test_comparison() -> None:
    assert same_output(" 1  2\n\n3 ", "1 2 3") and not same_output("12 3", "1 2 3") and not same_output("1 2", "1 2 3")
    assert not same_output("1.0", "1") and same_output("1.0", "1", float_tolerance=0.0)
    assert same_output("0.3333333", "0.33333334", float_tolerance=1e-6)
    assert same_output("1000001", "1000000.0", float_tolerance=1e-5)
    assert not same_output("1000001", "1000000", float_tolerance=1e-3)  # integers are exact
    assert not same_output("nan", "nan1", float_tolerance=0.5) and not same_output("inf", "1e999", float_tolerance=0.5)
    assert not same_output("1_0", "10.0", float_tolerance=0.1)
    assert same_output("a\r\nb\n\n", "a\nb", "exact") and not same_output("a  b", "a b", "exact")
    assert not same_output(" a", "a", "exact")


EXTRACTED: list[tuple[str, str | None]] = [
    ("text\n```python\nx = 1\n```\nmore", "x = 1\n"),
    ("```py\na\n```\n```\nb\n```", "b\n"),
    ("```Python\r\na\r\n```", "a\n"),
    ("```python\na\n```\nRun:\n```bash\npython a.py\n```", "a\n"),
    ("```python\na\n```\n```python\nb", None),
    ("<think>```python\na\n```</think>nothing", None),
    ("<think>never ends ```python\na\n```", None),
    ("<think>x</think>```python\na\n```", "a\n"),
    ("````python\n```\nx\n```\n````", "```\nx\n```\n"),
    ("~~~python\na\n~~~", "a\n"),
    ("x = 1", None),
    ("```python\n\n```", None),
    ("```python title=a\na\n```", "a\n"),
    ("inline ```x``` only", None),
    ("", None),
]


@pytest.mark.parametrize("completion, program", EXTRACTED)
def test_extraction(completion: str, program: str | None) -> None:
    assert extract_program(completion) == program


# -- the reward -------------------------------------------------------------------------------------


def fenced(program: str) -> str:
    return f"<think>hm</think>\n```python\n{program}\n```"


@needs_sandbox
def test_reward() -> None:
    completions = [
        fenced("def f(x): return x"),
        fenced("def f(x): return 1"),
        "no program",
        fenced("while True: pass"),
        fenced("def f(x): return x"),
        [{"role": "assistant", "content": fenced("print(input())")}],
    ]
    plain = ["assert f(1) == 1", "assert f(two) == 2"]
    tests = [plain, plain, plain, json.dumps(plain), None, json.dumps({"inputs": ["a"], "outputs": ["a"]})]
    setups = ["two = 2", "two = 2", None, None, None, None]
    scores = code_reward(completions, tests, setups, timeout_s=0.5)
    assert scores == [1.0, 0.0, 0.0, 0.0, None, 1.0]
    verdicts = [getattr(score, "verdict", None) for score in scores]
    assert verdicts == ["correct", "wrong", "unparsed", "timeout", None, "correct"]
    assert code_reward(completions[1:2], tests[1:2], ["two = 2"], score="fraction") == [0.5]
    assert code_reward(["def f(x): return x\n```"], [plain[:1]], prefill="```python\n") == [1.0]


def test_reward_is_none_where_the_sandbox_fails() -> None:
    scores = code_reward([fenced("print(1)")], [[stdio("", "1")]], sandbox="http://127.0.0.1:9/")
    assert scores == [None]


def test_tests_as_data_sets_write_them() -> None:
    filled = {"type": "stdio", "input": "1", "output": "2", "code": None}
    assert read_tests([filled]) == [filled]
    assert read_tests('["assert f()"]') == asserts("assert f()")
    assert read_tests(["assert f()"], "import x") == asserts("import x\nassert f()")
    assert read_tests(None) == read_tests([]) == read_tests("[]") == read_tests(" ") == []
    for bad in ("{", 3, {"a": 1}, [3], [{"type": "stdio"}], {"inputs": ["1"], "outputs": []}):
        with pytest.raises(ValueError, match="tests"):
            read_tests(bad)


def test_reward_arguments_are_checked_before_a_run() -> None:
    reward = load_reward({"name": "code", "args": {"sandbox": "none"}})
    assert reward.required_columns == ("tests",)
    check(sandbox="none", timeout_s=3)
    for arguments in ({"score": "some"}, {"workers": 0}, {"timeout_s": -1}, {"sandbox": "x"}, {"compare": "x"}):
        with pytest.raises(RewardError, match=f"reward 'code': {next(iter(arguments))}"):
            check(**{"sandbox": "none", **arguments})  # type: ignore[arg-type]


def test_import_is_light() -> None:
    import subprocess
    import sys

    program = (
        "import sys, rewards; print([m for m in ('sympy', 'asyncio', 'pydantic', 'rewards.code') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert ended.stdout.strip() == "[]"
