"""The trace format: splitting responses, the table, and the shapes that traces are imported from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError
from data.trace_import import read_source
from data.trace_join import join_problems
from data.trace_spec import TraceSource
from data.traces import (
    COLUMNS,
    Trace,
    join_response,
    mended,
    pieces,
    read_traces,
    split_message,
    split_response,
    write_traces,
)  # fmt: skip
from rewards.math import grade

# ---- splitting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\na\n</think>\n\nb", "a", "b"),
        (" <think> a </think> <answer> b </answer>", "a", "<answer> b </answer>"),
        ("a\n</think>\nb", "a", "b"),  # the prompt had opened the tag
        ("b", "", "b"),
        ("<think>a", "a", ""),
        ("<think></think>b", "", "b"),
        ("<think>a</think>", "a", ""),
        ("Well. <think>a</think>b", "Well. a", "b"),
        ("<think>a</think>b</think>c", "a</think>b", "c"),
        ("", "", ""),
    ],
)
def test_split(text: str, thinking: str, answer: str) -> None:
    assert split_response(text) == (thinking, answer)


@pytest.mark.parametrize("text", ["<think>a</think>\\boxed{4}<think>b", "<think>a</think> \\boxed{4} <think>"])
def test_thinking_that_opens_again_has_no_answer_before_or_after_splitting(text: str) -> None:
    thinking, answer = split_response(text)
    assert answer == ""
    assert grade(text, "4").verdict == grade(join_response(thinking, answer), "4").verdict == "unparsed"


def test_joining_is_the_inverse_of_splitting() -> None:
    for thinking, answer in [("a\n\nb", "c\nd"), ("", "c"), ("a", "")]:
        assert split_response(join_response(thinking, answer)) == (thinking, answer)
    assert join_response("a", "b") == "<think>\na\n</think>\n\nb"


def test_messages() -> None:
    assert split_message({"content": " b ", "reasoning_content": "a\n"}) == ("a", "b")
    assert split_message({"content": None, "reasoning": "a"}) == ("a", "")
    assert split_message({"content": "<think>a</think>b", "reasoning_content": None}) == ("a", "b")
    with pytest.raises(ValueError, match="not text"):
        split_message({"content": [{"type": "text", "text": "b"}]})


def test_pieces_are_words_numbers_and_signs() -> None:
    assert pieces("So 12+x=ab, 因为é") == ["So", "12", "+", "x", "=", "ab", ",", "因", "为", "é"]


# ---- the table -------------------------------------------------------------------------------------

FULL = Trace(
    id="p", prompt="é?", thinking="a", answer="b", sample=2, gold="1", kind="integer", verdict="correct", reward=1.0,
    prompt_tokens=3, thinking_tokens=1, answer_tokens=1, language=1.0, repetition=0.1, teacher="r1", sampling="{}",
    source="s", finish_reason="stop", dropped="x",
)  # fmt: skip


def test_table_round_trip_and_one_schema(tmp_path: Path) -> None:
    traces = [FULL, Trace("q", "p", "", "b")]
    write_traces(traces, tmp_path / "a.parquet")
    assert read_traces(tmp_path / "a.parquet") == traces
    write_traces(traces, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    write_traces([Trace("q", "p", "", "b")], tmp_path / "nulls.parquet")  # columns of nothing but nulls keep their type
    write_traces([], tmp_path / "none.parquet")
    schemas = [pq.read_schema(tmp_path / f"{name}.parquet") for name in ("a", "nulls", "none")]
    assert schemas[0] == schemas[1] == schemas[2] and tuple(schemas[0].names) == COLUMNS


def test_bad_tables(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_traces(tmp_path / "t.parquet")
    rows = {"id": ["a"], "prompt": ["b"], "thinking": ["c"], "answr": ["d"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"row 1: a trace has no column 'answr'. did you mean 'answer'\?"):
        read_traces(tmp_path / "t.parquet")


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    trace = mended(Trace("a", "p\ud800", "th\udfff", "é"))
    assert trace == Trace("a", "p?", "th?", "é")
    write_traces([trace], tmp_path / "t.parquet")


# ---- importing -------------------------------------------------------------------------------------


def imported(tmp_path: Path, rows: Any, adapter: str = "table", **spec: Any) -> list[Trace | DataError]:
    path = tmp_path / "source.json"
    path.write_text(json.dumps(rows))
    return list(read_source(TraceSource(path=str(path), adapter=adapter, **spec)))  # type: ignore[arg-type]


def parts(traces: list[Trace | DataError]) -> list[tuple[str, ...]]:
    assert all(isinstance(trace, Trace) for trace in traces), traces
    return [(t.prompt, t.thinking, t.answer, t.gold, t.finish_reason) for t in traces]  # type: ignore[union-attr]


def test_tables_with_usual_mapped_and_several_columns(tmp_path: Path) -> None:
    rows = [
        {"problem": "1+1?", "gtruth_answer": "2", "message_thinking": "a", "message_content": "b"},
        {"problem": "1+2?", "gtruth_answer": 3.0, "message_thinking": None, "message_content": "<think>c</think>d"},
        {"problem": "1+1 ?", "gtruth_answer": "2", "message_thinking": "", "message_content": "<think>cut"},
    ]
    traces = imported(tmp_path, rows, teacher="qwen")
    assert parts(traces) == [
        ("1+1?", "a", "b", "2", "stop"),
        ("1+2?", "c", "d", "3", "stop"),
        ("1+1 ?", "cut", "", "2", "length"),
    ]
    assert [t.sample for t in traces] == [0, 0, 1]  # type: ignore[union-attr]
    assert traces[0].id == traces[2].id != traces[1].id  # type: ignore[union-attr]
    rows = [{"q": [{"role": "user", "content": "1+1?"}], "outs": ["<think>a</think>b", "c"], "t": "r1", "n": 7}]
    columns = {"prompt": "q", "completion": "outs", "teacher": "t", "id": "n"}
    traces = imported(tmp_path, rows, columns=columns)
    assert [(t.id, t.sample, t.teacher, t.answer) for t in traces] == [("7", 0, "r1", "b"), ("7", 1, "r1", "c")]  # type: ignore[union-attr]


def test_bad_rows_are_errors_that_say_where(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "completion": ""}, {"prompt": "", "completion": "b"}, {"prompt": "q", "completion": "b"}]
    found = imported(tmp_path, rows)
    assert [type(row) for row in found] == [DataError, DataError, Trace]
    assert "source.json row 1: neither a completion nor thinking" in str(found[0])
    assert "source.json row 2: the prompt is missing or empty" in str(found[1])
    (error,) = imported(tmp_path, [{"prompt": "1+1?", "completion": "b"}], columns={"completion": "compl"})
    assert "columns.completion: there is no column 'compl'. did you mean 'completion'?" in str(error)
    (error,) = imported(tmp_path, [{"problem": "q", "generations": [1]}], "openr1")
    assert "row 1: a generation is missing or empty" in str(error)


def test_specs_that_make_no_sense() -> None:
    for spec, message in [
        ({}, "exactly one of path and hub"),
        ({"path": "a", "hub": "b"}, "exactly one of path and hub"),
        ({"path": "a", "split": "x", "revision": "y"}, "only a hub data set has one"),
        ({"path": "a", "adapter": "openr1", "columns": {"gold": "x"}}, "knows its columns"),
        ({"path": "a", "columns": {"gould": "x"}}, "did you mean 'gold'"),
    ]:
        with pytest.raises(ValueError, match=message):
            TraceSource(**spec)


def test_openr1(tmp_path: Path) -> None:
    rows = [
        {
            "problem": "1+1?", "answer": "2", "uuid": "u", "finish_reasons": None,
            "generations": ["<think>a</think>b", "<think>cut", "<think>c"],
            "is_reasoning_complete": [True, False, None],
        },
        {
            "problem": "1+2?", "answer": "3", "generations": ["<think>a</think>b"], "finish_reasons": ["length"],
            "is_reasoning_complete": [True],
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>a</think>b"}]},
    ]  # fmt: skip
    assert parts(imported(tmp_path, rows, "openr1")) == [
        ("1+1?", "a", "b", "2", "stop"),
        ("1+1?", "cut", "", "2", "length"),
        ("1+1?", "c", "", "2", "length"),
        ("1+2?", "a", "b", "3", "length"),
        ("q", "a", "b", "", "stop"),
    ]


def test_conversations_and_openthoughts(tmp_path: Path) -> None:
    said = (
        "<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\nb \\boxed{2}\n\n<|end_of_solution|>"
    )
    turns = [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": said}]
    rows = [{"system": "Think.", "conversations": turns}]
    assert parts(imported(tmp_path, rows, "openthoughts")) == [("1+1?", "a", "b \\boxed{2}", "", "stop")]
    rows = [{"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "b", "reasoning_content": "a"},
    ], "answer": "2"}]  # fmt: skip
    assert parts(imported(tmp_path, rows, "messages")) == [("1+1?", "a", "b", "2", "stop")]
    (error,) = imported(tmp_path, [{"messages": turns[:1] * 2}], "messages")
    assert "the last turn is not the assistant's" in str(error)


def test_gsm8k_solutions(tmp_path: Path) -> None:
    rows = [
        {"question": "Half of 2,000?", "answer": "2000/2 = <<2000/2=1000>>1000\n#### 1,000"},
        {"question": "1?", "answer": "no mark"},
    ]
    good, bad = imported(tmp_path, rows, "gsm8k")
    assert parts([good]) == [("Half of 2,000?", "2000/2 = 1000", "\\boxed{1000}", "1000", "stop")]
    assert isinstance(bad, DataError) and "no `#### N`" in str(bad)


def test_odyssey_solutions(tmp_path: Path) -> None:
    rows = [
        {"Problem_1": 'Working.\n\n```json\n{\n    "reasoning": "r",\n    "answer": 15\n}\n```'},
        {"Problem_2": '```json\n{\n    "reasoning": "So \\( x \\)\nis "it".",\n    "answer": "A"\n}\n```'},
        {"Problem_3": "Cut off in the"},
        {"Problem_4": '```json\n{\n    "reasoning": "cut'},
        {"Problem_5": 'Working.\n```json\n{\n    "answer": 1'},
    ]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    traces = [t for t in read_source(TraceSource(path=str(path), adapter="odyssey")) if isinstance(t, Trace)]
    assert [(t.id, t.thinking, t.finish_reason) for t in traces] == [
        ("Problem_1", "Working.", "stop"),
        ("Problem_2", 'So \\( x \\)\nis "it".', "stop"),
        ("Problem_3", "Cut off in the", "length"),
        ("Problem_4", '```json\n{\n    "reasoning": "cut', "length"),
        ("Problem_5", 'Working.\n```json\n{\n    "answer": 1', "length"),
    ]
    assert [grade(t.response, gold).verdict for t, gold in zip(traces, ["15", "A", "1", "1", "1"], strict=True)] == [
        "correct", "correct", "unparsed", "unparsed", "unparsed",
    ]  # fmt: skip


def test_reasoning_gym(tmp_path: Path) -> None:
    completions = [{"full_model_response": f"<think>a</think><answer>{n}</answer>", "model_answer": n} for n in (1, 2)]
    result = {"question": "1+1?", "expected_answer": 2, "completions": completions}
    sets = [{"name": "sums", "config": {"seed": 1}, "results": [result, {"question": "q"}]}]
    document = {"metadata": {"model": "../m/qwen", "temperature": 0.6}, "categories": [{"name": "x", "datasets": sets}]}
    first, second, bad = imported(tmp_path, document, "reasoning-gym")
    assert isinstance(first, Trace) and isinstance(second, Trace) and isinstance(bad, DataError)
    assert (first.prompt, first.thinking, first.answer, first.gold) == ("1+1?", "a", "<answer>1</answer>", "2")
    assert (first.teacher, first.source, first.sampling) == ("qwen", "reasoning-gym/sums", '{"temperature": 0.6}')
    assert (first.id, second.sample) == (second.id, 1) and "sums result 2" in str(bad)
    with pytest.raises(DataError, match="not a results file of reasoning-gym-eval"):
        imported(tmp_path, [1], "reasoning-gym")


def test_our_own_table_again(tmp_path: Path) -> None:
    write_traces([FULL], tmp_path / "t.parquet")
    assert list(read_source(TraceSource(path=str(tmp_path / "t.parquet"), adapter="traces"))) == [
        replace(FULL, sample=0, dropped=None)
    ]


def test_joining_with_problems() -> None:
    problems = [
        {"id": "a", "key": "P1", "problem": "What is $1+1$?", "answer": "2", "kind": "integer"},
        {"id": "b", "key": "P2", "problem": "What is 2+2?", "answer": "4", "kind": "integer"},
    ]
    traces = [Trace("P2", "", "", "x"), Trace("P9", "", "", "y"), Trace("P2", "", "", "z")]
    first, missing, third = join_problems(traces, problems, "key")
    assert not isinstance(first, DataError) and first[1] is problems[1]
    assert first[0] == Trace("b", "What is 2+2?", "", "x", gold="4", kind="integer")
    assert isinstance(missing, DataError) and "trace 'P9'" in str(missing)
    assert not isinstance(third, DataError) and third[0].sample == 1
    (found,) = join_problems([Trace("?", "What is 1 + 1 ?", "", "x")], problems, None)
    assert not isinstance(found, DataError) and found[0].id == "a"
    with pytest.raises(DataError, match=r"no column 'kee'.*did you mean 'key'\?"):
        list(join_problems([], problems, "kee"))
