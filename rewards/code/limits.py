"""The limits of a run, checked when they are given."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    timeout_s: wall-clock seconds per test; total_timeout_s: for all tests of a program together, including
    the start of the sandbox (tests not reached count as timeout).
    memory_mb: address space of each process, and resident memory of all its processes together.
    max_processes: processes and threads at a time.
    max_file_mb: the largest file, and the whole scratch folder.
    max_output_mb: standard output and standard error together, per test.
    """

    timeout_s: float = 10.0
    total_timeout_s: float = 120.0
    memory_mb: int = 1024
    max_processes: int = 32
    max_file_mb: int = 64
    max_output_mb: float = 16.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{field.name} must be a number, not {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive number, not {value!r}")
        for name, least in (("memory_mb", 64), ("max_processes", 1), ("max_file_mb", 1)):
            value = getattr(self, name)
            if value != int(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")

    @property
    def output_bytes(self) -> int:
        return int(self.max_output_mb * 2**20)
