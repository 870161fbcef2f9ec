"""A seccomp filter: the system calls that no test program needs and that attacks begin with.

Everything else stays allowed, since interpreters and libraries change which calls they make. The namespaces
already take away what most of these calls could reach; the filter closes the kernel's larger attack surfaces and
the ways to use memory that no limit counts (memfd, System V shared memory).
"""

import ctypes
import errno
import os
import struct

# Per name: number on x86_64, on aarch64; None where the architecture has no such call.
_DENIED: dict[str, tuple[int, int | None]] = {
    # looking into, or steering, other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # large kernel interfaces
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    # memory and messages that outlive a process or escape its limits
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "vhangup": (153, 58),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH value
_CLONE, _CLONE3, _SOCKET, _IOCTL, _PRLIMIT = (56, 220), (435, 435), (41, 198), (16, 29), (302, 261)

_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag that clone() takes
_X32_BIT = 0x40000000
_AF_UNIX = 1
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets into struct seccomp_data; arguments are 8 bytes each, low half first

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2


def supported() -> bool:
    """Is there a filter for this machine's architecture?"""
    return os.uname().machine in _ARCHITECTURES and struct.calcsize("P") == 8


def install() -> None:
    """Filter this process and all its future children, for good. Raises OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _program(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(header))):
        option, second, third = arguments
        if libc.prctl(option, ctypes.c_ulong(second), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), "the kernel refused the seccomp filter")


def _program(machine: str) -> bytes:
    column, arch = _ARCHITECTURES[machine]
    code = [_step(_LOAD, _ARCH), _step(_JUMP_EQ, arch, 1, 0), _step(_RETURN, _KILL)]  # no 32-bit calls
    code += [_step(_LOAD, _NR)]
    if machine == "x86_64":
        code += [_step(_JUMP_GE, _X32_BIT, 0, 1), _step(_RETURN, _KILL)]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            code += _if_equal(number, [_refuse(errno.EPERM)])
    # The C library falls back to clone(), whose flags can be checked: clone3's lie behind a pointer.
    code += _if_equal(_CLONE3[column], [_refuse(errno.ENOSYS)])
    refuse = [_refuse(errno.EPERM), _step(_RETURN, _ALLOW)]
    code += _if_equal(_CLONE[column], [_argument(0), _step(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1), *refuse])
    code += _if_equal(
        _SOCKET[column],
        [_argument(0), _step(_JUMP_EQ, _AF_UNIX, 1, 0), _refuse(errno.EAFNOSUPPORT), _step(_RETURN, _ALLOW)],
    )
    # Another process's limits, such as those of the sandbox's first process, are not the program's to set.
    code += _if_equal(_PRLIMIT[column], [_argument(0), _step(_JUMP_EQ, 0, 1, 0), *refuse])
    code += _if_equal(
        _IOCTL[column],
        [_argument(1), _step(_JUMP_EQ, _TIOCSTI, 1, 0), _step(_JUMP_EQ, _TIOCLINUX, 0, 1), *refuse],
    )
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _if_equal(number: int, then: list[bytes]) -> list[bytes]:
    """`then` must end in a return: the accumulator no longer holds the call's number."""
    return [_step(_JUMP_EQ, number, 0, len(then)), *then]


def _argument(index: int) -> bytes:
    return _step(_LOAD, _ARGS + 8 * index)


def _refuse(error: int) -> bytes:
    return _step(_RETURN, _ERRNO | error)
