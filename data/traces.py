"""A teacher's traces: one record, one table, and the way between raw completions and the two parts of a response.

    <think>\\n{thinking}\\n</think>\\n\\n{answer}

A trace whose `answer` is empty is one that never got out of its thinking.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

_PIECE = re.compile(r"[A-Za-z]+|\d+|\S")


@dataclass(frozen=True)
class Trace:
    """One response of a teacher to one problem, what the rewards say of it, and why it was left out, if it was.

    id: of the problem; `sample` numbers the traces of a problem from 0.
    prompt: the bare statement; the template that it was asked in is among the `sampling` settings (JSON).
    answer: the text after the reasoning, as the teacher wrote it. gold: the right answer, "" if unknown.
    finish_reason: "stop", "length", or what else the teacher's server says.
    thinking_tokens, answer_tokens: by one tokenizer for the whole table, see its report.
    language, repetition: shares of the reasoning, see `data.select`.
    """

    id: str
    prompt: str
    thinking: str
    answer: str
    sample: int = 0
    gold: str = ""
    kind: str = "math"
    verdict: str | None = None
    reward: float | None = None
    prompt_tokens: int | None = None
    thinking_tokens: int = 0
    answer_tokens: int = 0
    language: float | None = None
    repetition: float = 0.0
    teacher: str = ""
    sampling: str = "{}"
    source: str = ""
    finish_reason: str = "stop"
    dropped: str | None = None

    @property
    def response(self) -> str:
        """The whole response with its tags, as rewards and format checks read it."""
        return join_response(self.thinking, self.answer)

    @property
    def tokens(self) -> int:
        return self.thinking_tokens + self.answer_tokens


def split_response(text: str) -> tuple[str, str]:
    """(thinking, answer) of a raw completion.

    The answer is what follows the last `</think>`, so it is empty if the reasoning never ends. `<think>` may be
    missing, as it is where the prompt already opened it. A text without tags is all answer.
    """
    before, closed, after = text.rpartition("</think>")
    lead, opened, rest = after.partition("<think>")
    if opened:  # never closed, or opened again behind the last close, which then closes nothing
        return _without_opening(f"{before}{lead}{rest}"), ""
    return (_without_opening(before), after.strip()) if closed else ("", text.strip())


def _without_opening(text: str) -> str:
    lead, opened, rest = text.partition("<think>")
    return (lead + rest if opened else text).strip()


def join_response(thinking: str, answer: str) -> str:
    """The response in its one written form; the inverse of `split_response` up to white space at the seams."""
    if not thinking:
        return answer
    return f"<think>\n{thinking}\n</think>\n\n{answer}" if answer else f"<think>\n{thinking}"


def split_message(message: Mapping[str, Any]) -> tuple[str, str]:
    """(thinking, answer) of a chat message; `reasoning_content` and `reasoning` are where servers put the first."""
    content = message.get("content") or ""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(thinking, str):
        raise ValueError("the message's content is not text")
    return (thinking.strip(), content.strip()) if thinking.strip() else split_response(content)


def mended(trace: Trace) -> Trace:
    """Without lone surrogates, which JSON can hold and files of text cannot."""
    texts = {name: value for name, value in vars(trace).items() if isinstance(value, str) and not value.isascii()}
    clean: dict[str, Any] = {name: value.encode("utf-8", "replace").decode() for name, value in texts.items()}
    return replace(trace, **clean)


def pieces(text: str) -> list[str]:
    """Latin words, numbers, and every other character: what stands in for tokens where no tokenizer is named."""
    return _PIECE.findall(text)


# ---- the table -----------------------------------------------------------------------------------

_INTEGERS = frozenset({"sample", "prompt_tokens", "thinking_tokens", "answer_tokens"})
_NUMBERS = frozenset({"reward", "language", "repetition"})
COLUMNS = tuple(field.name for field in fields(Trace))


def trace_table(traces: Sequence[Trace]) -> "pa.Table":
    """One row a trace, always of the same schema, so that equal traces give equal files."""
    import pyarrow as pa

    kinds = {**dict.fromkeys(_INTEGERS, pa.int64()), **dict.fromkeys(_NUMBERS, pa.float64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    return pa.Table.from_pylist([asdict(trace) for trace in traces], schema=schema)


def write_traces(traces: Sequence[Trace], path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(trace_table(traces), path, compression="zstd")


def read_traces(path: Path) -> list[Trace]:
    """Raises DataError for a file that is not one of traces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(str(path), f"not a Parquet file ({error})", "Write it anew.") from error
    return [trace_of(row, f"{path} row {number}") for number, row in enumerate(rows, start=1)]


def trace_of(row: Mapping[str, Any], place: str) -> Trace:
    """A row of the table as a trace; columns that are absent have their defaults, further ones are an error."""
    for name in row:
        if name not in COLUMNS:
            raise DataError(place, f"a trace has no column {name!r}", did_you_mean(name, COLUMNS) or "Leave it out.")
    for name in ("id", "prompt", "thinking", "answer"):
        if not isinstance(row.get(name), str):
            raise DataError(place, f"column {name!r} is missing or not text", "Was it written by write_traces?")
    return Trace(**row)


def sampling_settings(**settings: Any) -> str:
    """The `sampling` column: settings as JSON, sorted, so that equal settings are equal texts."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)
