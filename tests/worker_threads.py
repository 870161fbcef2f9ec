"""Rollout workers on threads of the test's own process: everything but the process."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

from tiny_models import EOS, tiny_model, tokenizer

from rl.rollout import LocalSampler
from rl.rollout.engine import Engine
from rl.rollout.local_engine import LocalEngine
from rl.rollout.types import Sample
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.loop import EngineLoop
from rl.rollout.workers.server import WorkerServer

SECRET = "0123456789abcdef-secret"


def sampler(seed: int = 0) -> LocalSampler:
    return LocalSampler(tiny_model("llama", seed=seed), tokenizer(EOS), max_slots=4)


class PromptByPrompt(LocalEngine):
    """Samples one prompt at a step, and so takes weights while others wait. allowed: prompts still to be sampled."""

    takes_weights_midway = True

    def __init__(self, sampler: LocalSampler, allowed: int = 1_000_000):
        super().__init__(sampler)
        self.allowed = allowed

    def step(self) -> list[tuple[str, list[Sample]]]:
        if not self.allowed:
            time.sleep(0.01)
            return []
        self.allowed -= 1
        request = self._waiting.pop(next(iter(self._waiting)))
        return [(request.key, self.sampler.generate([request.prompt], request.params, streams=[request.stream])[0])]


class Running:
    """A worker that answers while the context lasts; `port` 0 = a free one."""

    def __init__(self, folder: Path, seed: int = 0, engine: Engine | None = None, port: int = 0, **limits: Any):
        self.loop = EngineLoop(engine or LocalEngine(sampler(seed)), "local")
        self.server = WorkerServer(("127.0.0.1", port), self.loop, SECRET, folder, **limits)
        self.loop.start()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.client = WorkerClient(self.server.url, SECRET, deadline_s=60)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.loop.stop()

    def raw(self, method: str, path: str, body: bytes | None = b"{}", **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_address[1], timeout=60)
        connection.request(method, path, body, {"Authorization": f"Bearer {SECRET}", **headers})
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        return response.status, content
