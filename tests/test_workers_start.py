"""A fleet until its workers answer: who is waited for, who is not, and what started ones inherit."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tiny_models import token_lists
from worker_threads import SECRET, Running

from recipes import free_port
from rl.rollout.workers import fleet
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe, Worker
from rl.rollout.workers.launch import environment
from rl.rollout.workers.transfer import Spool


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a fleet says; soon, and not after a minute."""
    monkeypatch.setattr(fleet, "NEWS_S", 0.3)
    monkeypatch.setattr(fleet, "ASK_S", 0.1)
    yield []


def of_others(folder: Path, said: list[str], *ports: int, deadline_s: float = 30.0) -> Fleet:
    workers = [Worker(WorkerClient(f"http://127.0.0.1:{port}", SECRET, deadline_s)) for port in ports]
    settings = FleetSettings(transport="files", start_timeout_s=300.0, say=said.append)
    return Fleet(workers, Spool(folder / "spool", limit=20_000), Probe(token_lists([40])[0], 0.01), settings)


def test_a_worker_of_others_that_is_still_starting_is_waited_for(tmp_path: Path, said: list[str]) -> None:
    """As under SLURM, where trainer and workers start at the same time."""
    ports = free_port(), free_port()
    made = of_others(tmp_path, said, *ports)
    with Running(tmp_path, port=ports[0]):
        starting = threading.Thread(target=made.start)
        starting.start()
        while not said:
            starting.join(0.05)
            assert starting.is_alive()
        with Running(tmp_path, port=ports[1]):
            starting.join(120)
            assert not starting.is_alive() and all(worker.up for worker in made.workers)
    late = made.workers[1].client.url
    assert said[-1].startswith(f"waiting for rollout workers: {late}: ConnectionRefusedError")
    made.close()


def test_what_is_no_worker_ends_the_start_at_once(tmp_path: Path, said: list[str]) -> None:
    """Though another one is still waited for."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>something else</html>")

    with HTTPServer(("127.0.0.1", 0), Page) as other:
        threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
        made = of_others(tmp_path, said, other.server_address[1], free_port())
        with pytest.raises(RuntimeError) as error:
            made.start()
        other.shutdown()
    page, absent = (worker.client.url for worker in made.workers)
    text = str(error.value)
    assert text.startswith(
        f"rollout workers did not start: {page}: the reply (status 200) is not a worker's; {absent}: "
    )


def test_what_does_not_speak_http_ends_the_start_at_once(tmp_path: Path, said: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-other\r\n")
                connection.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(RuntimeError, match="not a worker's: BadStatusLine"):
            of_others(tmp_path, said, other.getsockname()[1]).start()


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}, None),  # torchrun and accelerate, several processes
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, None),  # accelerate, a single one
        ({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "3"}, "3"),  # the user's
        ({"OMP_NUM_THREADS": "1"}, "1"),  # likewise
    ],
)
def test_a_launchers_thread_count_is_not_the_workers(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], threads: str | None
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert environment({}).get("OMP_NUM_THREADS") == threads
    assert environment({"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"  # workers.env
