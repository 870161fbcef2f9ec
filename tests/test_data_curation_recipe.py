"""`pipeline: data` as a whole: the files it writes, the same bytes each time, kills, difficulty, stages, messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data import load_problems
from recipes import REPO, SCRATCH, run, write
from rl.check import check, preflight
from rl.recipe_io import RecipeError, validate
from rl.runner import run as run_recipe

OPTIONS = "\n$\\textbf{(A)}\\ 7 \\qquad \\textbf{(B)}\\ 8 \\qquad \\textbf{(C)}\\ 9$"
ROWS: list[dict[str, Any]] = [
    {"question": "What is the least prime above 6?" + OPTIONS, "answer": "A", "year": 2001},
    {
        "question": "What is the number of edges of a cube with $8$ vertices?",
        "answer": "12\\\\\n\\noindent",
        "year": 2002,
    },
    {"question": "What is the NUMBER of edges of a cube with \\(8\\) vertices", "answer": "12.0", "year": 2003},
    {"question": "Find the length of the diagonal of a square of side 1.", "answer": "\\sqrt{2}", "year": 2004},
    {"question": "Which of these is prime? Which of the following is even?" + OPTIONS, "answer": "B", "year": 2005},
    {"question": "", "answer": "5", "year": 2006},
    {"question": "How many minutes are there in a leap year of $366$ days?", "answer": "527,040", "year": 2007},
    {
        "question": "A task: compute the sum of the first \\(100\\) odd numbers, and half of it. Think!",
        "answer": "15000",
    },
]
EXAM = "Compute the sum of the first $100$ odd numbers and half of it."
OUTPUTS = ("problems.parquet", "card.md", "dropped.jsonl")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "exam.jsonl").write_text(json.dumps({"question": EXAM, "answer": "0"}) + "\n")
    return folder


def recipe(folder: Path, files: Path, **changes: Any) -> dict[str, Any]:
    raw = {"name": "raw", "path": str(files / "rows.jsonl"), "keep": ["year"], "licence": "MIT"}
    exam = {"name": "exam", "path": str(files / "exam.jsonl")}
    base = {"pipeline": "data", "output_dir": str(folder), "sources": [raw], "decontaminate": {"sets": [exam]}}
    return {**base, **changes}


def measured(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that samples: generated sums, and a random model that is scored by the share of digits it writes."""
    source = {"name": "sums", "generator": {"families": ["addition"], "levels": [1], "count": 24, "seed": 3}}
    difficulty = {
        "model": {"scratch": SCRATCH, "dtype": "float32"},
        "rewards": [{"path": f"{REPO / 'tests' / 'toy_rewards.py'}:digit_share"}],
        "template": "short-think",
        "samples": 4,
        "max_tokens": 12,
        "band": [0.02, 0.9],
        "chunk": 4,
    }
    return {
        "pipeline": "data",
        "output_dir": str(folder),
        "sources": [source],
        "difficulty": {**difficulty, **changes},
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "problems.parquet").to_pylist()


def dropped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_a_clean_set_with_its_card(tmp_path: Path, sources: Path) -> None:
    summary = run_recipe(validate(recipe(tmp_path / "out", sources, title="Three problems")))
    found = rows(tmp_path / "out")
    assert [(row["problem"], row["answer"], row["kind"], row["year"]) for row in found] == [
        ("What is the least prime above 6?", "7", "integer", "2001"),
        (ROWS[1]["question"], "12", "integer", "2002"),
        (ROWS[6]["question"], "527040", "integer", "2007"),
    ]
    assert [(row["filter"], row["place"].rpartition(":")[2]) for row in dropped(tmp_path / "out")] == [
        ("rows", "6"), ("choices", "5"), ("integers", "4"), ("evaluation sets", "8"), ("duplicates", "3"),
    ]  # fmt: skip
    assert summary["kept"] == 3 and summary["read"] == 8
    assert [(count["read"], count["kept"]) for count in summary["counts"]] == [
        (8, 7), (7, 7), (7, 6), (6, 5), (5, 5), (5, 4), (4, 3),
    ]  # fmt: skip
    card = (tmp_path / "out" / "card.md").read_text()
    for text in (
        "# Three problems", "3 problems of 8 rows", summary["content"], "| raw | local file | MIT | 8 | 3 |",
        "| exam | 1 | 1 |", "the question makes no sense without its options", "in the evaluation set exam (1)",
        "rows.jsonl:8",
    ):  # fmt: skip
        assert text in card
    assert str(tmp_path) not in card  # nothing of this machine
    problems = load_problems({"path": summary["problems"]})
    assert list(problems["answer"]) == ["7", "12", "527040"] and set(problems["kind"]) == {"integer"}


def test_the_same_bytes_again_elsewhere(tmp_path: Path, sources: Path) -> None:
    elsewhere = shutil.copytree(sources, tmp_path / "moved")
    run_recipe(validate(recipe(tmp_path / "one", sources)))
    run_recipe(validate(recipe(tmp_path / "two", elsewhere)))
    for name in OUTPUTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_finished_set_is_made_again_only_when_something_changed(tmp_path: Path, sources: Path) -> None:
    out = tmp_path / "out"
    first = run_recipe(validate(recipe(out, sources)))
    stamp = (out / "problems.parquet").stat().st_mtime_ns
    assert run_recipe(validate(recipe(out, sources))) == first
    assert (out / "problems.parquet").stat().st_mtime_ns == stamp
    with (sources / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What is 2 + 2?", "answer": "4", "year": 2009}) + "\n")
    assert run_recipe(validate(recipe(out, sources)))["kept"] == 4
    assert run_recipe(validate(recipe(out, sources, filters={"integer_only": False})))["kept"] == 5
    assert [row["kind"] for row in rows(out)].count("math") == 1


def test_difficulty_band(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(validate(measured(out)))
    kept = rows(out)
    assert kept and all(0.02 <= row["pass_rate"] <= 0.9 for row in kept)
    left_out = [row for row in dropped(out) if row["filter"] == "difficulty"]
    assert len(kept) + len(left_out) == 24 and all("pass rate" in row["reason"] for row in left_out)
    # Another band asks the same questions: nothing is sampled again.
    results = (out / "difficulty.jsonl").read_bytes()
    assert len(results.splitlines()) == 6
    run_recipe(validate(measured(out, band=[0.0, 1.0])))
    assert len(rows(out)) == 24 and (out / "difficulty.jsonl").read_bytes() == results
    # A problem's samples do not depend on its neighbours.
    alone = measured(tmp_path / "alone", band=[0.0, 1.0], chunk=24, max_slots=3)
    run_recipe(validate(alone))
    assert rows(tmp_path / "alone") == rows(out)


def test_killed_and_started_again(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_recipe(validate(measured(whole)))
    path = write(tmp_path / "recipe.yaml", measured(killed))
    results = killed / "difficulty.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    # Slowed down, so that the signal falls between two chunks or into one.
    slow = (
        "import sys, time, rl.difficulty as d\n"
        "append = d.Difficulty._append\n"
        "d.Difficulty._append = lambda self, found: (append(self, found), time.sleep(0.3))\n"
        "from rl.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(path)], cwd=REPO, env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not (results.exists() and results.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read_bytes()
    assert 2 <= before.count(b"\n") < 6 and not (killed / "summary.json").exists()
    with results.open("ab") as file:
        file.write(b'{"half a line')
    run_recipe(validate(measured(killed)))
    after = results.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 6  # nothing was sampled twice
    for name in OUTPUTS:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_bad_rows_stop_the_run_if_asked_to(tmp_path: Path, sources: Path) -> None:
    with pytest.raises(RecipeError, match=r"sources\.0: .*rows\.jsonl:6: the prompt is missing or empty"):
        run_recipe(validate(recipe(tmp_path / "out", sources, on_error="stop")))


def test_nothing_left_is_an_error(tmp_path: Path, sources: Path) -> None:
    (sources / "rows.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    with pytest.raises(RecipeError, match=r"no problem is left of 1 \(dropped: integers 1\)"):
        run_recipe(validate(recipe(tmp_path / "out", sources)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{"name": "a", "path": "no.jsonl"}]}, "sources.0: path: there is no file no.jsonl"),
        ({"sources": [{"name": "a", "hub": "x/y"}, {"name": "a", "hub": "x/z"}]}, "two are named 'a'"),
        ({"decontaminate": {"sets": [{"name": "e", "path": "no.jsonl"}]}}, "decontaminate.sets.0: path"),
        ({"filters": {"choises": True}}, "did you mean 'choices'"),
        ({"difficulty": {"model": {"path": "./nowhere"}}}, "difficulty.model.path: folder ./nowhere does not exist"),
        ({"difficulty": {"model": {"scratch": {}}, "band": [0.9, 0.1]}}, "the lowest pass rate comes first"),
        ({"difficulty": {"model": {"scratch": {}}, "rewards": [{"name": "code"}]}}, "tests"),
    ],
)
def test_check_names_the_field(changes: dict[str, Any], message: str, tmp_path: Path, sources: Path) -> None:
    with pytest.raises(RecipeError) as error:
        preflight(validate(recipe(tmp_path / "out", sources, **changes)))
    assert message in str(error.value)


def test_check_shows_the_sources(tmp_path: Path, sources: Path) -> None:
    text = check(validate(recipe(tmp_path / "out", sources)))
    assert "8 rows, adapter columns" in text and "evaluation set" in text and not (tmp_path / "out").exists()


def test_a_later_stage_trains_on_the_problems(tmp_path: Path) -> None:
    curate = {"pipeline": "data", "sources": measured(tmp_path)["sources"]}
    data = {"path": "${curate.problems}", "template": "short-think"}
    evaluate = {"pipeline": "eval", "model": {"scratch": SCRATCH, "dtype": "float32"},
                "evaluate": {"data": data, "max_tokens": 4}}  # fmt: skip
    stages = {"pipeline": "stages", "output_dir": str(tmp_path / "run"), "stages": {"curate": curate, "eval": evaluate}}
    result = run(str(write(tmp_path / "stages.yaml", stages)))
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "eval" / "summary.json").read_text())
    assert summary["evaluation"]["eval/held_out/problems"] == 24


@pytest.mark.parametrize("name", ["data-math.yaml", "data-code.yaml"])
def test_shipped_recipe(name: str) -> None:
    from rl.recipe_io import load_recipe

    assert preflight(load_recipe(name))  # warnings about the hub only
