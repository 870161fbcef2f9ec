"""Small recipes that tests share: a scratch model of a few thousand parameters on generated problems."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parent.parent

SCRATCH = {"layers": 2, "hidden_size": 32, "intermediate_size": 64, "heads": 2, "kv_heads": 1}
PROBLEMS = {
    "generator": {"families": ["addition"], "levels": [1], "count": 200, "seed": 1},
    "template": "short-think",
}


def grpo(folder: Path, **changes: Any) -> dict[str, Any]:
    """A GRPO recipe of four steps that takes seconds; changes are dotted: `grpo__steps=2`."""
    recipe: dict[str, Any] = {
        "pipeline": "grpo",
        "output_dir": str(folder),
        "model": {"scratch": SCRATCH, "dtype": "float32"},
        "data": PROBLEMS,
        # A random model never answers: reward something that it can find, so that groups are informative.
        "rewards": [{"path": f"{REPO / 'tests' / 'toy_rewards.py'}:digit_share"}],
        "rollout": {"max_tokens": 12, "max_slots": 8},
        "optimizer": {"learning_rate": 1e-3, "warmup_updates": 2},
        "grpo": {"steps": 4, "prompts_per_step": 4, "samples_per_prompt": 4, "minibatches_per_step": 2},
        "checkpoint": {"every": 1},
        "log": {"samples_every": 0},
    }
    return change(recipe, **changes)


def sft(folder: Path, **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "pipeline": "sft",
        "output_dir": str(folder),
        "model": {"scratch": SCRATCH, "dtype": "float32"},
        "data": PROBLEMS,
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_updates": 2},
        "sft": {"steps": 6, "batch_size": 8},
        "checkpoint": {"every": 2},
    }
    return change(recipe, **changes)


def change(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(recipe)
    for dotted, value in changes.items():
        node = recipe
        *path, last = dotted.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return recipe


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(
    *arguments: str,
    code: str | None = None,
    env: dict[str, str] | None = None,
    cwd: Path = REPO,
    timeout_s: float = 300,
) -> Any:
    """`python -m rl ARGUMENTS` (or python -c CODE ARGUMENTS) in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "rl"]), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)


def environment(**more: str) -> dict[str, str]:
    """Of a launched process: nothing of a launcher around these tests, no network, one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    # From another folder than the repository, `rl` is found by this.
    return {**kept, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch_two(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`accelerate launch -m rl ARGUMENTS` with two gloo processes, begun but not waited for."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        # MULTI_GPU with `use_cpu`: accelerate's MULTI_CPU starts one process, for MPI to multiply.
        "distributed_type": "MULTI_GPU",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 2,
        "main_process_ip": "127.0.0.1",
        "main_process_port": free_port(),
        "mixed_precision": "no",
    }
    write(folder / "accelerate.yaml", settings)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml", "-m", "rl"]
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its timings."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
