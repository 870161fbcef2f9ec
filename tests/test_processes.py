"""The process group, in two real processes."""

from __future__ import annotations

import subprocess
import sys

from recipes import REPO, environment, free_port

LIMITS = """
import torch
import torch.distributed as dist
from rl.policy.processes import Processes, leave

processes = Processes()
apart = processes.apart()
assert processes.gather(processes.rank) == apart.gather(processes.rank) == [0, 1]
groups = [dist.group.WORLD, apart.group]
print([group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600 for group in groups])
processes.barrier()
leave()
assert not dist.is_initialized()
"""


def test_who_waits_for_the_first_process_waits_for_hours() -> None:
    """It may wait for workers that are started or restarted, for longer than torch's own limits."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place["CUDA_VISIBLE_DEVICES"] = ""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LIMITS],
            cwd=REPO, env=environment(**place, RANK=rank, LOCAL_RANK=rank), stdout=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        assert [process.communicate(timeout=280)[0].strip() for process in both] == ["[24.0, 24.0]"] * 2
    finally:
        for process in both:
            process.kill()
