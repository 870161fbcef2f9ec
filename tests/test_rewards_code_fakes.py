"""Programs that try to pass a test without its answer, all scored as failed."""

from textwrap import dedent

import pytest
from sandboxes import LIMITS, needs_sandbox

from rewards.code import run_tests

pytestmark = needs_sandbox

# The answer is 1764, which no program here computes; every program is hostile at its import or at its call.
TEST = {"type": "assert", "code": "import math\nassert solve(42) == 1764\nassert math.isclose(solve(42), 1764)"}

FAKES = {
    "exit with status 0": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "exit inside the call": "import os\ndef solve(x): os._exit(0)",
    "sys.exit inside the call": "def solve(x): raise SystemExit(0)",
    "KeyboardInterrupt": "def solve(x): raise KeyboardInterrupt",
    "exit at the end": "import atexit, os; atexit.register(os._exit, 0)",
    "markers on every descriptor": """
        import os
        for fd in range(256):
            for text in (b'["passed", ""]', b'{"status": 0, "clean": true}\\n', b'passed', b'OK'):
                try: os.write(fd, text)
                except OSError: pass
        os._exit(0)
    """,
    "frames of the protocol": """
        import json, os, struct
        for message in (['value', None, []], ['value', [['solve', 1764]], []], ['value', 1764, []], ['passed', '']):
            data = json.dumps(message).encode()
            os.write(4, struct.pack('<I', len(data)) + data)
        os._exit(0)
    """,
    "a frame too large": "import os; os.write(4, b'\\xff' * 100); import time; time.sleep(9)",
    "a frame of rubbish": "import os; os.write(4, b'\\x04\\0\\0\\0[[[[')\ndef solve(x): return 1",
    "a call into the judge": """
        import json, os, struct
        def solve(x):
            for operation in ('getattr', 'call', 'load', 'globals', 'setattr', 'eval'):
                data = json.dumps([operation, 0, ['__globals__'], []]).encode()
                os.write(4, struct.pack('<I', len(data)) + data)
            return 1764.5
    """,
    "a patched assertion": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
    "def solve(x): return 1",
    "patched builtins": """
        import builtins
        for name in ('abs', 'all', 'any', 'isinstance', 'len', 'sorted', 'set'):
            setattr(builtins, name, lambda *a, **k: 1764)
        def solve(x): return 0
    """,
    "a patched standard library": "import math\nmath.isclose = lambda *a, **k: True\nclass E(float):\n"
    "    def __eq__(self, other): return True\ndef solve(x): return E(1)",
    "patched modules": """
        import sys, types
        fake = types.ModuleType('math'); fake.isclose = lambda *a, **k: True
        sys.modules['math'] = sys.modules['unittest'] = fake
        math = fake
        def solve(x): return 0
    """,
    "equal to everything": "class E:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
    "def solve(x): return E()",
    "not unequal to anything": "class E:\n    def __ne__(self, other): return False\n"
    "    def __eq__(self, other): return True\ndef solve(x): return E()",
    "a lying int": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def solve(x): return E(5)",
    "a lying str": "class E(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
    "def solve(x): return E('5')",
    "a lying float": "class E(float):\n    def __eq__(self, other): return True\n"
    "    def __sub__(self, other): return 0.0\n"
    "    __rsub__ = __sub__\ndef solve(x): return E(5)",
    "a lying list": "class E(list):\n    def __eq__(self, other): return True\n    def __len__(self): return 1764\n"
    "    def __iter__(self): return iter([1764])\ndef solve(x): return E()",
    "a lying dict": "class E(dict):\n    def __eq__(self, other): return True\n"
    "    def __missing__(self, key): return 1764\n"
    "def solve(x): return E()",
    "a lying class": "class M(type):\n    def __eq__(cls, other): return True\n    __hash__ = type.__hash__\n"
    "class E(metaclass=M): pass\ndef solve(x): return E",
    "a lying __class__": "class E:\n    __class__ = int\n    def __eq__(self, other): return True\n"
    "def solve(x): return E()",
    "a mock": "from unittest.mock import MagicMock, ANY\ndef solve(x): return ANY",
    "not a number": "def solve(x): return float('nan')",
    "expected values in frames": """
        import gc, sys
        def solve(x):
            frame, wanted = sys._getframe(), '4671'
            seen = []
            while frame:
                seen += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, (list, tuple)) and len(thing) < 50: seen += thing
            return next((value for value in seen if type(value) is int and str(value)[::-1] == wanted), 0)
    """,
    "the test in files": """
        import glob, re
        def solve(x):
            for path in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + glob.glob('/**/test*.py'):
                try: text = open(path, errors='replace').read()
                except OSError: continue
                found = re.search(r'solve\\(42\\) == (\\d+)', text)
                if found: return int(found[1])
            return 0
    """,
    "a tracer": "import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef solve(x): return 1",
    "a patched encoder": """
        import json, sys
        json.dumps = lambda *a, **k: '["value", {"any": 1}, []]'
        for frame in [sys._getframe()]:
            while frame:
                frame.f_globals.setdefault('json', json)
                frame = frame.f_back
        def solve(x): return object()
    """,
    "other frames' functions": """
        import sys
        frame = sys._getframe()
        while frame:
            for name, value in list(frame.f_globals.items()):
                if name in ('rebuild', '_describe', 'json', 'Encoder', 'Decoder'):
                    frame.f_globals[name] = None
            frame = frame.f_back
        def solve(x): return 1
    """,
    "an import hook": "import sys\nclass H:\n    def find_spec(self, *a): raise SystemExit(0)\n"
    "sys.meta_path.insert(0, H())\ndef solve(x): return 1",
    "a result without end": "def solve(x):\n    while True: yield 1764",
    "a deep result": "def solve(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "a circular result": "def solve(x):\n    a = []\n    a.append(a)\n    return a",
    "a huge result": "def solve(x): return 'x' * (64 << 20)",
    "a huge number": "def solve(x): return 1 << (1 << 26)",
    "an exception with a trick": "class E(AssertionError):\n    def __init__(self): pass\n"
    "    args = property(lambda s: 1/0)\n"
    "def solve(x): raise E",
    "work at deletion": "import os\nclass E:\n    def __del__(self): os._exit(0)\ndef solve(x):\n    E()\n    return 1",
    "killing all": "import os\ndef solve(x): os.kill(-1, 9); os.kill(0, 9)",
    "a name of the test": "def assert_(x): pass\nmath = check = candidate = isclose = lambda *a, **k: True\n"
    "def solve(x): return True",
    "answers given in advance": """
        import json, os, struct
        def solve(x):
            for message in (['value', 1764.0, [[0, ['list', [1764]]]]], ['value', True, []], ['yours', 0]):
                data = json.dumps(message).encode()
                os.write(4, struct.pack('<I', len(data)) + data)
            return 0
    """,
    "contents for what was never sent": """
        import json, os, struct
        def solve(x):
            data = json.dumps(['value', 0, [[key, ['list', [1764]]] for key in range(9)]]).encode()
            os.write(4, struct.pack('<I', len(data)) + data)
            os._exit(0)
    """,
    "a named tuple with names of methods": """
        import collections
        class E(tuple):
            _fields = ('__eq__', '__hash__')
        def solve(x): return E((1, 2))
    """,
    "a lying float conversion": "class E:\n    def __float__(s): return 1764.0\n"
    "    __index__ = __int__ = lambda s: 1764\ndef solve(x): return E()",
    "a huge decimal": "from decimal import Decimal\ndef solve(x): return Decimal('1e999999')",
    "a fraction by nothing": """
        import json, os, struct
        def solve(x):
            data = json.dumps(['value', ['fraction', 1, 0], []]).encode()
            os.write(4, struct.pack('<I', len(data)) + data)
    """,
    "callbacks without end": """
        import json, os, struct
        def solve(x):
            data = json.dumps(['call', 0, [], []]).encode()
            while True: os.write(4, struct.pack('<I', len(data)) + data)
    """,
    "no program": "",
    "broken syntax": "def solve(x: return 1764",
    "NUL and surrogates": "def solve(x): return '\\x00\\ud800\\udfff'",
}


@pytest.mark.parametrize("name", FAKES)
def test_fake_pass_fails(name: str) -> None:
    result = run_tests(dedent(FAKES[name]), [TEST], **LIMITS)
    assert result.outcomes[0] in ("wrong_answer", "runtime_error", "timeout", "memory", "output_limit")


def test_the_test_of_the_fakes_can_be_passed() -> None:
    assert run_tests("def solve(x): return x * x", [TEST], **LIMITS).all_passed


# Tests whose own form invites cheating, each with a program that would pass if the program had a say in it.
INVITATIONS = {
    "abs": ("assert abs(solve(2) - 4) < 1e-6", "class E:\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n"
            "    def __abs__(s): return 0\n    def __lt__(s, o): return True\ndef solve(x): return E()\n"
            "abs = lambda x: 0"),
    "math without an import": ("assert math.isclose(solve(2), 4)",
                               "class math:\n    isclose = lambda *a: True\ndef solve(x): return 0"),
    "membership": ("assert 4 in solve(2)", "class E:\n    def __contains__(s, x): return True\n"
                   "    def __iter__(s): return iter([1])\ndef solve(x): return E()"),
    "membership the other way": ("assert solve(2) in (4, 5)", "class E:\n    def __eq__(s, o): return True\n"
                                 "def solve(x): return E()"),
    "order": ("assert 3 < solve(2) < 5", "class E:\n    __lt__ = __gt__ = lambda s, o: True\ndef solve(x): return E()"),
    "sets": ("assert set(solve(2)) == {4}", "class E:\n    def __eq__(s, o): return True\n"
    "    def __hash__(s): return 4\n"
             "def solve(x): return [E()]\nset = lambda x: {4}"),
    "sorting": ("assert sorted(solve(2)) == [1, 2]", "def sorted(x): return [1, 2]\ndef solve(x): return []"),
    "a type": ("assert isinstance(solve(2), int)", "class E:\n    __class__ = int\ndef solve(x): return E()\n"
               "isinstance = lambda *a: True"),
    "a swallowed end": ("try:\n    solve(2)\nexcept BaseException:\n    pass", "import os\ndef solve(x): os._exit(0)"),
    "an expected error": ("try:\n    solve(2)\nexcept ValueError:\n    pass\nelse:\n    assert False",
                          "def solve(x): raise SystemExit"),
    "a callback's globals": (
        "EXPECTED = 99\ndef helper(x): return x\nassert solve(helper) == EXPECTED",
        "def solve(f):\n    for name in ('__globals__', '__code__', '__closure__', 'gi_frame', 'f_globals'):\n"
        "        try: return getattr(f, name)['EXPECTED']\n        except (AttributeError, TypeError): pass",
    ),
    "a generator's frame": (
        "EXPECTED = 99\nassert solve(x for x in [1]) == EXPECTED",
        "def solve(g):\n    try: return g.gi_frame.f_globals['EXPECTED']\n    except AttributeError: return 0",
    ),
    "a shadowed method": (
        "class Account:\n    def __init__(self): self.sum = 0\n    def ok(self): return self.sum == 4\n"
        "a = Account()\nsolve(a)\nassert a.ok()",
        "def solve(a): a.ok = lambda: True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVITATIONS)
def test_an_invitation_to_cheat_is_declined(name: str) -> None:
    code, program = INVITATIONS[name]
    outcome = run_tests(program, [{"type": "assert", "code": code}], **LIMITS).outcomes[0]
    assert outcome in ("wrong_answer", "runtime_error"), outcome.detail


def test_expected_outputs_of_stdio_tests_are_not_in_the_sandbox() -> None:
    program = """
        import gc, glob, os
        wanted = 'secret' + '-output'
        def holds(text): return wanted in text
        found = any(isinstance(x, str) and holds(x) and len(x) < 50 for x in gc.get_objects())
        for path in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + glob.glob('/scratch/*'):
            try: found = found or holds(open(path, errors='replace').read())
            except OSError: pass
        print('secret-' + 'output' if found else 'nothing')
    """
    result = run_tests(dedent(program), [{"type": "stdio", "input": "", "output": "secret-output"}])
    assert result.outcomes[0] == "wrong_answer" and "nothing" in result.outcomes[0].detail
