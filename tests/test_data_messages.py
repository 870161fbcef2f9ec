"""Every message about a spec or a file says where, why and what to do."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data import DataError, load_problems


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "problems: give exactly one of path, hub and generator .given: none"),
        ({"path": "a.jsonl", "hub": "x/y"}, "given: path and hub"),
        ({"path": "a.jsonl", "revision": "main"}, "revision: only a hub data set"),
        ({"path": "a.jsonl", "kind": "math", "columns": {"kind": "k"}}, "kind: given both"),
        ({"path": "a.jsonl", "shufle_seed": 1}, "shufle_seed: .* did you mean 'shuffle_seed'"),
        ({"path": "a.jsonl", "limit": "3"}, "limit: Input should be a valid integer"),
        ({"path": "a.jsonl", "limit": 0}, "limit: .*greater than or equal to 1"),
        (
            {"path": "a.jsonl", "template": "r1-zro"},
            "^template: there is no 'r1-zro'.*did you mean 'r1-zero'",
        ),
        ({"path": "a.jsonl", "template": {"usr": "{problem}"}}, r"template\..*usr: .*did you mean 'user'"),
        (
            {"path": "a.jsonl", "held_out": {"fraction": 1.5, "part": "train"}},
            "held_out.fraction: .*less than 1",
        ),
        ({"generator": {"families": ["chian"]}}, "generator.families: .*did you mean 'chain'"),
        ({"generator": {"levels": [6]}}, r"generator\.levels\.0: .*less than or equal to 5"),
    ],
)
def test_messages_about_the_spec(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_problems(spec)


def test_messages_about_files(tmp_path: Path) -> None:
    def message(path: Path | list[str]) -> str:
        with pytest.raises(DataError) as caught:
            load_problems({"path": path if isinstance(path, list) else str(path)})
        return str(caught.value)

    (tmp_path / "train.jsonl").write_text('{"problem": "p", "answer": "1"}\n\n[1]\n')
    assert "did you mean 'train.jsonl'?" in message(tmp_path / "trian.jsonl")
    assert "there is no folder" in message(tmp_path / "nowhere" / "train.jsonl")
    assert "is a folder" in message(tmp_path)
    assert "no file matches" in message(tmp_path / "*.csv")
    assert "an empty list" in message([])
    assert "train.jsonl:3: a row must be a JSON object, not list" in message(tmp_path / "train.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem": \n')
    assert "broken.jsonl:2: not a JSON object" in message(tmp_path / "broken.jsonl")
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert "name it .jsonl" in message(tmp_path / "lines.json")
    (tmp_path / "number.json").write_text("3")
    assert "not a list of objects" in message(tmp_path / "number.json")
    (tmp_path / "notes.txt").write_text("x")
    assert "no known extension" in message(tmp_path / "notes.txt")
    (tmp_path / "fake.parquet").write_text("x")
    assert "not a Parquet file" in message(tmp_path / "fake.parquet")
    (tmp_path / "ragged.csv").write_text("problem,answer\np,1\nq,2,3\n")
    assert "ragged.csv row 2: not 2 cells like the header" in message(tmp_path / "ragged.csv")
    (tmp_path / "short.csv").write_text("problem,answer\nq\n")
    assert "short.csv row 1: not 2 cells like the header" in message(tmp_path / "short.csv")
    (tmp_path / "latin.csv").write_bytes(b"problem,answer\n\xe9t\xe9,2\n")
    assert "not CSV in UTF-8" in message(tmp_path / "latin.csv")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "problems: the source has no rows" in message(tmp_path / "empty.jsonl")
    (tmp_path / "no_answer.jsonl").write_text('{"problem": "p", "solution": "1"}\n')
    assert "no column is named answer, final_answer" in message(tmp_path / "no_answer.jsonl")
    (tmp_path / "blank.jsonl").write_text('{"problem": "p", "answer": ""}\n')
    with pytest.raises(DataError, match="none of the 1 rows is left"):
        load_problems({"path": str(tmp_path / "blank.jsonl"), "on_error": "skip"})


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(DataError("path", "gone", "Look.")))
    assert str(error) == "path: gone. Look." and (error.field, error.reason, error.fix) == (
        "path",
        "gone",
        "Look.",
    )


def test_importing_data_is_light() -> None:
    code = "import sys, data; print(sorted({'datasets', 'transformers', 'torch', 'pyarrow'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
