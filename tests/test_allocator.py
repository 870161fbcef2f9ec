"""Freed memory stays in the process: the pages of large tensors are not fetched anew."""

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
def micro_batch():
    x = [torch.ones(n << 18) for n in (48, 40, 64, 56)]  # MB
    return sum(float((t * 2).relu_().sum()) for t in x)
for _ in range(2):
    micro_batch()
before = faults()
for _ in range(5):
    micro_batch()
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
    assert 10 * int(kept[1]) < int(plain[1])
