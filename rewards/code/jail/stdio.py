"""The child that runs a program as a script, with its standard streams on the parent's files and pipes."""

import fcntl
import os
import sys
import types
from collections.abc import Callable
from io import TextIOWrapper
from typing import cast


def prepare(fds: list[int]) -> Callable[[], None]:
    """fds: program, stdin, stdout, stderr."""
    source = read_all(fds[0])
    take_over(fds[1:])
    open_streams()
    return lambda: _run(source)


def _run(source: bytes) -> None:
    module = types.ModuleType("__main__")
    module.__file__ = "program.py"
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)


def read_all(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb") as file:
        return file.read()


def take_over(fds: list[int]) -> None:
    """`fds` become 0, 1, 2, ...; every other descriptor is closed."""
    # Numbers below len(fds) may be among the sources, so all move out of the way first.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, len(fds)) for fd in fds]
    for number, fd in enumerate(moved):
        os.dup2(fd, number)
    os.closerange(len(fds), 65536)


def open_streams() -> None:
    """Python's standard streams anew: those of the forked interpreter belong to other files."""
    sys.stdin = sys.__stdin__ = _stream(0, "r", "surrogateescape")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, "w", "surrogateescape")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "w", "backslashreplace")  # type: ignore[misc]


def _stream(fd: int, mode: str, errors: str) -> TextIOWrapper:
    return cast(TextIOWrapper, open(fd, mode, encoding="utf-8", errors=errors, closefd=False))
