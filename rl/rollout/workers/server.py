"""A worker's HTTP server. Everything but `/health` wants the secret; whatever comes in, the engine lives on.

Replies are JSON. 400: the message is wrong (`error` says how); 401: no secret, or another; 409: right, but not now
(another version, no update under way, a broadcast that failed, a broken engine); 422: damaged weights, the old ones
stay; 404, 405, 408, 411, 413: as usual; 500: the engine's own error.
"""

from __future__ import annotations

import hmac
import json
import socket
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import ValidationError

from rl.rollout.workers.buckets import Damaged
from rl.rollout.workers.loop import Conflict, EngineLoop
from rl.rollout.workers.receiving import Updates
from rl.rollout.workers.wire import (
    Abort,
    Begin,
    Bucket,
    Finish,
    Generate,
    Message,
    Nothing,
    Results,
    Score,
    encode_sample,
)  # fmt: skip

MAX_JSON_BYTES = 64 << 20
TOKENS_PER_REPLY = 1 << 19  # about 15 MB of JSON
READ_TIMEOUT_S = 60.0  # between two pieces of a request
Parsed = TypeVar("Parsed", bound=Message)


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class WorkerServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], loop: EngineLoop, secret: str, folder: Path, max_bucket_bytes: int = 16 << 30
    ):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        self.loop, self.secret, self.max_bucket_bytes = loop, secret.encode(), max_bucket_bytes
        self.updates = Updates(loop, folder)
        self.asked_to_stop = False

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""
        print(f"connection of {client_address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = READ_TIMEOUT_S
    server: WorkerServer
    server_version, sys_version = "r1forge", ""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, self.server.loop.health().model_dump())
        else:
            self._reply(405 if self.path in ROUTES else 404, {"error": "GET is for /health alone"})

    def do_POST(self) -> None:
        try:
            self._authorise()
            path = urlsplit(self.path).path
            if path not in ROUTES:
                raise Refused(404, f"no endpoint {path[:100]}; there are {', '.join(ROUTES)}")
            self._reply(200, ROUTES[path](self))
        except Refused as error:
            self.close_connection = True  # the body may not have been read
            self._reply(error.status, {"error": str(error)})
        except ValidationError as error:
            self._reply(400, {"error": _explained(error)})
        except Damaged as error:
            self._reply(422, {"error": str(error)})
        except Conflict as error:
            self._reply(409, {"error": str(error)})
        except TimeoutError:
            self.close_connection = True
            self._reply(408, {"error": "the body did not come"})
        except ConnectionError:
            self.close_connection = True
        except Exception as error:  # the engine's own refusals, such as an unknown weight
            self._reply(500, {"error": f"{type(error).__name__}: {error}"[:2000]})

    # ---- endpoints ------------------------------------------------------------------------------------

    def _generate(self) -> dict[str, Any]:
        return {"accepted": self.server.loop.generate(self._json(Generate))}

    def _results(self) -> dict[str, Any]:
        message, loop = self._json(Results), self.server.loop
        loop.forget(message.forget)
        try:
            samples, errors = loop.results(message.keys, message.wait_s, TOKENS_PER_REPLY)
        except KeyError as error:
            raise Conflict(f"unknown key {error.args[0]}") from None
        groups = {key: [encode_sample(s) for s in row] for key, row in samples.items()}
        return {"results": groups, "errors": errors, "health": loop.health().model_dump()}

    def _abort(self) -> dict[str, Any]:
        message = self._json(Abort)
        return {"aborted": self.server.loop.forget(None if message.all else message.keys)}

    def _begin(self) -> dict[str, Any]:
        message = self._json(Begin)
        self.server.updates.begin(message)
        return {"version": message.version}

    def _bucket(self) -> dict[str, Any]:
        """Over http the note is the query and the bucket the body; otherwise the note is a JSON body."""
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        if not query:
            note, body = self._json(Bucket), None
        else:
            note = Bucket.model_validate(query, strict=False)
            body = self._body(self.server.max_bucket_bytes)
            if len(body) != note.bytes:
                raise Refused(400, f"{len(body)} bytes came, announced were {note.bytes}")
        if note.bytes > self.server.max_bucket_bytes:
            raise Refused(413, f"a bucket may have {self.server.max_bucket_bytes} bytes")
        self.server.updates.bucket(note, body)
        return {"index": note.index}

    def _finish(self) -> dict[str, Any]:
        return self.server.updates.finish(self._json(Finish)).model_dump()

    def _score(self) -> dict[str, Any]:
        message = self._json(Score)
        try:
            return {"logprobs": self.server.loop.score(message.tokens)}
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def _shutdown(self) -> dict[str, Any]:
        self._json(Nothing)
        self.server.asked_to_stop = True
        return {}

    # ---- reading and writing --------------------------------------------------------------------------

    def _authorise(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self.server.secret):
            raise Refused(401, "the shared secret is missing or another (header Authorization: Bearer SECRET)")

    def _body(self, limit: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise Refused(411, "say Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length is not a number")
        if int(length) > limit:
            raise Refused(413, f"the body has {length} bytes, {limit} are allowed here")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "the body is cut off")
        return body

    def _json(self, kind: type[Parsed]) -> Parsed:
        return kind.model_validate_json(self._body(MAX_JSON_BYTES))

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Only what was refused is logged; a secret is in no line."""
        if isinstance(code, int) and code >= 400:
            super().log_request(code, size)


def _explained(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


ROUTES: dict[str, Callable[[Handler], dict[str, Any]]] = {
    "/generate": Handler._generate,
    "/results": Handler._results,
    "/abort": Handler._abort,
    "/update_weights/begin": Handler._begin,
    "/update_weights/bucket": Handler._bucket,
    "/update_weights/finish": Handler._finish,
    "/score": Handler._score,
    "/shutdown": Handler._shutdown,
}
