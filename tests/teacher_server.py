"""A teacher behind HTTP that misbehaves as it is told to, but gives every (problem, seed) always the same response."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What the server can do instead of answering; given (request body, how often this very request came before).
Mischief = Callable[[dict[str, Any], int], str]


def honest(body: dict[str, Any], before: int) -> str:
    return "answer"


def response_of(body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion in DeepSeek's form; of each problem `What is a + b?` some seeds answer wrongly."""
    statement = body["messages"][-1]["content"].partition("\n")[0]
    a, b = (int(word) for word in statement.removeprefix("What is ").removesuffix("?").split(" + "))
    said = a + b + (body["seed"] % 3 == 0)
    words = hashlib.sha256(f"{statement}{body['seed']}".encode()).hexdigest()
    thinking = f"Adding {a} and {b}, " + ", ".join(f"then step {c} of {words[:6]}" for c in words[:12]) + f": {said}."
    message = {"role": "assistant", "content": f"The sum is \\boxed{{{said}}}.", "reasoning_content": thinking}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20},
    }


class TeacherServer:
    def __init__(self, mischief: Mischief = honest) -> None:
        self.mischief = mischief
        self.seen: Counter[str] = Counter()  # by request body
        self.answered: Counter[str] = Counter()
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with outer.lock:
                    before = outer.seen[raw.decode()]
                    outer.seen[raw.decode()] += 1
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    self.act(outer.mischief(json.loads(raw), before), raw)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer.lock:
                        outer.now -= 1

            def act(self, what: str, raw: bytes) -> None:
                body = json.loads(raw)
                if what == "answer":
                    with outer.lock:
                        outer.answered[raw.decode()] += 1
                    self.send(200, response_of(body))
                elif what == "stall":
                    outer.closing.wait(30)
                elif what == "disconnect":
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif what == "cut":  # in the middle of the body
                    whole = json.dumps(response_of(body)).encode()
                    self.head(200, len(whole))
                    self.wfile.write(whole[: len(whole) // 2])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif what == "garbage":
                    self.send(200, b"<html>we are \xff upgrading</html>")
                elif what == "no choices":
                    self.send(200, {"choices": []})
                elif what == "empty":
                    message = {"content": None, "reasoning_content": ""}
                    self.send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})
                else:  # "429 1": status and, if given, Retry-After
                    status, _, wait = what.partition(" ")
                    error = {"error": {"message": f"status\x1b[31m {status} {self.headers.get('Authorization')}"}}
                    self.send(int(status), error, {"Retry-After": wait} if wait else {})

            def head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()

            def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.head(status, len(raw), headers)
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            request_queue_size = 64  # of five, a busy machine drops connections that then wait for seconds
            daemon_threads = True

        self.http = Listening(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
