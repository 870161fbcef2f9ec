"""Existing traces in the shapes that people publish them in, as `Trace`s.

    adapter          a row
    table            one or several responses in named columns: prompt, completion, thinking, gold ...
    messages         a conversation in `messages` or `conversations`; the last turn is the response
    openr1           OpenR1-Math: problem, answer, generations (a list), finish_reasons or is_reasoning_complete
    openthoughts     OpenThoughts: conversations whose thought stands between <|begin_of_thought|> marks
    gsm8k            question, answer: a worked solution whose last line is "#### N"
    odyssey          {"Problem_7": "worked solution, then its answer as JSON"}
    reasoning-gym    a whole results file of reasoning-gym-eval: metadata, categories, datasets, results
    traces           a table that we wrote

Problems without an id are told apart by their statement, and their traces numbered in the order of the source.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from data.answers import clean_answer, split_gsm8k
from data.errors import DataError, did_you_mean
from data.sources import Row, find_files, read_rows
from data.split import normalise_statement
from data.trace_spec import TraceSource
from data.traces import Trace, mended, sampling_settings, split_message, split_response, trace_of

# The source columns tried, in order, for a name of `table` that is not mapped.
USUAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "problem_id", "uuid"),
    "prompt": ("prompt", "problem", "question", "instruction", "query", "input"),
    "completion": ("completion", "response", "message_content", "generation", "output", "solution"),
    "thinking": ("thinking", "reasoning", "reasoning_content", "message_thinking"),
    "gold": ("gold", "answer", "gtruth_answer", "expected_answer", "ground_truth"),
    "kind": ("kind",),
    "teacher": ("teacher", "model"),
    "finish_reason": ("finish_reason",),
}
_FIX = "Mend the row, set another adapter, or set on_error: skip."


def read_source(spec: TraceSource) -> Iterator[Trace | DataError]:
    """The traces of a source, lazily, and for each bad row the error that says what is wrong with it.

    Raises DataError for a source that cannot be read at all.
    """
    numbers: Counter[str] = Counter()
    for draft in _drafts(spec):
        if isinstance(draft, DataError):
            yield draft
            continue
        draft = mended(draft)
        if spec.teacher is not None:
            draft = replace(draft, teacher=spec.teacher)
        name = draft.id or _content_id(draft.source, draft.prompt)
        yield replace(draft, id=name, sample=numbers[name])
        numbers[name] += 1


def _drafts(spec: TraceSource) -> Iterator[Trace | DataError]:
    if spec.adapter == "reasoning-gym":
        for row in islice(_gym_rows(spec), spec.limit):
            yield from _converted(_gym_traces, row)
        return
    convert = _ADAPTERS[spec.adapter] if spec.adapter != "table" else _table_adapter(spec.columns)
    for row in islice(read_rows(spec.rows(), streaming=spec.limit is not None), spec.limit):
        yield from _converted(convert, row)


def _converted(convert: Callable[[Row], Iterator[Trace]], row: Row) -> Iterator[Trace | DataError]:
    try:
        yield from list(convert(row))
    except DataError as error:
        yield error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        yield DataError(row.place, f"not of this adapter's shape ({type(error).__name__}: {error})", _FIX)


def _content_id(source: str, prompt: str) -> str:
    return hashlib.sha256(f"{source}\0{normalise_statement(prompt)}".encode()).hexdigest()[:16]


def _text(value: Any, what: str, row: Row) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(row.place, f"{what} is missing or empty", _FIX)
    return value.strip()


# ---- adapters: one row of a source -> its traces ---------------------------------------------------


def _table_adapter(mapped: Mapping[str, str]) -> Callable[[Row], Iterator[Trace]]:
    def convert(row: Row) -> Iterator[Trace]:
        cells = {}
        for ours, usual in USUAL_COLUMNS.items():
            if ours in mapped and mapped[ours] not in row.values:
                hint = did_you_mean(mapped[ours], row.values) or f"There are {', '.join(row.values)}."
                raise DataError(f"{row.place}: columns.{ours}", f"there is no column {mapped[ours]!r}", hint)
            names = [mapped[ours]] if ours in mapped else [name for name in usual if name in row.values]
            cells[ours] = row.values[names[0]] if names else None
        completions = cells["completion"] if isinstance(cells["completion"], list) else [cells["completion"]]
        for completion in completions:
            thinking, answer = split_message({"content": completion, "reasoning_content": cells["thinking"]})
            if not thinking and not answer:
                raise DataError(row.place, "neither a completion nor thinking", "Map columns.completion to one.")
            yield Trace(
                id=clean_answer(cells["id"]),
                prompt=_prompt_text(cells["prompt"], row),
                thinking=thinking,
                answer=answer,
                gold=clean_answer(cells["gold"]),
                kind=str(cells["kind"] or "math"),
                teacher=str(cells["teacher"] or ""),
                source=row.source,
                finish_reason=_finish_reason(cells["finish_reason"], answer),
            )

    return convert


def _prompt_text(value: Any, row: Row) -> str:
    """A statement, or the last user's turn of a conversation."""
    if isinstance(value, list):
        turns = [m.get("content", m.get("value")) for m in value if m.get("role", m.get("from")) in ("user", "human")]
        value = turns[-1] if turns else None
    return _text(value, "the prompt", row)


def _finish_reason(said: Any, answer: str) -> str:
    """What the source says; otherwise a trace without an answer was cut off in its thinking."""
    return str(said) if said else "stop" if answer else "length"


def _conversation(row: Row, thought: Callable[[Mapping[str, Any]], tuple[str, str]]) -> Iterator[Trace]:
    turns = row.values.get("messages") or row.values.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise DataError(row.place, "no conversation in `messages` or `conversations`", _FIX)
    last = dict(turns[-1])
    if last.get("role", last.get("from")) not in ("assistant", "gpt"):
        raise DataError(row.place, "the last turn is not the assistant's", _FIX)
    last.setdefault("content", last.get("value"))
    thinking, answer = thought(last)
    if not thinking and not answer:
        raise DataError(row.place, "the last turn is empty", _FIX)
    gold = next((row.values[name] for name in USUAL_COLUMNS["gold"] if name in row.values), None)
    yield Trace(
        id=clean_answer(row.values.get("id") or row.values.get("uuid")),
        prompt=_prompt_text(turns[:-1], row),
        thinking=thinking,
        answer=answer,
        gold=clean_answer(gold),
        source=row.source,
        finish_reason=_finish_reason(row.values.get("finish_reason"), answer),
    )


_MARKED = re.compile(
    r"<\|begin_of_thought\|>(?P<thinking>.*?)<\|end_of_thought\|>\s*"
    r"(?:<\|begin_of_solution\|>)?(?P<answer>.*?)(?:<\|end_of_solution\|>)?\s*\Z",
    re.DOTALL,
)


def _marked_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    match = _MARKED.search(message.get("content") or "")
    return (match["thinking"].strip(), match["answer"].strip()) if match else split_message(message)


def _openr1(row: Row) -> Iterator[Trace]:
    values = row.values
    generations = values.get("generations")
    if not generations:
        yield from _conversation(row, split_message)
        return
    reasons = values.get("finish_reasons") or [None] * len(generations)
    complete = values.get("is_reasoning_complete") or [None] * len(generations)
    for text, reason, whole in zip(generations, reasons, complete, strict=True):
        thinking, answer = split_response(_text(text, "a generation", row))
        yield Trace(
            id=clean_answer(values.get("uuid")),
            prompt=_text(values.get("problem"), "the problem", row),
            thinking=thinking,
            answer=answer,
            gold=clean_answer(values.get("answer")),
            teacher="DeepSeek-R1",
            source=row.source,
            finish_reason="length" if reason is None and whole is False else _finish_reason(reason, answer),
        )


def _gsm8k(row: Row) -> Iterator[Trace]:
    """The working without its calculator's marks is the reasoning, its number in a box the answer."""
    parts = split_gsm8k(_text(row.values.get("answer"), "the answer", row))
    if parts is None:
        raise DataError(row.place, "the answer has no `#### N`", _FIX)
    working, number = parts
    yield Trace(
        id="",
        prompt=_prompt_text(row.values.get("question"), row),
        thinking=working,
        answer=f"\\boxed{{{number}}}",
        gold=clean_answer(number),
        source=row.source,
        finish_reason="stop",
    )


_OPENING, _CLOSING = "```json\n", "\n```"


def _odyssey(row: Row) -> Iterator[Trace]:
    """The working is the reasoning, the JSON block behind it the answer; without one the solution was cut off."""
    if len(row.values) != 1:
        raise DataError(row.place, f"{len(row.values)} keys, not one", _FIX)
    key, text = next(iter(row.values.items()))
    text = _text(text, "the solution", row)
    thinking, answer = _json_working(text) if text.startswith(_OPENING) else _json_tail(text)
    yield Trace(
        id=key,
        prompt="",  # stands in the problems' file: join
        thinking=thinking,
        answer=answer,
        source=row.source,
        finish_reason=_finish_reason(None, answer),
    )


def _json_tail(text: str) -> tuple[str, str]:
    working, opened, block = text.rpartition(f"\n{_OPENING}")
    if not opened or not block.endswith(_CLOSING):
        return text, ""
    return working.strip(), f"{opened}{block}".strip()


def _json_working(text: str) -> tuple[str, str]:
    """Of a solution whose working stands inside its JSON: `{"reasoning": "...", "answer": ...}`. By text, as LaTeX and
    line breaks in the strings make it none that a parser would read."""
    head, found, last = text.rpartition('"answer":')
    _, opened, working = head.partition('"reasoning":')
    if not found or not opened or not text.endswith(_CLOSING):
        return text, ""
    return working.strip().removesuffix(",").strip().strip('"').strip(), f"{_OPENING}{{\n    {found}{last}"


def _own(row: Row) -> Iterator[Trace]:
    yield replace(trace_of(row.values, row.place), dropped=None)


_ADAPTERS: dict[str, Callable[[Row], Iterator[Trace]]] = {
    "messages": lambda row: _conversation(row, split_message),
    "openthoughts": lambda row: _conversation(row, _marked_thought),
    "openr1": _openr1,
    "gsm8k": _gsm8k,
    "odyssey": _odyssey,
    "traces": _own,
}


# ---- reasoning-gym: a file is one document ----------------------------------------------------------


def _gym_rows(spec: TraceSource) -> Iterator[Row]:
    if spec.path is None:
        raise DataError("traces.path", "the adapter reasoning-gym reads files", "Give path instead of hub.")
    for file in find_files(spec.path):
        try:
            document = json.loads(file.read_bytes())
            metadata = dict(document["metadata"])
            sets = [data for category in document["categories"] for data in category["datasets"]]
            for data in sets:
                for number, result in enumerate(data["results"], start=1):
                    place = f"{file}: {data['name']} result {number}"
                    values = {"result": result, "name": data["name"], "config": data["config"], "metadata": metadata}
                    yield Row(values, place, f"reasoning-gym/{data['name']}")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"not a results file of reasoning-gym-eval ({type(error).__name__}: {error})"
            raise DataError(str(file), reason, "Check traces.adapter.") from error


def _gym_traces(row: Row) -> Iterator[Trace]:
    result, metadata = row.values["result"], row.values["metadata"]
    named = ("temperature", "top_p", "max_tokens")
    settings = {name: metadata[name] for name in named if name in metadata}
    for completion in result["completions"]:
        thinking, answer = split_response(_text(completion["full_model_response"], "a response", row))
        yield Trace(
            id="",
            prompt=_text(result["question"], "the question", row),
            thinking=thinking,
            answer=answer,
            gold=clean_answer(result["expected_answer"]),
            teacher=str(metadata.get("model", "")).rpartition("/")[2],
            sampling=sampling_settings(**settings),
            source=row.source,
            finish_reason=_finish_reason(None, answer),
        )
