"""Remote sandboxes: services like SandboxFusion and Piston, played by a small server."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewards.code import run_tests

DOUBLE = "print(int(input()) * 2)"


def stdio(given: str, wanted: str) -> dict[str, str]:
    return {"type": "stdio", "input": given, "output": wanted}


def asserts(*codes: str) -> list[dict[str, str]]:
    return [{"type": "assert", "code": code} for code in codes]


@contextmanager
def service(answer: Callable[[str, dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = answer(self.path, body)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_here(code: str, stdin: str, seconds: float) -> tuple[int, str, str, bool]:
    """What a service does: run the code; status, stdout, stderr, out of time."""
    import subprocess
    import sys

    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", code], input=stdin, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return 0, "", "", True
    return ended.returncode, ended.stdout, ended.stderr, False


def fusion(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    assert path == "/run_code" and body["language"] == "python"
    status, out, err, late = run_here(body["code"], body["stdin"], body["run_timeout"])
    run = {"status": "TimeLimitExceeded" if late else "Finished", "return_code": status, "stdout": out, "stderr": err}
    return 200, {"status": "Success" if status == 0 and not late else "Failed", "run_result": run}


def piston(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    assert path == "/api/v2/execute" and body["version"] == "*"
    code = body["files"][0]["content"]
    status, out, err, late = run_here(code, body["stdin"], body["run_timeout"] / 1000)
    run = {"code": None if late else status, "signal": "SIGKILL" if late else None, "stdout": out, "stderr": err}
    return 200, {"language": "python", "run": run}


@pytest.mark.parametrize("answer, path", [(fusion, ""), (fusion, "/run_code"), (piston, "/api/v2/execute")])
def test_remote_sandboxes(answer: Callable[[str, dict[str, Any]], tuple[int, Any]], path: str) -> None:
    with service(answer) as url:
        tests = [stdio("4", "8"), stdio("4", "9"), stdio("x", "")]
        assert run_tests(DOUBLE, tests, sandbox=url + path).outcomes == ("passed", "wrong_answer", "runtime_error")
        cases = asserts("assert f(2) == 4", "assert f(2) == 5", "f(None)")
        result = run_tests("def f(x): return x * 2", cases, sandbox=url + path)
        assert result.outcomes == ("passed", "wrong_answer", "runtime_error")
        assert run_tests("import os; os._exit(0)", cases[:1], sandbox=url + path).outcomes == ("runtime_error",)
        assert run_tests("while 1: pass", [stdio("", "")], sandbox=url + path, timeout_s=0.5).outcomes == ("timeout",)


def test_remote_failures_are_retried_then_sandbox_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.code.remote._FIRST_PAUSE_S", 0.01)
    calls: list[str] = []

    def failing(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        calls.append(path)
        return (503, {}) if len(calls) < 3 else fusion(path, body)

    with service(failing) as url:
        assert run_tests("print(1)", [stdio("", "1")], sandbox=url).all_passed and len(calls) == 3
    for status, reply, attempts in ((500, {}, 3), (404, {}, 1), (200, [1], 1), (200, {"status": "SandboxError"}, 1)):
        calls.clear()

        def broken(path: str, body: dict[str, Any], status: int = status, reply: Any = reply) -> tuple[int, Any]:
            calls.append(path)
            return status, reply

        with service(broken) as url:
            assert run_tests("print(1)", [stdio("", "1")], sandbox=url).outcomes == ("sandbox_error",)
        assert len(calls) == attempts
