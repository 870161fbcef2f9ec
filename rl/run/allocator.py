"""Keeping freed memory in the process, on a CPU under glibc.

glibc takes every block above 32 MB (and often smaller ones) fresh from the operating system and gives it
straight back. Training on a CPU allocates gigabytes of them in every micro-batch, and touching fresh pages can
take ten times as long as the arithmetic on them. Kept in the heap they are used again.
"""

from __future__ import annotations

import ctypes
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Whether it could be asked for; elsewhere (macOS, musl, another allocator) nothing happens."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(option, value) == 1 for option, value in settings])
