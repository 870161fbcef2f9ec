"""Which sandbox there is on this machine, and the command that starts it."""

import contextlib
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from .jail import seccomp
from .jail.namespaces import SCRATCH
from .launcher import Launcher
from .limits import Limits

Local = Literal["bubblewrap", "namespaces", "none"]
SANDBOXES = ("auto", *get_args(Local))

_CODE = str(Path(__file__).parent)
_ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
# Isolated as by -I, but for the hash seed: rewards must not depend on it.
_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
_START = "import sys; sys.path.insert(0, {code!r}); from jail.main import main; main()"


class SandboxUnavailable(RuntimeError):
    """No sandbox of the wanted kind can run on this machine; the message says what would help."""


def check_name(sandbox: str) -> None:
    """Raises ValueError for anything but a known sandbox or a URL."""
    if not isinstance(sandbox, str) or not (sandbox in SANDBOXES or sandbox.startswith(("http://", "https://"))):
        raise ValueError(f"sandbox must be one of {', '.join(SANDBOXES)} or a http(s) URL, not {sandbox!r}")


def candidates(sandbox: str) -> list[Local]:
    """The local sandboxes to try for `sandbox`, best first. Raises SandboxUnavailable where none can work."""
    if sandbox == "none":
        return ["none"]
    if sys.platform != "linux":
        raise SandboxUnavailable(
            f"sandbox {sandbox!r} needs Linux, this is {sys.platform}. Run in a Linux container, give the URL of a "
            "remote sandbox, or write `sandbox: none` to run untrusted code without any protection"
        )
    if not seccomp.supported():
        raise SandboxUnavailable("local sandboxes need 64-bit x86 or ARM; give the URL of a remote sandbox instead")
    if sandbox != "auto":
        return [cast(Local, sandbox)]
    # As root, only our own launcher can give the program a user id of its own.
    installed: list[Local] = ["bubblewrap"] if shutil.which("bwrap") and os.getuid() else []
    return [*installed, "namespaces"]


def start(
    kind: Local, control: int, limits: Limits, scratch: str, *, site_packages: bool
) -> subprocess.Popen[bytes] | None:
    """Start one sandbox whose descriptor to us is `control`; scratch: a folder of this machine, for "none" only.

    Returns the process that must be waited for, if it is ours. Raises OSError or SandboxUnavailable.
    """
    packages = _site_packages() if site_packages else []
    inside = scratch if kind == "none" else SCRATCH
    config: dict[str, Any] = {
        "mode": "inside" if kind == "bubblewrap" else kind,
        "readable": _readable(packages),
        "scratch": inside,
        "packages": packages,
        "environment": {**_ENVIRONMENT, "HOME": inside, "TMPDIR": inside},
        "limits": {
            "memory_mb": int(limits.memory_mb),
            "max_file_mb": int(limits.max_file_mb),
            "max_processes": int(limits.max_processes),
        },
    }
    if kind != "bubblewrap":
        _launcher.fork(config, control)
        return None
    command = [*_bubblewrap(config), "--", *_python("/jail"), json.dumps({**config, "control": control})]
    return subprocess.Popen(
        command,
        env=_ENVIRONMENT,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[control],
        start_new_session=True,
    )


def reap(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process that is about to end, and end it if it does not."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: nothing ends that
            process.wait(seconds)


def _python(code: str) -> list[str]:
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [executable, *_FLAGS, "-c", _START.format(code=code)]


_launcher = Launcher(_python(_CODE), _ENVIRONMENT)


def _bubblewrap(config: dict[str, Any]) -> list[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable("bubblewrap is not installed")
    arguments = [bwrap, "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1"]
    arguments += ["--cap-drop", "ALL", "--hostname", "sandbox"]
    for path in config["readable"]:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind", path, path]
    arguments += ["--ro-bind", f"{_CODE}/jail", "/jail/jail", "--proc", "/proc"]
    for device in ("null", "zero", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    arguments += ["--symlink", "/proc/self/fd", "/dev/fd", "--symlink", SCRATCH, "/dev/shm"]
    if not any(path.startswith("/tmp/") for path in config["readable"]):
        arguments += ["--symlink", SCRATCH, "/tmp"]
    size = str(config["limits"]["max_file_mb"] << 20)
    return [*arguments, "--size", size, "--tmpfs", SCRATCH, "--remount-ro", "/"]


def _readable(packages: Sequence[str]) -> list[str]:
    """The host's files that programs see: the system's libraries and this Python, no more."""
    prefix = sys.base_prefix
    paths = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"]
    if prefix != "/usr":
        paths += [f"{prefix}/{folder}" for folder in ("bin", "lib", "lib64")]
    standard = sysconfig.get_path("stdlib")
    paths += [path for path in (standard, *packages) if not any(path.startswith(f"{known}/") for known in paths)]
    return [path for path in dict.fromkeys(paths) if os.path.lexists(path)]


def _site_packages() -> list[str]:
    return [path for path in site.getsitepackages() if os.path.isdir(path)]


ADVICE = (
    "Install bubblewrap (`apt install bubblewrap`, `dnf install bubblewrap`), or allow user namespaces "
    "(in Docker: `--security-opt seccomp=unconfined --security-opt apparmor=unconfined`, or `--cap-add SYS_ADMIN`; "
    "on Ubuntu: `sysctl kernel.apparmor_restrict_unprivileged_userns=0`), or give the URL of a remote sandbox. "
    "`sandbox: none` runs untrusted code without any protection"
)
