"""The environment that vLLM lives in (`make vllm-env`), and how tests get something run there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a vLLM on CPU needs to start quickly and offline. It compiles a small function on its first step, which takes
# longer than all of a test.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "TORCHDYNAMO_DISABLE": "1",
}


def vllm_python() -> str:
    """Its interpreter; skips the test if there is none."""
    found = os.environ.get("R1FORGE_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    if not Path(found).exists():
        pytest.skip("no vLLM here: `make vllm-env`, or name an interpreter by R1FORGE_VLLM_PYTHON")
    return found


def vllm_environment() -> dict[str, str]:
    """For subprocesses: this repository's packages and the tests' helpers come first."""
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def run_cases(file: str, scratch: Path, timeout_s: float = 1800) -> None:
    """Runs a file of tests by pytest over there: one process, so that vLLM is imported once for all of them."""
    command = [
        vllm_python(),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(scratch / "cases"),
        file,
    ]
    done = subprocess.run(
        command, cwd=ROOT / "tests", env=vllm_environment(), capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert " passed" in done.stdout, done.stdout
