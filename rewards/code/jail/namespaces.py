"""New namespaces and a new root folder, by system calls: what bubblewrap does, without bubblewrap.

Works as an ordinary user where the kernel allows user namespaces, and as root.
"""

import ctypes
import os
from collections.abc import Callable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x20080522

SCRATCH = "/scratch"  # /tmp leads there too, unless Python itself lies below /tmp
_DEVICES = ("null", "zero", "urandom", "random")


class NamespaceError(OSError):
    """The kernel, or what runs above it, refused a step of building the sandbox."""


def enter() -> Callable[[], None]:
    """Leave this process's namespaces, except that only its next child is in the new pid namespace.

    Returns the function by which that child, once everything is mounted, gives up its privileges.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    if uid == 0:
        # Limits on the number of processes do not bind root, so the program gets a user id of its own; one per
        # sandbox, since the limit counts all processes of a user.
        outside = _unused_id()
        _call("unshare", _libc.unshare(flags))
        return lambda: _become(outside)
    _call("unshare", _libc.unshare(flags | _NEWUSER))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")
    return _drop_capabilities


def build_root(readable: Sequence[str], scratch_mb: int) -> None:
    """A root folder of nothing but `readable` (read-only), a few devices, /proc and a limited scratch folder.

    Call it in the first process of the new pid namespace: /proc shows that process's namespace.
    """
    _mount("none", "/", None, _REC | _PRIVATE)
    # Mounted over the old /tmp, then made the root: the old /tmp is in view again below /old.
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir("/tmp/old")
    pivot = _PIVOT_ROOT[os.uname().machine]
    _call("pivot_root", _libc.syscall(pivot, b"/tmp", b"/tmp/old"))
    os.chdir("/")
    for path in readable:
        _show(path)
    os.mkdir("/dev")
    for device in _DEVICES:
        os.close(os.open(f"/dev/{device}", os.O_CREAT | os.O_WRONLY, 0o666))
        _mount(f"/old/dev/{device}", f"/dev/{device}", None, _BIND)
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"/dev/{link}")
    os.symlink(SCRATCH, "/dev/shm")
    os.mkdir("/proc")
    try:
        _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC | _RDONLY)
    except NamespaceError:
        pass  # inside some containers a new /proc is refused; programs then see an empty folder
    _call("umount2", _libc.umount2(b"/old", _DETACH))
    os.rmdir("/old")
    os.mkdir(SCRATCH)
    if not os.path.exists("/tmp"):
        os.symlink(SCRATCH, "/tmp")
    _mount("tmpfs", SCRATCH, "tmpfs", _NOSUID | _NODEV, f"size={scratch_mb}m,nr_inodes=10000,mode=1777")
    _mount("none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(SCRATCH)


def guard_first_process() -> None:
    """Die with the launcher, and be closed to whoever runs under the same user id. After dropping privileges:
    the kernel forgets both settings when ids change."""
    _call("prctl", _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))
    _call("prctl", _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def _show(path: str) -> None:
    """Make the host's `path` readable at the same place. A link stays a link."""
    source = "/old" + path
    if not os.path.lexists(source) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, path, None, _BIND | _REC)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size
    )  # fmt: skip
    _call(f"mount_setattr on {path}", result)


def _unused_id() -> int:
    """A user id that nobody has: high where all ids are ours to give, otherwise from the range we have."""
    with open("/proc/self/uid_map") as file:
        ranges = [(int(start), int(count)) for start, _, count in (line.split() for line in file)]
    start, count = max(ranges, key=lambda entry: entry[1])
    draw = int.from_bytes(os.urandom(4), "little")
    if count > 1 << 31:
        return (1 << 30) + draw % (1 << 30)
    if count < 2:
        raise NamespaceError("root here owns a single user id, so programs cannot be given another")
    return start + count // 2 + draw % (count - count // 2)


def _become(uid: int) -> None:
    _drop_bounding_set()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir(SCRATCH)


def _drop_capabilities() -> None:
    _drop_bounding_set()
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", _libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())))


def _drop_bounding_set() -> None:
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data.encode()
    )
    _call(f"mount of {target}", result)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise NamespaceError(error.errno, f"writing {path}: {error.strerror}") from None


def _call(what: str, result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise NamespaceError(number, f"{what}: {os.strerror(number)}")
