"""One JSON request over HTTP that ends in bounded time and memory, whatever the server does. Standard library only."""

import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

MAX_REPLY_BYTES = 16 << 20
_CHAT_PATH = "/chat/completions"


class Unreachable(Exception):
    """No usable reply: refused, cut off, late, too long, or not HTTP. The message holds nothing of the request."""


@dataclass(frozen=True)
class Reply:
    """status, the decoded JSON body (None if it is not JSON), and how long the server asks to wait, if it does."""

    status: int
    body: Any
    retry_after_s: float | None


def check_url(url: object) -> str:
    """The URL, if it is one to post to. Raises ValueError; a password in it belongs into an environment variable."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url must be http://HOST[:PORT]/... or https://..., not {url!r}")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("url must not hold a user, password, query or fragment; name a key's variable in api_key_env")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"url: {error}") from None
    assert isinstance(url, str)
    return url


def chat_url(base_url: object) -> str:
    """The chat endpoint of an OpenAI-compatible API such as http://localhost:8000/v1. Raises ValueError."""
    base = check_url(base_url).rstrip("/")
    return base if base.endswith(_CHAT_PATH) else base + _CHAT_PATH


def bearer(api_key_env: str | None) -> dict[str, str]:
    """The header with the key that the environment variable holds. Raises ValueError, which never shows a key."""
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise ValueError(f"api_key_env: the environment variable {api_key_env} is not set")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"api_key_env: the environment variable {api_key_env} holds characters that no key has")
    return {"Authorization": f"Bearer {key}"}


def post_json(url: str, payload: Mapping[str, Any], headers: Mapping[str, str], *, timeout_s: float) -> Reply:
    """POST `payload`. Redirects are not followed: they would carry the key to another host.

    timeout_s: for the whole exchange, also with a server that sends a byte now and then. (Looking up the host's name
        is the system's, and not interrupted.)
    Raises Unreachable, and nothing else for what a server can do.
    """
    connection, target = _connection(urlsplit(url), timeout_s)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        if connection.sock is not None:
            try:  # not through SSLSocket.shutdown, which would unwrap the socket under the reading thread
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
            except OSError:
                pass

    watchdog = threading.Timer(timeout_s, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        body = json.dumps(payload).encode()
        connection.connect()
        if late.is_set():  # too early for the watchdog to have had a socket to shut
            raise TimeoutError
        connection.request("POST", target, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        raw = response.read(MAX_REPLY_BYTES + 1)
        if late.is_set():
            raise Unreachable(f"no complete reply in {timeout_s:g} s")
        if len(raw) > MAX_REPLY_BYTES:
            raise Unreachable(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
        if response.length:  # what is still to come; http.client only raises for a body read whole
            raise Unreachable("the reply was cut off")
        return Reply(response.status, _decoded(raw), _seconds(response.headers.get("Retry-After")))
    except (OSError, HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise Unreachable(f"no complete reply in {timeout_s:g} s") from None
        raise Unreachable(f"connection failed: {type(error).__name__}") from None
    finally:
        watchdog.cancel()
        connection.close()


def _connection(url: SplitResult, timeout_s: float) -> tuple[HTTPConnection, str]:
    """A connection, through the proxy that the environment names, and what to ask it for."""
    assert url.hostname is not None
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    target = url.path or "/"
    direct = url.hostname in ("localhost", "127.0.0.1", "::1") or proxy_bypass(url.hostname)
    proxy = None if direct else getproxies().get(url.scheme)
    if proxy is None:
        return kind(url.hostname, url.port, timeout=timeout_s), target
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    through = kind(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    if url.scheme == "https":
        through.set_tunnel(url.hostname, url.port)
        return through, target
    return through, url.geturl()


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _seconds(text: str | None) -> float | None:
    """A Retry-After of seconds; its other form, a date, is left to our own back-off."""
    return float(text) if text is not None and text.strip().isascii() and text.strip().isdigit() else None
