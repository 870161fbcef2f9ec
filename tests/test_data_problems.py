"""`load_problems` and `describe_problems`: every format and every shape of row."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError, ProblemSpec, describe_problems, load_problems

ROWS = [
    {"question": "What is 1+1?", "answer": "2", "topic": "sums", "rank": 7},
    {"question": "What is 2*3?", "answer": "006", "topic": "products", "rank": 8},
    {"question": "Half of 1?", "answer": "\\frac{1}{2}", "topic": "halves", "rank": 9},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {"jsonl": write_jsonl, "json": write_json, "parquet": write_parquet, "csv": write_csv}


def spec_of(tmp_path: Path, rows: list[Any], **keys: Any) -> dict[str, Any]:
    return {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), **keys}


@pytest.mark.parametrize("extension", WRITERS)
def test_each_file_format_gives_the_same_problems(tmp_path: Path, extension: str) -> None:
    path = WRITERS[extension](tmp_path / f"rows.{extension}", ROWS)
    problems = load_problems({"path": str(path)})
    assert problems.column_names == ["id", "prompt", "problem", "answer", "kind", "source", "topic", "rank"]
    assert problems["prompt"][0] == [{"role": "user", "content": "What is 1+1?"}]
    assert list(problems["problem"]) == [row["question"] for row in ROWS]
    assert list(problems["answer"]) == ["2", "6", "\\frac{1}{2}"]
    assert list(problems["kind"]) == ["integer", "integer", "math"]
    assert set(problems["source"]) == {"rows"}
    assert list(problems["topic"]) == ["sums", "products", "halves"]
    assert list(problems["rank"]) == ([7, 8, 9] if extension != "csv" else ["7", "8", "9"])
    columns, count = describe_problems({"path": str(path)})
    assert columns == problems.column_names
    assert count == 3


def test_ids_do_not_depend_on_the_format_or_the_order(tmp_path: Path) -> None:
    a = load_problems({"path": str(write_jsonl(tmp_path / "rows.jsonl", ROWS))})
    b = load_problems({"path": str(write_parquet(tmp_path / "rows.parquet", ROWS[::-1]))})
    assert list(a["id"]) == list(b["id"])[::-1]
    assert len(set(a["id"])) == 3


def test_globs_and_lists_of_files_are_read_in_order(tmp_path: Path) -> None:
    for name, row in zip("cab", ROWS, strict=True):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    assert list(load_problems({"path": str(tmp_path / "*.jsonl")})["source"]) == ["a", "b", "c"]
    listed = {"path": [str(tmp_path / "c.jsonl"), str(tmp_path / "a.jsonl")], "source": "mine"}
    assert list(load_problems(listed)["topic"]) == ["sums", "products"]
    assert set(load_problems(listed)["source"]) == {"mine"}


def test_columns_are_mapped_and_clashing_ones_kept(tmp_path: Path) -> None:
    row = {"id": 5, "source": "book", "stem": "2+2?", "meta": {"gold": "4"}, "prompt": "ignored",
           "source_id": "x", "why": "two twos", "hidden": ["assert True"]}  # fmt: skip
    columns = {"prompt": "stem", "answer": "meta.gold", "reasoning": "why", "tests": "hidden"}
    problem = load_problems(spec_of(tmp_path, [row], columns=columns))[0]
    assert problem["problem"] == "2+2?" and problem["answer"] == "4" and problem["source"] == "rows"
    assert problem["reasoning"] == "two twos" and problem["tests"] == ["assert True"]
    assert "why" not in problem and "hidden" not in problem and "stem" not in problem
    assert problem["source_id"] == "x" and problem["source_source_id"] == 5
    assert problem["source_source"] == "book" and problem["source_prompt"] == "ignored"
    assert problem["meta"] == {"gold": "4"}


def test_mapped_id_source_and_kind_are_used(tmp_path: Path) -> None:
    rows = [{"problem": "p", "answer": "1", "n": 10, "book": "red", "type": "math"},
            {"problem": "q", "answer": None, "n": 11, "book": "blue", "type": "code"}]  # fmt: skip
    columns = {"id": "n", "source": "book", "kind": "type"}
    problems = load_problems(spec_of(tmp_path, rows, columns=columns))
    assert list(problems["id"]) == ["10", "11"] and list(problems["source"]) == ["red", "blue"]
    assert list(problems["kind"]) == ["math", "code"] and list(problems["answer"]) == ["1", ""]


def test_reasoning_is_taken_only_when_asked(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "solution": "count", "answer": "2"}
    assert "reasoning" not in load_problems(spec_of(tmp_path, [row])).column_names
    asked = load_problems(spec_of(tmp_path, [row], columns={"reasoning": "auto"}))[0]
    assert asked["reasoning"] == "count" and "solution" not in asked


def test_ready_made_messages_pass_unchanged(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3*3?"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": "9"}}
    spec = spec_of(tmp_path, [row], columns={"answer": "reward_model.ground_truth"}, template="boxed")
    problem = load_problems(spec)[0]
    assert problem["prompt"] == messages and problem["problem"] == "3*3?" and problem["answer"] == "9"


def test_template_shapes_the_prompt_and_not_the_statement(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, ROWS[:1], template={"system": "Be exact.", "user": "Q: {problem}"})
    problem = load_problems(spec)[0]
    assert [m["content"] for m in problem["prompt"]] == ["Be exact.", "Q: What is 1+1?"]
    assert problem["problem"] == "What is 1+1?"


def test_gsm8k_is_recognised_only_if_every_answer_has_the_mark(tmp_path: Path) -> None:
    gsm = {"question": "A?", "answer": "He has 4+1000 = <<4+1000=1004>>1004.\n#### 1,004"}
    problem = load_problems(spec_of(tmp_path, [gsm]))[0]
    assert problem["answer"] == "1004" and problem["reasoning"] == "He has 4+1000 = 1004."
    mixed = [gsm, {"question": "B?", "answer": "7"}]
    assert load_problems(spec_of(tmp_path, mixed))["answer"][0].endswith("#### 1,004")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer has no '####'"):
        load_problems(spec_of(tmp_path, mixed, answer_format="gsm8k"))


def test_boxed_answers_balance_braces_and_take_the_last(tmp_path: Path) -> None:
    rows = [{"problem": "p", "solution": "\\boxed{1}, no: \\boxed{\\frac{a_{1}}{\\{2\\}}} done"},
            {"problem": "q", "solution": "\\boxed{3} or \\boxed{4"}]  # fmt: skip
    spec = spec_of(tmp_path, rows, answer_format="boxed", columns={"answer": "solution"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* no complete \\boxed"):
        load_problems(spec)
    assert list(load_problems(spec | {"on_error": "skip"})["answer"]) == ["\\frac{a_{1}}{\\{2\\}}"]


def test_an_escaped_brace_in_a_box_needs_no_partner(tmp_path: Path) -> None:
    row = {"problem": "p", "answer": "\\boxed{f = \\left\\{ x}."}
    assert load_problems(spec_of(tmp_path, [row], answer_format="boxed"))["answer"][0] == "f = \\left\\{ x"


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    for name, text in (("a.csv", "problem,answer\np,1\n"), ("a.jsonl", '{"problem": "p", "answer": 1}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_problems({"path": str(tmp_path / name)})["problem"][0] == "p"


@pytest.mark.parametrize(
    ("raw", "answer", "kind"),
    [
        ("027", "27", "integer"), ("27.0", "27", "integer"), (142.0, "142", "integer"), (12, "12", "integer"),
        ("1,000", "1000", "integer"), ("10{,}000", "10000", "integer"),
        ("$127$\\\\\n\\noindent", "127", "integer"),
        ("\u22125", "-5", "integer"), ("-0", "0", "integer"), ("0", "0", "integer"), ("$3$.", "3", "integer"),
        ("9" * 5000, "9" * 5000, "integer"), (1e300, str(int(1e300)), "integer"),
        ("1,9", "1,9", "math"), ("27.5", "27.5", "math"), ("1,00", "1,00", "math"), ("0.42.", "0.42", "math"),
        ("$42", "42", None), ("x=3", "x=3", "math"), ("3!", "3!", "math"), (0.5, "0.5", "math"),
    ],
)  # fmt: skip
def test_answers_are_cleaned_without_changing_their_value(
    tmp_path: Path, raw: Any, answer: str, kind: str | None
) -> None:
    problem = load_problems(spec_of(tmp_path, [{"problem": "p", "answer": raw}]))[0]
    if kind is None:  # a lone dollar sign is money and stays
        assert (problem["answer"], problem["kind"]) == (raw, "math")
    else:
        assert (problem["answer"], problem["kind"]) == (answer, kind)


def test_kind_math_leaves_an_answer_as_written(tmp_path: Path) -> None:
    problem = load_problems(spec_of(tmp_path, [{"problem": "p", "answer": "1,000"}], kind="math"))[0]
    assert (problem["answer"], problem["kind"]) == ("1,000", "math")


def test_code_problems_need_no_answer(tmp_path: Path) -> None:
    problem = load_problems(spec_of(tmp_path, [{"prompt": "Sort.", "tests": ["t"]}], kind="code"))[0]
    assert (problem["answer"], problem["kind"], problem["tests"]) == ("", "code", ["t"])


def test_duplicates_get_ids_of_their_own(tmp_path: Path) -> None:
    ids = list(load_problems(spec_of(tmp_path, [ROWS[0], ROWS[1], ROWS[0]]))["id"])
    assert ids[2] == f"{ids[0]}-2" and len(set(ids)) == 3


def test_held_out_parts_cover_everything_once(tmp_path: Path) -> None:
    rows = [{"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(400)]
    parts = {
        part: set(load_problems(spec_of(tmp_path, rows, held_out={"fraction": 0.25, "part": part}))["id"])
        for part in ("train", "held_out")
    }
    assert not parts["train"] & parts["held_out"]
    assert parts["train"] | parts["held_out"] == set(load_problems(spec_of(tmp_path, rows))["id"])
    assert 60 < len(parts["held_out"]) < 140


def test_shuffle_is_a_permutation_that_ignores_the_file_order(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}?", "answer": str(n)} for n in range(50)]
    plain = list(load_problems(spec_of(tmp_path, rows))["answer"])
    one = list(load_problems(spec_of(tmp_path, rows, shuffle_seed=1))["answer"])
    assert one != plain and sorted(one) == sorted(plain)
    assert one == list(load_problems(spec_of(tmp_path, rows[::-1], shuffle_seed=1))["answer"])
    assert one != list(load_problems(spec_of(tmp_path, rows, shuffle_seed=2))["answer"])
    assert one[:5] == list(load_problems(spec_of(tmp_path, rows, shuffle_seed=1, limit=5))["answer"])


def test_bad_rows_stop_or_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [ROWS[0], {"question": " ", "answer": "3"}, {"question": "q", "answer": None}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the prompt is missing or empty\. .*on_error: skip"):
        load_problems(spec_of(tmp_path, rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer is missing or empty"):
        load_problems(spec_of(tmp_path, [rows[0], rows[2]]))
    with caplog.at_level(logging.WARNING):
        assert len(load_problems(spec_of(tmp_path, rows, on_error="skip"))) == 1
    assert "skipped 2 of 3 rows" in caplog.text


def test_describe_reads_the_same_columns_without_loading(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": f"so <<1>>\n#### {n}", "x": n} for n in range(150)]
    spec = spec_of(tmp_path, rows)
    assert describe_problems(spec) == (load_problems(spec).column_names, 150)
    assert describe_problems(spec | {"limit": 20})[1] == 20
    assert describe_problems(spec | {"held_out": {"fraction": 0.5, "part": "train"}})[1] is None
    path = Path(spec["path"])
    path.write_text(path.read_text() + "not json\n")  # after the rows that describe looks at
    assert describe_problems(spec)[1] == 151
    with pytest.raises(DataError):
        load_problems(spec)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"answer": "anser"}}, r"columns\.answer: .* no column 'anser'; .*did you mean 'answer'"),
        ({"columns": {"prompt": "zzz"}}, r"columns\.prompt: .*has question, answer, topic, rank\. Name one"),
        ({"columns": {"id": "answer"}}, r"columns\.id: '2' is not unique"),
        ({"columns": {"kind": "topic"}}, r"rows\.jsonl:1: kind is 'sums'\. Use one of integer, math, code"),
        ({"columns": {"answer": "tags"}}, r"rows\.jsonl:1: the answer is a list"),
        ({"columns": {"prompt": "rank"}}, r"rows\.jsonl:1: the prompt is neither text nor a list"),
        ({"columns": {"prompt": "tags"}}, r"rows\.jsonl:1: the prompt is neither text nor a list"),
        ({"columns": {"id": "blank"}}, r"columns\.id: a row has an empty id"),
        ({"kind": "integer", "columns": {"answer": "topic"}}, r"jsonl:1: the answer 'sums' is no integer"),
    ],
)  # fmt: skip
def test_messages_about_rows_and_columns(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    rows = [dict(ROWS[0]), dict(ROWS[0])]
    if {"tags", "blank"} & set(keys["columns"].values()):
        rows = [row | {"tags": ["a"], "blank": ""} for row in rows]
    with pytest.raises(DataError, match=message):
        load_problems(spec_of(tmp_path, rows, **keys))


def test_a_column_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": "1", "ok": 1, "odd": odd} for i, odd in enumerate((1, 10**30))]
    with pytest.raises(DataError, match="^odd: the column cannot be stored"):
        load_problems(spec_of(tmp_path, rows))


def test_hub_passes_its_settings_on_and_explains_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def fake(hub: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((hub, config, split, revision, streaming))
        if hub != "org/maths":
            raise FileNotFoundError("nobody home")
        return datasets.Dataset.from_list([{"problem": "1+2?", "answer": "3"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    spec = {"hub": "org/maths", "config": "main", "split": "test", "revision": "abc"}
    assert load_problems(spec)["source"][0] == "org/maths"
    assert describe_problems(spec)[1] is None
    assert asked == [("org/maths", "main", "test", "abc", False), ("org/maths", "main", "test", "abc", True)]
    with pytest.raises(DataError, match=r"hub: cannot load 'org/moths', .*nobody home.* give its files as `path`"):
        load_problems({"hub": "org/moths"})


def test_generated_problems_load_like_any_other() -> None:
    spec = ProblemSpec.model_validate({"generator": {"families": ["chain"], "count": 30, "seed": 3}})
    problems = load_problems(spec)
    assert len(problems) == 30 and set(problems["source"]) == {"synthetic/chain"}
    assert set(problems["kind"]) == {"integer"} and all(problems["reasoning"])
    assert describe_problems(spec) == (problems.column_names, 30)


def test_a_template_that_shows_tests_needs_them(tmp_path) -> None:
    rows = [
        {"text": "a {tests} b", "test_list": [" assert f(1) == 2", "assert f(2) == 3 "]},
        {"text": "no", "test_list": []},
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = {
        "path": str(path),
        "kind": "code",
        "columns": {"prompt": "text", "tests": "test_list"},
        "template": "code-tests",
    }
    with pytest.raises(DataError, match="tests is no list of statements.*template: code"):
        load_problems(spec)
    (problem,) = load_problems({**spec, "on_error": "skip"})
    text = problem["prompt"][0]["content"]
    assert text.startswith("a {tests} b\n")  # what a statement holds is not replaced
    assert "\nassert f(1) == 2\nassert f(2) == 3\n" in text
