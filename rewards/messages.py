"""Completions come as text or, for chat prompts, as lists of chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Completion = str | Sequence[Message]


def is_conversation(value: object) -> bool:
    """True for a non-empty list of messages, each with a role."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def completion_text(completion: Completion) -> str:
    """The text to judge: the string itself, or the content of the last assistant message."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return str(message.get("content") or "")
    return ""
