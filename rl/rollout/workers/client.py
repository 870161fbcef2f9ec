"""Calls of one worker's endpoints. A worker that does not answer in time is `Unreachable`, whatever the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlencode, urlsplit

from pydantic import ValidationError

from rl.rollout.types import Sample
from rl.rollout.workers.wire import (
    Begin,
    Bucket,
    Finish,
    Finished,
    Generate,
    Health,
    Request,
    Settings,
    decode_sample,
)  # fmt: skip

REQUESTS_PER_CALL = 256


class Unreachable(Exception):
    """No reply, or none that a worker gives: refused, cut off, too late, or stuck."""


class Stranger(Unreachable):
    """Something answers there, but not the worker that is wanted: waiting does not help."""


class Late(Unreachable):
    """No reply in time: the worker may be busy with it."""


class Refusal(Exception):
    """The worker answered, and said no."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class WorkerClient:
    """One worker by its URL. deadline_s: how long any answer may take, and an engine go without a sign of life."""

    def __init__(self, url: str, secret: str, deadline_s: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"a worker's URL must look like http://HOST:PORT, not {url!r}")
        self.url, self.deadline_s = url.rstrip("/"), deadline_s
        self._host, self._port, self._https = parts.hostname, parts.port, parts.scheme == "https"
        self._headers = {"Authorization": f"Bearer {secret}"}

    def health(self, timeout_s: float | None = None) -> Health:
        return self._living(self._call("GET", "/health", None, timeout_s or self.deadline_s))

    def generate(
        self, requests: Sequence[Request], settings: Settings, version: int | None, or_newer: bool = False
    ) -> None:
        for start in range(0, len(requests), REQUESTS_PER_CALL):
            part = list(requests[start : start + REQUESTS_PER_CALL])
            message = Generate(requests=part, params=settings, version=version, or_newer=or_newer)
            self._post("/generate", message.model_dump(mode="json"))

    def results(
        self, keys: Sequence[str], forget: Sequence[str], wait_s: float
    ) -> tuple[dict[str, list[Sample]], dict[str, str]]:
        """(samples, errors) by key, of those among `keys` that are finished."""
        reply = self._post("/results", {"keys": list(keys), "forget": list(forget), "wait_s": wait_s})
        self._living(reply.get("health"))
        try:
            groups = {key: [decode_sample(s) for s in row] for key, row in reply["results"].items()}
            return groups, dict(reply["errors"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreachable(f"the reply cannot be read: {type(error).__name__}") from None

    def abort(self, keys: Sequence[str] | None) -> None:
        """Drops these requests, or all."""
        self._post("/abort", {"all": True} if keys is None else {"keys": list(keys)})

    def begin(self, message: Begin) -> None:
        self._post("/update_weights/begin", message.model_dump(mode="json"))

    def bucket(self, note: Bucket, body: bytes | None = None) -> None:
        if body is None:
            self._post("/update_weights/bucket", note.model_dump(mode="json"))
        else:
            fields = note.model_dump(mode="json", exclude_none=True)
            self._read("POST", f"/update_weights/bucket?{urlencode(fields)}", body, self.deadline_s)

    def finish(self, message: Finish) -> Finished:
        """Large weights take their time: while there is life, it is waited for."""
        while True:
            try:
                reply = self._post("/update_weights/finish", message.model_dump(mode="json"))
                return Finished.model_validate(reply)
            except Late:
                self.health()  # raises Unreachable if that was the reason
            except ValidationError:
                raise Unreachable("the reply is not a worker's") from None

    def score(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        scores: list[list[float]] = self._post("/score", {"tokens": [list(t) for t in tokens]})["logprobs"]
        return scores

    def shutdown(self) -> None:
        self._post("/shutdown", {}, min(5.0, self.deadline_s))

    # ---- the exchange ---------------------------------------------------------------------------------

    def _post(self, path: str, content: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        reply: dict[str, Any] = self._call("POST", path, content, timeout_s or self.deadline_s)
        return reply

    def _call(self, method: str, path: str, content: Mapping[str, Any] | None, timeout_s: float) -> Any:
        return self._read(method, path, None if content is None else json.dumps(content).encode(), timeout_s)

    def _read(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Any:
        kind = HTTPSConnection if self._https else HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, self._headers if method == "POST" else {})
            response = connection.getresponse()
            raw = response.read()
            status = response.status
        except TimeoutError:
            raise Late(f"no answer in {timeout_s:g} s") from None
        except (OSError, IncompleteRead) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None
        except HTTPException as error:
            raise Stranger(f"the reply is not a worker's: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        try:
            reply = json.loads(raw)
        except ValueError:
            raise Stranger(f"the reply (status {status}) is not a worker's") from None
        if status != 200:
            message = reply.get("error") if isinstance(reply, dict) else None
            raise Refusal(status, str(message or f"status {status}"))
        return reply

    def _living(self, raw: Any) -> Health:
        try:
            health = Health.model_validate(raw)
        except ValidationError:
            raise Stranger("the reply is not a worker's") from None
        if not health.alive:
            raise Unreachable(health.fault or "its engine has stopped")
        if health.heartbeat_s > self.deadline_s:
            raise Unreachable(f"its engine has been stuck for {health.heartbeat_s:.0f} s")
        return health
