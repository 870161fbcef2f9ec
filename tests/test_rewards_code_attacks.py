"""Hostile programs: contained, scored as failed, and the machine as before.

Escapes print ESCAPED if they succeed, which their test expects: a contained attack fails its test, one that
gets out passes it. Fakes try to pass an assert test without its answer.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from rewards.code import SandboxUnavailable, check_sandbox, run_many, run_tests

LIMITS = {"timeout_s": 1.5, "memory_mb": 256, "max_processes": 16, "max_file_mb": 8, "max_output_mb": 1}


def _available() -> bool:
    try:
        check_sandbox("auto")
    except SandboxUnavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(not _available(), reason="no sandbox works on this machine")


class Canary:
    """What the attacks are after, on this machine."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "canary.txt"
        self.file.write_text("alive")
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0canary-{os.getpid()}")
        self.unix.listen()

    def fill_in(self, program: str) -> str:
        known = {
            "CANARY_FILE": str(self.file),
            "CANARY_PID": self.process.pid,
            "PARENT_PID": os.getpid(),
            "PORT": self.tcp.getsockname()[1],
            "ABSTRACT": f"\0canary-{os.getpid()}",
            "REPOSITORY": str(Path(__file__).parents[1]),
        }
        return "".join(f"{name} = {value!r}\n" for name, value in known.items()) + dedent(program)

    def check(self) -> None:
        assert self.file.read_text() == "alive"
        assert self.process.poll() is None
        assert os.environ["CANARY_SECRET"] == "hush"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.tcp.close()
        self.unix.close()


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canary]:
    os.environ["CANARY_SECRET"] = "hush"
    made = Canary(tmp_path_factory.mktemp("canary"))
    yield made
    made.close()
    del os.environ["CANARY_SECRET"]


# -- escapes ----------------------------------------------------------------------------------------

SYSCALL = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    arm = os.uname().machine == "aarch64"
    def call(x86, arm_number, *arguments):
        result = libc.syscall(arm_number if arm else x86, *arguments)
        assert result != -1, os.strerror(ctypes.get_errno())
        return result
"""

ESCAPES = {
    # network
    "tcp": "import socket; socket.create_connection(('127.0.0.1', PORT), 1); print('ESCAPED')",
    "udp": "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', PORT))\n"
    "print('ESCAPED')",
    "tcp over ipv6": "import socket; socket.socket(socket.AF_INET6); print('ESCAPED')",
    "raw socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); print('ESCAPED')",
    "dns": "import socket; socket.getaddrinfo('example.com', 80); print('ESCAPED')",
    "abstract unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(ABSTRACT); print('ESCAPED')",
    # files and environment
    "read a file of the user": "open(CANARY_FILE).read(); print('ESCAPED')",
    "read the accounts": "open('/etc/passwd').read(); print('ESCAPED')",
    "read the repository": "import os; os.listdir(REPOSITORY); print('ESCAPED')",
    "read the parent's environment": """
        import glob, os
        found = [name for name in os.environ if 'CANARY' in name]
        for path in glob.glob('/proc/[0-9]*/environ'):
            try:
                found += [path] if b'CANARY_SECRET' in open(path, 'rb').read() else []
            except OSError:
                pass
        assert found
        print('ESCAPED')
    """,
    "see the host's processes": "import os; os.stat(f'/proc/{CANARY_PID}'); print('ESCAPED')",
    "read the first process's memory": "open('/proc/1/mem', 'rb').read(1); print('ESCAPED')",
    "read the first process's descriptors": "import os; os.listdir('/proc/1/fd'); print('ESCAPED')",
    "the first process's root": "import os; os.listdir('/proc/1/root/'); print('ESCAPED')",
    "overwrite a file of the user": "open(CANARY_FILE, 'w').write('dead'); print('ESCAPED')",
    "write to the root": "open('/owned', 'w').write('x'); print('ESCAPED')",
    "write to /usr": "open('/usr/owned', 'w').write('x'); print('ESCAPED')",
    "write to the standard library": "import os; open(os.__file__, 'a').write('#'); print('ESCAPED')",
    "write to /dev": "open('/dev/owned', 'w').write('x'); print('ESCAPED')",
    "write to /proc": "open('/proc/sys/kernel/core_pattern', 'w').write('x'); print('ESCAPED')",
    "link out of scratch": "import os; os.symlink(CANARY_FILE, 'link'); open('link').read(); print('ESCAPED')",
    "climb out of scratch": "open('../../../../../../..' + CANARY_FILE).read(); print('ESCAPED')",
    "device nodes": "import os, stat; os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0)); print('ESCAPED')",
    "inherited descriptors": """
        import os, stat
        found = []
        for fd in range(3, 1024):
            try:
                os.fstat(fd)
                found.append(fd)
            except OSError:
                pass
        assert found
        print('ESCAPED')
    """,
    # other processes
    "signal the parent": "import os; os.kill(PARENT_PID, 9); os.kill(CANARY_PID, 9); print('ESCAPED')",
    "limit the first process": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)); print('ESCAPED')",
    "priority of the first process": "import os; os.setpriority(os.PRIO_PROCESS, 1, 19); print('ESCAPED')",
    "raise own limits": """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print('ESCAPED')
    """,
    "become root": "import os; os.setuid(0) if os.getuid() else os.chroot('/'); print('ESCAPED')",
    # system calls
    "ptrace": SYSCALL + "    call(101, 117, 16, 1, 0, 0); print('ESCAPED')",
    "ptrace a child": SYSCALL + "    call(101, 117, 0, 0, 0, 0); print('ESCAPED')",
    "read another process": SYSCALL + "    call(310, 270, 1, 0, 0, 0, 0, 0); print('ESCAPED')",
    "unshare a user namespace": SYSCALL + "    call(272, 97, 0x10000000); print('ESCAPED')",
    "clone into a namespace": SYSCALL
    + """
    pid = call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    print('ESCAPED')
    """,
    "clone3": SYSCALL + "    call(435, 435, (ctypes.c_uint64 * 11)(0x10000000), 88); print('ESCAPED')",
    "mount": SYSCALL + "    call(165, 40, b'none', os.getcwd().encode(), b'tmpfs', 0, 0); print('ESCAPED')",
    "unmount": SYSCALL + "    call(166, 39, b'/proc', 2); print('ESCAPED')",
    "chroot": "import os; os.chroot('.'); print('ESCAPED')",
    "bpf": SYSCALL + "    call(321, 280, 0, 0, 0); print('ESCAPED')",
    "perf events": SYSCALL + "    call(298, 241, 0, 0, -1, -1, 0); print('ESCAPED')",
    "io_uring": SYSCALL + "    call(425, 425, 1, (ctypes.c_char * 120)()); print('ESCAPED')",
    "userfaultfd": SYSCALL + "    call(323, 282, 1); print('ESCAPED')",
    "keyring": SYSCALL + "    call(250, 219, 0, -3, 1); print('ESCAPED')",
    "kernel log": SYSCALL + "    call(103, 116, 10, 0, 0); print('ESCAPED')",
    "System V shared memory": SYSCALL + "    call(29, 194, 0, 4096, 0o1600); print('ESCAPED')",
    "memory files": "import os; os.memfd_create('x'); print('ESCAPED')",
    "x32 system call": SYSCALL + "    assert not arm; call(0x40000000 + 39, 0); print('ESCAPED')",
    "push into the terminal": SYSCALL
    + """
    import fcntl
    fcntl.ioctl(0, 0x5412, b'x')
    print('ESCAPED')
    """,
    # "int 0x80": the 32-bit system calls, numbered differently
    "32-bit system call": """
        import ctypes, mmap, os
        assert os.uname().machine == 'x86_64'
        code = bytes.fromhex('53' 'b814000000' 'cd80' '5b' 'c3')  # push rbx; mov eax, 20 (getpid); int 0x80
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(code)
        function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        assert function() > 0
        print('ESCAPED')
    """,
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_is_contained(name: str, canary: Canary) -> None:
    test = {"type": "stdio", "input": "", "output": "ESCAPED"}
    result = run_tests(canary.fill_in(ESCAPES[name]), [test], **LIMITS)
    # The attack itself must have failed, not its syntax.
    assert result.outcomes[0] == "runtime_error", result.outcomes[0].detail
    assert "SyntaxError" not in result.outcomes[0].detail and "NameError" not in result.outcomes[0].detail
    canary.check()


HARMLESS_OUTSIDE = ["read a file of the user", "read the accounts", "read the repository", "tcp",
                    "see the host's processes", "memory files", "climb out of scratch"]  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS_OUTSIDE)
def test_the_same_attack_succeeds_without_a_sandbox(name: str, canary: Canary) -> None:
    test = {"type": "stdio", "input": "", "output": "ESCAPED"}
    assert run_tests(canary.fill_in(ESCAPES[name]), [test], sandbox="none", timeout_s=20).all_passed


def test_the_first_process_cannot_be_ended_from_inside() -> None:
    program = """
        import os, signal, time
        for number in set(signal.valid_signals()):
            os.kill(1, number)
        time.sleep(0.1)
        print(os.stat('/proc/1').st_mode > 0)
    """
    assert run_tests(dedent(program), [{"type": "stdio", "input": "", "output": "True"}] * 2).all_passed


# -- using up the machine ---------------------------------------------------------------------------

EXHAUSTION = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", {"runtime_error", "timeout"}),
    "quiet fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout", "memory", "runtime_error"},
    ),
    "thread bomb": ("import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
                    {"runtime_error", "timeout"}),
    "memory in a list": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory"}),
    "memory by mmap": ("import mmap\nx = [mmap.mmap(-1, 1 << 20) for _ in range(10000)]", {"runtime_error", "memory"}),
    "one huge allocation": ("x = bytearray(1 << 40)", {"memory"}),
    "memory in many processes": (
        """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                x = bytearray(b'x') * (100 << 20)
                time.sleep(60)
        time.sleep(60)
        """,
        {"memory"},
    ),
    "shared memory files": (
        "for i in range(1000): open(f'/dev/shm/{i}', 'wb').write(bytes(1 << 20))",
        {"runtime_error"},
    ),
    "a huge file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", {"runtime_error"}),
    "a huge sparse file": ("open('big', 'wb').truncate(1 << 40)", {"runtime_error"}),
    "many files": ("i = 0\nwhile True:\n    open(f'f{i}', 'w').close()\n    i += 1", {"runtime_error"}),
    "deep folders": ("import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')", {"runtime_error", "timeout"}),
    "output flood": ("while True: print('ESCAPED' * 1000)", {"output_limit"}),
    "error flood": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {"output_limit"}),
    "warning flood": ("import warnings\nwarnings.simplefilter('always')\nwhile True: warnings.warn('x' * 100)",
                      {"output_limit", "timeout"}),
    "sleep": ("import time; time.sleep(1000)", {"timeout"}),
    "busy loop": ("while True: pass", {"timeout"}),
    "a long power": ("9 ** 9 ** 9", {"timeout", "memory"}),
    "a hopeless pattern": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", {"timeout"}),
    "ignored signals": (
        """
        import signal, time
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True: time.sleep(1)
        """,
        {"timeout"},
    ),
    "stopping itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    "endless recursion": ("def f(): f()\nf()", {"runtime_error"}),
    "crash": ("import ctypes; ctypes.string_at(0)", {"runtime_error"}),
    "crash by recursion": (
        "import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        {"runtime_error", "memory", "timeout"},
    ),
    "many descriptors": ("import os\nx = [os.pipe() for _ in range(10**6)]", {"runtime_error"}),
    "closing everything": ("import os; os.closerange(0, 1000); os.abort()", {"runtime_error"}),
    "standard input forever": ("import sys\nwhile True: sys.stdin.read()", {"timeout"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXHAUSTION)
def test_exhaustion_is_stopped(name: str, canary: Canary) -> None:
    program, expected = EXHAUSTION[name]
    start = time.monotonic()
    result = run_tests(dedent(program), [{"type": "stdio", "input": "", "output": "ESCAPED"}], **LIMITS)
    assert result.outcomes[0] in expected, (str(result.outcomes[0]), result.outcomes[0].detail)
    assert time.monotonic() - start < 15
    canary.check()


def test_daemons_do_not_outlive_their_test() -> None:
    marker = f"daemon-of-{os.getpid()}"
    program = f"""
        import ctypes, os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(15, {marker[:15]!r}.encode())
                time.sleep(600)
            os._exit(0)
        time.sleep(0.2)
        print('ESCAPED')
    """
    tests = [{"type": "stdio", "input": "", "output": "ESCAPED"}]
    assert run_tests(dedent(program), tests).all_passed  # it may start one ...
    names = {path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()}
    assert marker[:15] not in names  # ... but not keep it


def test_nothing_passes_from_one_test_to_the_next() -> None:
    program = """
        import os, sys
        print(int(os.path.exists('left') or os.path.exists('/dev/shm/left')))
        open('left', 'w').close()
        open('/dev/shm/left', 'w').close()
    """
    tests = [{"type": "stdio", "input": "", "output": "0"}] * 3
    assert run_tests(dedent(program), tests).all_passed
    counting = "import sys\nseen = getattr(sys, 'seen', 0)\nsys.seen = seen + 1\ndef f(): return seen"
    assert run_tests(counting, [{"type": "assert", "code": "assert f() == 0"}] * 3).all_passed


# -- faking a pass ----------------------------------------------------------------------------------

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
    "no program": "",
    "broken syntax": "def solve(x: return 1764",
    "NUL and surrogates": "def solve(x): return '\\x00\\ud800\\udfff'",
}


@pytest.mark.parametrize("name", FAKES)
def test_fake_pass_fails(name: str, canary: Canary) -> None:
    result = run_tests(dedent(FAKES[name]), [TEST], **LIMITS)
    assert result.outcomes[0] in ("wrong_answer", "runtime_error", "timeout", "memory", "output_limit")
    canary.check()


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


# -- afterwards -------------------------------------------------------------------------------------


def test_attacks_at_once_from_many_threads_leave_nothing_behind(canary: Canary) -> None:
    names = ["fork bomb", "output flood", "crash", "many files"]
    jobs = [(EXHAUSTION[name][0], [{"type": "stdio", "input": "", "output": "ESCAPED"}]) for name in names]
    jobs += [("def solve(x): return x * x", [TEST])]
    run_tests("", [TEST])  # the launcher is running now, and stays
    before = {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd"))}
    results = run_many(jobs * 2, workers=8, **{**LIMITS, "timeout_s": 10})
    assert [result.all_passed for result in results] == [False, False, False, False, True] * 2
    after = {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd"))}
    assert after == before
    deadline = time.monotonic() + 5
    while len(_descendants() - {canary.process.pid}) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)  # a launcher's children end a moment after the sandbox
    left = _descendants() - {canary.process.pid}
    assert len(left) <= 1, left  # the launcher
    mounts = Path("/proc/self/mounts").read_text()
    assert "/scratch" not in mounts and "/old" not in mounts
    canary.check()


def _descendants() -> set[int]:
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        for path in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            children = [int(pid) for pid in path.read_text().split()]
            found.update(children)
            waiting += children
    return found
