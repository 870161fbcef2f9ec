"""Hostile programs: contained, scored as failed, and the machine as before.

Escapes print ESCAPED if they succeed, which their test expects: a contained attack fails its test, one that
gets out passes it. Programs that fake a pass: test_rewards_code_fakes.py.
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
from sandboxes import LIMITS, needs_sandbox

from rewards.code import run_many, run_tests

pytestmark = needs_sandbox


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
    "read the repository": "open(REPOSITORY + '/pyproject.toml').read(); print('ESCAPED')",
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
    "fork bomb": ("import os\nwhile True:\n    os.fork()", {"runtime_error", "timeout", "memory"}),
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


# -- afterwards -------------------------------------------------------------------------------------


def test_attacks_at_once_from_many_threads_leave_nothing_behind(canary: Canary) -> None:
    names = ["fork bomb", "output flood", "crash", "many files"]
    jobs = [(EXHAUSTION[name][0], [{"type": "stdio", "input": "", "output": "ESCAPED"}]) for name in names]
    test = {"type": "assert", "code": "assert solve(42) == 1764"}
    jobs += [("def solve(x): return x * x", [test])]
    run_tests("", [test])  # the launcher is running now, and stays
    others = _descendants()  # the launcher, the canary, and what other tests of this process left waiting
    before = {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd"))}
    results = run_many(jobs * 2, workers=8, **{**LIMITS, "timeout_s": 10})
    assert [result.all_passed for result in results] == [False, False, False, False, True] * 2
    after = {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd"))}
    assert after == before
    deadline = time.monotonic() + 5
    while _descendants() - others and time.monotonic() < deadline:
        time.sleep(0.05)  # a launcher's children end a moment after the sandbox
    assert not _descendants() - others
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
