"""Worker processes on this host, started for a recipe, ended with the run."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rl

# What a launcher tells its own processes, and would mislead an engine that has processes of its own.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
             "ACCELERATE_", "FSDP_", "DEEPSPEED_")  # fmt: skip
# With one of these there, a launcher has set OMP_NUM_THREADS=1 for want of another value: the trainer's processes would
# share the cores. A worker has them to itself, and whoever wants it otherwise says so in `workers.env`.
_LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}


class StartFailed(RuntimeError):
    """A worker did not come up; the message ends with the last lines of its log."""


def write_secret(path: Path) -> str:
    """A new secret in a file that only this user can read."""
    secret = secrets.token_hex(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")
    return secret


class WorkerProcess:
    """One `rl rollout-worker`. After a restart it has the same port, so that its URL stays."""

    def __init__(
        self,
        number: int,
        folder: Path,
        *,
        engine: str,
        model: str,
        secret_file: Path,
        host: str,
        port: int,
        bucket_folder: Path,
        python: str | None,
        env: Mapping[str, str],
        cores: str | None,
        options: Mapping[str, Any],
    ):
        self.number, self.host, self.port = number, host, port or free_port(host)
        self.log = folder / f"worker-{number}.log"
        self._announce = folder / f"worker-{number}.json"
        self._arguments = [
            "--engine", engine, "--model", model, "--secret-file", str(secret_file), "--host", host,
            "--bucket-folder", str(bucket_folder), "--announce", str(self._announce), "--parent", str(os.getpid()),
            *(["--cores", cores] if cores else []),
        ]  # fmt: skip
        self._options = [f"{name}={json.dumps(value)}" for name, value in options.items()]  # JSON is YAML
        self._python, self._env = python or sys.executable, env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begins; `wait` says when it is ready."""
        self._announce.unlink(missing_ok=True)
        command = [self._python, "-m", "rl", "rollout-worker", *self._arguments, "--port", str(self.port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                env=environment(self._env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt at the terminal is the trainer's to handle
            )

    @property
    def url(self) -> str:
        """How processes on this host reach it; those elsewhere too, unless it listens at every address."""
        host = "127.0.0.1" if self.host in ("", "0.0.0.0") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def wait(self, timeout_s: float) -> None:
        """Until the worker is ready."""
        assert self._process is not None
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self._announce.is_file():
                return
            if self._process.poll() is not None:
                raise StartFailed(f"worker {self.number} ended with status {self._process.returncode}: {self.tail()}")
            time.sleep(0.05)
        self.kill()
        raise StartFailed(f"worker {self.number} was not ready after {timeout_s:g} s: {self.tail()}")

    @property
    def ended(self) -> str | None:
        """How it ended, if it has."""
        status = self._process.poll() if self._process else None
        return None if status is None else f"its process ended with status {status}"

    def kill(self) -> None:
        """Ends it and whatever it started, also when it is stopped or stuck."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets it end in order, else kills it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def tail(self, lines: int = 5) -> str:
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return " / ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:]) + f" (log: {self.log})"


def free_port(host: str) -> int:
    """One that is free now: a worker keeps its port over restarts, so it is chosen before the first."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what its launcher put there; other interpreters find this package by it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    if _LAUNCHED & os.environ.keys() and kept.get("OMP_NUM_THREADS") == "1":
        del kept["OMP_NUM_THREADS"]
    paths = [str(Path(path).resolve().parent) for path in rl.__path__]
    return {**kept, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [kept.get("PYTHONPATH")])]), **more}
