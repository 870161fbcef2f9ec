"""Programs in completions: extraction, and tests in a sandbox. See docs/sandbox.md for what it protects from."""

from .backends import SandboxUnavailable
from .extract import extract_program
from .result import CodeResult, Outcome
from .run import check_sandbox, run_many, run_tests

__all__ = [
    "CodeResult",
    "Outcome",
    "SandboxUnavailable",
    "check_sandbox",
    "extract_program",
    "run_many",
    "run_tests",
]
