"""A teacher behind an OpenAI-compatible URL: many requests at a time, each tried until it succeeds or cannot."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rewards.http_json import bearer, chat_url
from rewards.http_retry import Outcome, Pace, post_json_retrying
from rl.distill.journal import Received, Wanted
from rl.distill.tally import kind_of
from rl.recipe_distill import ApiTeacher

LONGEST_WAIT_S = 600.0
_HOPELESS = frozenset({401, 402, 404})  # no key, no credit, no such model: no other request would succeed


@dataclass(frozen=True)
class Failed:
    """A trace that could not be had. `hopeless`: nor can any other."""

    wanted: Wanted
    reason: str
    hopeless: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of one request: a response, a refusal for good, or a failure; and why earlier tries failed."""

    result: Received | Failed
    retried: tuple[str, ...]


def ask_all(
    teacher: ApiTeacher,
    wanted: Sequence[Wanted],
    payload_of: Callable[[Wanted], Mapping[str, Any]],
) -> Generator[list[Answer], None, None]:
    """The answers in batches, as they come in. Closing the iterator stops asking.

    No more than two answers a thread wait for the caller: what he has not seen is what a kill could lose.
    The threads are daemons: an interrupted run ends at once, although a request may be under way for half an hour.
    """
    headers = bearer(teacher.api_key_env)
    waiting: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
    stop, pace = threading.Event(), Pace(teacher.requests_per_minute)
    threads = min(teacher.max_concurrency, len(wanted))
    room = threading.Semaphore(2 * threads)
    for trace in wanted:
        waiting.put(trace)

    def work() -> None:
        while room.acquire() and not stop.is_set():
            try:
                trace = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answers.put(_ask(teacher, trace, payload_of(trace), headers, stop, pace))
            except BaseException as error:  # a defect of ours: the run must hear of it instead of waiting for ever
                answers.put(error)
                return

    for number in range(threads):
        threading.Thread(target=work, name=f"teacher-{number}", daemon=True).start()
    left = len(wanted)
    try:
        while left:
            batch = [_checked(answers.get())]
            while not answers.empty():
                batch.append(_checked(answers.get()))
            left -= len(batch)
            yield batch
            room.release(len(batch))
    finally:
        stop.set()
        room.release(max(1, threads))


def _checked(answer: Answer | BaseException) -> Answer:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def request_payload(teacher: ApiTeacher, messages: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The body of a request. What a plain OpenAI server does not know is only sent where the recipe sets it."""
    payload: dict[str, Any] = {
        "model": teacher.model,
        "messages": [dict(message) for message in messages],
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": teacher.max_tokens,
    }
    further = {"top_k": teacher.top_k, "min_tokens": teacher.min_tokens, "stop_token_ids": list(teacher.stop_token_ids)}
    payload |= {name: value for name, value in further.items() if value}
    if teacher.send_seed:
        payload["seed"] = seed
    payload |= teacher.body
    return {name: value for name, value in payload.items() if value is not None}


def _ask(
    teacher: ApiTeacher,
    wanted: Wanted,
    payload: Mapping[str, Any],
    headers: Mapping[str, str],
    stop: threading.Event,
    pace: Pace,
) -> Answer:
    outcome = post_json_retrying(
        chat_url(teacher.base_url),
        payload,
        headers,
        timeout_s=teacher.timeout_s,
        retries=teacher.retries,
        backoff_s=teacher.backoff_s,
        stop=stop,
        longest_wait_s=LONGEST_WAIT_S,
        pace=pace,
        wrong_with=wrong_with,
    )
    if outcome.ok and outcome.reply is not None:
        return Answer(_received(wanted, outcome.reply.body), outcome.failures)
    reason = _explained(outcome, headers)
    if outcome.final and outcome.reply is not None:
        if outcome.reply.status in _HOPELESS:
            return Answer(Failed(wanted, reason, hopeless=True), outcome.failures[:-1])
        refused = Received(**asdict(wanted), finish_reason="error", error=reason)
        return Answer(refused, outcome.failures[:-1])
    return Answer(Failed(wanted, reason), outcome.failures[:-1])


def wrong_with(body: Any) -> str | None:
    """Why a reply of status 200 is no response: garbage, an error in disguise, an empty message."""
    try:
        choice = body["choices"][0]
        content, thinking = _texts(choice["message"])
    except (KeyError, IndexError, TypeError):
        return "the reply is not a chat completion"
    if choice.get("finish_reason") == "error":
        return "the reply holds an error"
    return None if content.strip() or thinking.strip() else "the reply is empty"


def _texts(message: Mapping[str, Any]) -> tuple[str, str]:
    """(content, reasoning), of which DeepSeek and vLLM name the second `reasoning_content`, others `reasoning`."""
    content = message["content"] or ""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(thinking, str):
        raise TypeError("not text")
    return content, thinking


def _received(wanted: Wanted, body: Mapping[str, Any]) -> Received:
    choice = body["choices"][0]
    content, thinking = _texts(choice["message"])
    usage = body.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    return Received(
        **asdict(wanted),
        content=content,
        reasoning=thinking,
        finish_reason=str(choice.get("finish_reason") or "stop"),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 else None


def _explained(outcome: Outcome, headers: Mapping[str, str]) -> str:
    """The last failure, with what the server says about it: one printable line, in which no key stands."""
    reason = outcome.failures[-1]
    body = outcome.reply.body if outcome.reply is not None else None
    said: Any = body.get("error", body.get("message", body.get("detail"))) if isinstance(body, Mapping) else None
    said = said.get("message") if isinstance(said, Mapping) else said
    if not isinstance(said, str):
        return reason
    for header in headers.values():
        said = said.replace(header.removeprefix("Bearer "), "***")
    line = "".join(c if c.isprintable() else " " for c in said)
    return f"{reason}: {line[:300]}"


class Giveup:
    """Tells when to stop asking a server that answers nobody: so many failures, and not one response between them."""

    def __init__(self, concurrency: int):
        self.limit = max(20, 2 * concurrency)
        self.reasons: Counter[str] = Counter()

    def add(self, result: Received | Failed) -> bool:
        if isinstance(result, Failed):
            self.reasons[kind_of(result.reason)] += 1
        else:
            self.reasons.clear()
        return self.reasons.total() >= self.limit
