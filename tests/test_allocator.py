"""Freed memory stays in the process: the pages of a large tensor are not fetched anew."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from rl.run.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.empty(16 << 20).fill_(1.0)  # 64 MB
before = faults()
for _ in range(10):
    torch.empty(16 << 20).fill_(1.0)
print(kept, faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of glibc")
def test_freed_memory_is_used_again():
    kept, plain = (
        subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True).stdout.split()
        for mode in ("keep", "plain")
    )
    if kept[0] == "False":
        pytest.skip("this C library has no mallopt")
    assert int(kept[1]) < 1000  # of 160,000 pages touched
    assert int(plain[1]) > 10 * int(kept[1])
