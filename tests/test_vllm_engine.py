"""VLLMEngine with the real vLLM, in vLLM's own environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import vllm_env


@pytest.mark.slow
def test_the_cases_pass_inside_vllm(tmp_path: Path) -> None:
    vllm_env.run_cases("vllm_engine_cases.py", tmp_path)


@pytest.mark.slow
def test_an_engine_in_each_of_two_processes(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [vllm_env.vllm_python(), *launcher, "vllm_colocated.py", str(tmp_path)],
        cwd=vllm_env.ROOT / "tests", env=vllm_env.vllm_environment(), capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert (tmp_path / "ok-0").exists() and (tmp_path / "ok-1").exists()
