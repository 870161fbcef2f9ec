"""One JSON request, tried again while its failure may pass: exponential back-off with jitter, or as the server asks."""

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .http_json import Reply, Unreachable, post_json

RETRIED = frozenset({408, 409, 425, 429})  # and 5xx
_jitter = random.Random()  # of its own: a retry must not move the random streams of a run


class Pace:
    """At most so many requests a minute, evenly spread over all threads; None = no limit.

    A server that asks one request to wait means all of them: `pause` holds back the others too.
    """

    def __init__(self, requests_per_minute: float | None = None):
        self._interval_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0  # when the next request may start, on the monotonic clock
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> bool:
        """Returns when a request may start; False if `stop` was set before."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval_s
        return not stop.wait(start - now) if start > now else not stop.is_set()

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


@dataclass(frozen=True)
class Outcome:
    """What became of a request: the last reply, if one came, and why each try before the successful one failed."""

    ok: bool
    reply: Reply | None
    failures: tuple[str, ...]

    @property
    def final(self) -> bool:
        """Whether asking again would be in vain: the server understood the request and refused it."""
        return not self.ok and self.reply is not None and self.reply.status != 200 and not _may_pass(self.reply.status)


def _may_pass(status: int) -> bool:
    return status >= 500 or status in RETRIED


def post_json_retrying(
    url: str,
    payload: Mapping[str, Any],
    headers: Mapping[str, str],
    *,
    timeout_s: float,
    retries: int,
    backoff_s: float,
    stop: threading.Event,
    longest_wait_s: float = 60.0,
    pace: Pace | None = None,
    wrong_with: Callable[[Any], str | None] = lambda body: None,
) -> Outcome:
    """Up to 1 + retries tries; the k-th retry waits up to backoff_s * 2^k or as long as the server asks, at most
    longest_wait_s.

    stop: set to give up early. wrong_with: what is wrong with the body of a reply of status 200, None if nothing is;
    such a reply counts as a failure that may pass. Never raises for what a server can do.
    """
    failures: list[str] = []
    reply: Reply | None = None
    for attempt in range(retries + 1):
        if pace is not None and not pace.wait(stop):
            failures.append("stopped")
            break
        asks_to_wait, reply = 0.0, None
        try:
            reply = post_json(url, payload, headers, timeout_s=timeout_s)
        except Unreachable as error:
            failures.append(str(error))
        else:
            wrong = wrong_with(reply.body) if reply.status == 200 else f"HTTP {reply.status}"
            if wrong is None:
                return Outcome(True, reply, tuple(failures))
            failures.append(wrong)
            if reply.status != 200 and not _may_pass(reply.status):
                break
            asks_to_wait = min(reply.retry_after_s or 0.0, longest_wait_s)
            if asks_to_wait and pace is not None:
                pace.pause(asks_to_wait)
        wait = max(asks_to_wait, _jitter.uniform(0, min(backoff_s * 2**attempt, longest_wait_s)))
        if attempt == retries or stop.wait(wait):
            break
    return Outcome(False, reply, tuple(failures))
