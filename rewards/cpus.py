"""How many things to do at a time."""

import os
from collections.abc import Mapping


def share_of_cpus(environ: Mapping[str, str] = os.environ) -> int:
    """The cores of this process shared with the other ranks of this machine; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1))
