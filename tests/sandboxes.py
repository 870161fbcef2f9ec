"""What tests of the code verifier share: whether a sandbox works here, and limits that end an attack soon."""

from typing import Any

import pytest

from rewards.code import SandboxUnavailable, check_sandbox

LIMITS: dict[str, Any] = {"timeout_s": 1.5, "memory_mb": 256, "max_processes": 16, "max_file_mb": 8, "max_output_mb": 1}


def works(sandbox: str) -> bool:
    try:
        check_sandbox(sandbox)
    except SandboxUnavailable:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not works("auto"), reason="no sandbox works on this machine")
