"""VLLMEngine with the real vLLM, in vLLM's own environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_env


@pytest.mark.slow
def test_the_cases_pass_inside_vllm(tmp_path: Path) -> None:
    vllm_env.run_cases("vllm_engine_cases.py", tmp_path)
