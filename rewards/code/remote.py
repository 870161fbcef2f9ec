"""Remote sandboxes behind `run_tests`: services that speak SandboxFusion's or Piston's HTTP interface.

A URL whose path ends in `/execute` is Piston's (`https://host/api/v2/execute`); any other is SandboxFusion's, to
which `/run_code` is added if it is not there.

One request per test. Stdio tests are as safe as the service: the expected output stays here. Assert tests are
weaker than in a local sandbox, since program and test share one process there: see docs/sandbox.md.
"""

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..http_json import Unreachable, post_json
from .cases import AssertTest, StdioTest, Test
from .compare import same_output
from .result import Outcome

if TYPE_CHECKING:
    from .sandbox import Options

_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_SLACK_S = 20.0  # for the service's queue and the network, beyond the program's own time


class _ServiceError(Exception):
    pass


def run_remote(url: str, program: str, tests: Sequence[Test], options: "Options") -> list[Outcome]:
    """One outcome per test; what the service fails at is sandbox_error, after three attempts."""
    deadline = time.monotonic() + options.limits.total_timeout_s
    outcomes = []
    for test in tests:
        if time.monotonic() >= deadline:
            outcomes.append(Outcome("timeout", "not reached within total_timeout_s"))
            continue
        try:
            outcomes.append(_run(url, program, test, options))
        except _ServiceError as error:
            outcomes.append(Outcome("sandbox_error", str(error)))
    return outcomes


def _run(url: str, program: str, test: Test, options: "Options") -> Outcome:
    if isinstance(test, StdioTest):
        ended = _execute(url, program, test.input, options)
        failed = _failure(ended)
        if failed is not None:
            return failed
        same = same_output(ended["stdout"], test.output, options.compare, options.float_tolerance)
        return Outcome("passed") if same else Outcome("wrong_answer", f"printed {ended['stdout'][:200]!r}")
    return _assert(url, program, test, options)


def _assert(url: str, program: str, test: AssertTest, options: "Options") -> Outcome:
    # A program that ends before its test cannot know what to print.
    token = secrets.token_hex(16)
    ended = _execute(url, f"{program}\n\n{test.code}\n\nprint({token!r})\n", "", options)
    failed = _failure(ended)
    if failed is not None:
        return Outcome("wrong_answer", failed.detail) if failed.detail.startswith("AssertionError") else failed
    lines = ended["stdout"].splitlines()
    if not lines or lines[-1] != token:
        return Outcome("runtime_error", "the program ended before the test did")
    return Outcome("passed")


def _failure(ended: dict[str, Any]) -> Outcome | None:
    if ended["timeout"]:
        return Outcome("timeout")
    if ended["status"] == 0:
        return None
    lines = ended["stderr"].strip().splitlines()
    last = lines[-1][:300] if lines else f"exit status {ended['status']}"
    return Outcome("memory" if last.startswith("MemoryError") else "runtime_error", last)


def _execute(url: str, code: str, stdin: str, options: "Options") -> dict[str, Any]:
    """stdout, stderr, status and timeout of one run."""
    limits = options.limits
    if urlsplit(url).path.rstrip("/").endswith("/execute"):
        answer = _post(
            url,
            {
                "language": "python",
                "version": "*",
                "files": [{"name": "program.py", "content": code}],
                "stdin": stdin,
                "run_timeout": int(limits.timeout_s * 1000),
                "run_memory_limit": limits.memory_mb << 20,
            },
            limits.timeout_s,
        )
        return _piston(answer)
    base = url.rstrip("/")
    answer = _post(
        base if base.endswith("/run_code") else f"{base}/run_code",
        {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "run_timeout": limits.timeout_s,
            "memory_limit_MB": limits.memory_mb,
        },
        limits.timeout_s,
    )
    return _fusion(answer)


def _piston(answer: dict[str, Any]) -> dict[str, Any]:
    run = answer.get("run")
    if not isinstance(run, dict):
        raise _ServiceError(f"the service answered without a run: {str(answer)[:200]}")
    if run.get("status") in ("XX", "EL"):
        raise _ServiceError(f"the service failed: {run.get('message') or run['status']}")
    # A run that is killed for its time has the status TO, in older versions only the signal.
    timeout = run.get("status") == "TO" or (run.get("status") is None and run.get("signal") == "SIGKILL")
    status = 0 if run.get("code") == 0 and not run.get("signal") else run.get("code") or 1
    return _ended(run, status, timeout)


def _fusion(answer: dict[str, Any]) -> dict[str, Any]:
    run = answer.get("run_result")
    if answer.get("status") == "SandboxError" or not isinstance(run, dict):
        raise _ServiceError(f"the service failed: {str(answer.get('message') or answer)[:200]}")
    finished = run.get("status") == "Finished"
    status = run.get("return_code") if finished else run.get("return_code") or 1
    return _ended(run, status, run.get("status") == "TimeLimitExceeded")


def _ended(run: dict[str, Any], status: Any, timeout: bool) -> dict[str, Any]:
    texts = {name: str(run.get(name) or "") for name in ("stdout", "stderr")}
    return {**texts, "status": status, "timeout": timeout}


def _post(url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            reply = post_json(url, body, {"Accept": "application/json"}, timeout_s=timeout_s + _SLACK_S)
        except Unreachable as error:
            reason = f"the service could not be asked: {error}"
            continue
        if reply.status == 200 and isinstance(reply.body, dict):
            return reply.body
        reason = f"the service answered {reply.status}" + (f": {str(reply.body)[:200]}" if reply.body else "")
        if reply.status < 500 and reply.status != 429:
            break
    raise _ServiceError(reason)
