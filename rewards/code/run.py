"""Programs against tests: the public functions."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any

from . import backends
from . import sandbox as local
from .cases import parse_tests
from .compare import Compare, check_compare
from .limits import Limits
from .result import CodeResult


def run_tests(
    program: str,
    tests: Sequence[Mapping[str, Any]],
    *,
    timeout_s: float = Limits.timeout_s,
    total_timeout_s: float = Limits.total_timeout_s,
    memory_mb: int = Limits.memory_mb,
    max_processes: int = Limits.max_processes,
    max_file_mb: int = Limits.max_file_mb,
    max_output_mb: float = Limits.max_output_mb,
    compare: Compare = "tokens",
    float_tolerance: float | None = None,
    sandbox: str = "auto",
    site_packages: bool = False,
) -> CodeResult:
    """Run a Python program against tests, in a sandbox; one outcome per test, in order.

    tests: dicts {"type": "stdio", "input": str, "output": str} or {"type": "assert", "code": str}, code that
        uses the program's names and raises on failure. Every test starts the program anew.
    limits: see `rewards.code.limits`; compare, float_tolerance: see `rewards.code.compare.same_output`.
    sandbox: "auto", "bubblewrap", "namespaces", "none" (no protection at all) or the URL of a SandboxFusion- or
        Piston-compatible service.
    site_packages: let programs and tests import this environment's installed packages (NumPy, ...).

    Callable from any thread. Never raises for what a program does. Raises ValueError for bad arguments, naming
    them, and SandboxUnavailable if no sandbox of the wanted kind works here.
    """
    if not isinstance(program, str):
        raise ValueError(f"program must be a string, not {type(program).__name__}")
    cases = parse_tests(tests)
    check_compare(compare, float_tolerance)
    limits = Limits(
        timeout_s=timeout_s,
        total_timeout_s=total_timeout_s,
        memory_mb=memory_mb,
        max_processes=max_processes,
        max_file_mb=max_file_mb,
        max_output_mb=max_output_mb,
    )
    check_sandbox(sandbox, site_packages=site_packages)
    options = local.Options(limits, compare, float_tolerance, site_packages)
    if "://" in sandbox:
        from .remote import run_remote

        return CodeResult.of(run_remote(sandbox, program, cases, options))
    kind = local.choose(sandbox, site_packages)
    return CodeResult.of(local.Runner(kind, program, options).run(cases))


def run_many(
    jobs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, workers: int | None = None, **options: Any
) -> list[CodeResult]:
    """`run_tests(program, tests, **options)` for each pair, `workers` at a time (default: one per CPU)."""
    count = min(workers or cpu_count() or 1, max(1, len(jobs)))
    if count < 1:
        raise ValueError(f"workers must be at least 1, not {workers!r}")
    with ThreadPoolExecutor(count, thread_name_prefix="r1forge-code") as pool:
        return list(pool.map(lambda job: run_tests(*job, **options), jobs))


def check_sandbox(sandbox: str, *, site_packages: bool = False) -> None:
    """Raises ValueError for an unknown name, SandboxUnavailable if it does not work on this machine.

    A local sandbox is started once per process and name, which takes a tenth of a second; a URL is not called.
    """
    backends.check_name(sandbox)
    if "://" not in sandbox:
        local.choose(sandbox, site_packages)
