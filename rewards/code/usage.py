"""Processes and memory of a process tree, from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """processes: with their threads; resident_bytes: pages that several share count for each."""

    processes: int
    resident_bytes: int


def of_tree(root: int) -> Usage:
    """The descendants of process `root`, without itself. Zeros where there is no such process or no /proc."""
    waiting, threads, resident = _children(root), 0, 0
    while waiting:
        pid = waiting.pop()
        try:
            resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            continue
        waiting += _children(pid)
        threads += _count_threads(pid)
    return Usage(threads, resident)


def _children(pid: int) -> list[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:
        pass
    return found


def _count_threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0
