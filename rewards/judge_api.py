"""The bodies of a judge's requests and replies, by endpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .messages import Completion, completion_text, is_conversation
from .rubric import fill_rubric, parse_score


@dataclass(frozen=True)
class Judge:
    """Where and how to ask; the fields are the args of `judge`, checked."""

    url: str
    endpoint: Literal["chat", "classify", "score", "pooling"]
    model: str | None
    rubric: str
    low: float
    high: float
    concurrency: int
    timeout_s: float
    retries: int
    backoff_s: float
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(repr=False)  # holds the key
    cache: str | None


def judged_text(completion: Completion, part: str, prefill: str) -> str:
    """All of the response, or what follows its thinking; a thought that never ends has no answer."""
    text = prefill + completion_text(completion)
    if part == "all":
        return text
    _, closed, answer = text.rpartition("</think>")
    return "" if not closed and "<think>" in text else answer.strip()


def payload_of(asked: Judge, prompt: Any, text: str, reference: str | None, *, mark: str) -> dict[str, Any]:
    """What is posted."""
    payload: dict[str, Any] = {} if asked.model is None else {"model": asked.model}
    if asked.endpoint == "chat":
        content = fill_rubric(
            asked.rubric,
            prompt=_as_text(prompt),
            completion=text,
            reference=None if reference is None else str(reference),
            low=asked.low,
            high=asked.high,
            mark=mark,
        )
        payload |= {"messages": [{"role": "user", "content": content}], "temperature": 0.0, "max_tokens": 1024}
    elif asked.endpoint == "score":
        payload |= {"text_1": _as_text(prompt), "text_2": text}
    else:
        before = list(prompt) if is_conversation(prompt) else [{"role": "user", "content": str(prompt)}]
        payload["messages"] = [*before, {"role": "assistant", "content": text}]
    payload |= asked.body
    return {name: value for name, value in payload.items() if value is not None}


def score_of(asked: Judge, body: Any) -> float | None:
    """The reward in a reply: a judge's score scaled to [0, 1], a reward model's own number; None without one.

    A reward model's reply is read where vLLM puts it, data[0], and must hold one number: a classifier of one class
    (`probs`), a pooled score (`data`), or a `score`.
    """
    try:
        if asked.endpoint == "chat":
            score = parse_score(body["choices"][0]["message"]["content"], asked.low, asked.high)
            return None if score is None else (score - asked.low) / (asked.high - asked.low)
        field = {"classify": "probs", "pooling": "data", "score": "score"}[asked.endpoint]
        return _single_number(body["data"][0][field])
    except (KeyError, IndexError, TypeError):
        return None


def _single_number(value: Any) -> float | None:
    """A finite number, possibly inside lists of one element."""
    for _ in range(4):
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _as_text(prompt: Any) -> str:
    """The prompt to be read by a judge: the text itself, or the conversation with its roles."""
    if not is_conversation(prompt):
        return str(prompt)
    messages: list[Mapping[str, Any]] = list(prompt)
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)
