"""`pipeline: distill` as a whole: a local teacher, stages that feed a student, imports by recipe, and its errors."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data import load_problems
from data.templates import render_completion
from data.traces import Trace
from recipes import PROBLEMS, REPO, SCRATCH, change, write
from rewards import load_reward
from rl.__main__ import main
from rl.check import check
from rl.distill.pool import pool_row
from rl.distill.verify import columns_of_trace, verify
from rl.recipe_io import RecipeError, load_recipe, validate
from rl.runner import run

SHARED = REPO.parent / "shared" / "data"
needs_traces = pytest.mark.skipif(not (SHARED / "traces").is_dir(), reason="the shared development data is not here")


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def local(folder: Path, **changes: Any) -> dict[str, Any]:
    """A model of random weights as teacher: it solves nothing, so nothing is asked of its traces."""
    made: dict[str, Any] = {
        "pipeline": "distill",
        "output_dir": str(folder),
        "threads": 1,
        "data": change(PROBLEMS, generator__count=6),
        "teacher": {
            "engine": "local", "model": {"scratch": SCRATCH, "dtype": "float32"}, "samples": 3, "max_tokens": 12,
            "max_slots": 8, "temperature": 1.0, "top_p": 1.0,
        },
        "select": {"min_reward": None, "finished": False, "language": None, "per_problem": 2},
    }  # fmt: skip
    return change(made, **changes)


def test_a_local_teacher_and_a_kill_between_two_batches(tmp_path: Path) -> None:
    summary = run(validate(local(tmp_path / "a")))
    traces = rows_of(summary["traces"])
    assert len(traces) == 18 and {t["sample"] for t in traces} == {0, 1, 2}
    assert summary["tokens_by"] == "the teacher's tokenizer"
    assert all(t["prompt_tokens"] >= len(t["prompt"]) for t in traces)  # a token a character
    assert len({t["thinking"] for t in traces}) > 12  # every sample has a stream of its own
    # A journal that holds some of the traces: only the others are drawn, and they are the same.
    journal = tmp_path / "a" / "journal" / "0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    (tmp_path / "b" / "journal").mkdir(parents=True)
    (tmp_path / "b" / "journal" / "0.jsonl").write_text("".join(lines[:7]))
    resumed = run(validate(local(tmp_path / "b")))
    assert (resumed["sampling"]["known"], resumed["sampling"]["received"]) == (7, 11)
    assert sorted((tmp_path / "b" / "journal" / "0.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    for name in ("pool.parquet", "traces.parquet", "report.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = run(validate(local(tmp_path / "c", seed=1)))
    assert rows_of(other["traces"]) != traces


def test_never_resuming_samples_anew(tmp_path: Path) -> None:
    run(validate(local(tmp_path / "a")))
    again = run(validate(local(tmp_path / "a", resume="never")))
    assert again["sampling"]["known"] == 0 and again["sampling"]["received"] == 18
    assert (tmp_path / "a" / "journal.1" / "0.jsonl").exists()  # what was paid for is put aside, never deleted


def test_a_student_learns_from_the_pool_of_an_earlier_stage(tmp_path: Path) -> None:
    stages = {
        "pipeline": "stages",
        "output_dir": str(tmp_path),
        "stages": {
            "teach": table(tmp_path),
            "learn": {
                "pipeline": "sft",
                "model": {"scratch": SCRATCH, "dtype": "float32"},
                "data": {"path": "${teach.pool}", "template": change_template("{reasoning}</think>{response}")},
                "sft": {"steps": 1, "batch_size": 2},
            },
        },
    }
    stages["stages"]["teach"].pop("output_dir")  # OUTPUT_DIR/teach
    recipe = validate(stages)
    assert "nothing is sampled" in check(recipe)
    summary = run(recipe)
    assert Path(summary["stages"]["learn"]["model"]).is_dir()
    pool = summary["stages"]["teach"]["pool"]
    assert Path(pool).parent == tmp_path / "teach"
    problems = load_problems({"path": pool, "template": "r1-trace"})
    learnt = [render_completion(p["reasoning"], p["answer"], "r1-trace", p["response"]) for p in problems]
    assert sorted(learnt) == ["count: 1, 2, 3\n</think>\n\n\\boxed{3}", "one and one\n</think>\n\n\\boxed{2}"]
    broken = change(stages, stages__learn__data={"path": "${teach.pol}"})
    with pytest.raises(RecipeError, match=r"stage 'teach' has no 'pol'; did you mean 'pool'\?"):
        check(validate(broken))
    alone = change(stages["stages"]["learn"], output_dir=str(tmp_path / "alone"))
    alone["data"] = PROBLEMS | {"template": change_template("{response}</think>")}
    with pytest.raises(RecipeError, match="has no `response` to learn from"):
        run(validate(alone))


def change_template(completion: str) -> dict[str, Any]:
    return {"user": "{problem}", "chat": False, "prefill": "<think>", "completion": completion}


# ---- verification and the pool ---------------------------------------------------------------------


def test_verification_reads_the_answer_and_never_the_thinking() -> None:
    traces = [
        Trace("a", "1+1?", "Is it 3? No.", "\\boxed{2}", gold="2"),
        Trace("b", "1+1?", "It is \\boxed{2}.", "\\boxed{3}", gold="2"),
        Trace("c", "1+1?", "It is \\boxed{2}.", "", gold="2"),
        Trace("d", "1+1?", "", "So \\boxed{2}", gold="2"),
        Trace("e", "1+1?", "x", "\\boxed{2}", gold=""),
    ]
    pairs = [(trace, columns_of_trace(trace)) for trace in traces]
    verified = verify(pairs, [load_reward("math")], language="en")
    assert [t.verdict for t in verified] == ["correct", "wrong", "unparsed", "correct", None]
    assert [t.reward for t in verified] == [1.0, 0.0, 0.0, 1.0, None]
    assert [t.thinking_tokens for t in verified] == [6, 8, 8, 0, 1]  # Is it 3 ? No . | It is \ boxed { 2 } .
    assert [t.answer_tokens for t in verified] == [5, 5, 0, 6, 5]
    unverified = verify(pairs, [], language=None)
    assert all(t.reward is None and t.verdict is None and t.language is None for t in unverified)


def test_measures_of_the_reasoning() -> None:
    loop = " ".join(f"word{'abc'[i % 3]}" for i in range(120))
    traces = [Trace("a", "q", loop, "b"), Trace("b", "q", "Let 我们 see 数字", "b"), Trace("c", "q", "x=1", "b")]
    verified = verify([(t, columns_of_trace(t)) for t in traces], [], language="en")
    assert verified[0].repetition == pytest.approx(1 - 3 / 101) and verified[1].repetition == 0
    assert verified[1].language == pytest.approx(2 / 6) and verified[2].language is None


def test_pool_rows() -> None:
    row = pool_row(Trace("p", "1+1?", "a", "It is \\boxed{3}.", sample=4, gold="2", verdict="wrong", reward=0.0))
    assert row["id"] == "p/4" and row["response"] == "It is \\boxed{3}."
    assert (row["answer"], row["solution_answer"]) == ("2", "3")  # what it says, not what would be right
    code = pool_row(Trace("p", "q", "a", "Here:\n```python\nprint(1)\n```", kind="code"))
    assert code["solution_answer"] == "print(1)" == code["answer"]


# ---- importing -------------------------------------------------------------------------------------


def table(folder: Path, **changes: Any) -> dict[str, Any]:
    rows = [
        {"question": "What is 1+1?", "completion": "<think>one and one</think>\\boxed{2}", "gold": "2"},
        {"question": "What is 1+1?", "completion": "<think>a guess, that is all</think>\\boxed{4}", "gold": "2"},
        {"question": "", "completion": "x", "gold": "2"},
        {"question": "What is 1+2?", "completion": "<think>count: 1, 2, 3</think>\\boxed{3}", "gold": "3"},
    ]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {
        "pipeline": "distill",
        "output_dir": str(folder / "run"),
        "traces": {"path": str(folder / "traces.jsonl"), "teacher": "r1"},
        "rewards": [{"name": "integer"}],
    }
    return change(made, **changes)


def test_import_verifies_selects_and_is_byte_identical(tmp_path: Path) -> None:
    summary = run(validate(table(tmp_path)))
    assert summary["verdicts"] == {"correct": 2, "wrong": 1} and summary["kept"] == 2
    assert summary["import"]["bad"] == 1 and "row 3" not in summary["import"]["errors"][0]
    assert "traces.jsonl:3: the prompt is missing" in summary["import"]["errors"][0]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| correct | 3 | 2 | not correct: wrong (1) |" in text and "a guess, that is all" in text
    first = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    run(validate(table(tmp_path, resume="never")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == first


def test_import_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(**changes: Any) -> str:
        assert main([str(write(tmp_path / "r.yaml", table(tmp_path, **changes)))]) == 2
        return capsys.readouterr().err

    assert "traces.jsonl:3: the prompt is missing" in refused(on_error="stop")
    assert "there is no file" in refused(traces__path=str(tmp_path / "trace.jsonl"))
    assert "(given: 'openr2'); did you mean 'openr1'" in refused(traces__adapter="openr2")
    assert "none of the first rows is of the shape 'openthoughts'" in refused(traces__adapter="openthoughts")
    assert "select.language: unknown language code 'xx'" in refused(select__language="xx")
    assert "give exactly one of teacher" in refused(traces=None)
    assert "select.min_reward: nothing is verified without rewards" in refused(rewards=[])
    assert "needs a column" in refused(rewards=[{"name": "code"}])
    assert "select: none of 3 traces is left; most went at length" in refused(select__max_tokens=1)
    assert (tmp_path / "run" / "report.md").exists() and not (tmp_path / "run" / "summary.json").exists()


@needs_traces
def test_shared_odyssey_solutions_by_the_shipped_recipe(tmp_path: Path) -> None:
    files = {
        "traces.path": SHARED / "traces" / "odyssey-solutions" / "deepseek-v3-Instruct-solution.jsonl",
        "data.path": SHARED / "math" / "odyssey-math" / "final-odyssey-math-with-levels.jsonl",
    }
    # Integers alone: these need no symbolic comparison, and their verdicts can be checked here by hand.
    overrides = [f"{name}={path}" for name, path in files.items()]
    recipe = load_recipe(
        str(REPO / "recipes" / "distill-import-odyssey.yaml"),
        [*overrides, f"output_dir={tmp_path}", "rewards=[{name: integer}]"],
    )
    summary = run(recipe)
    assert summary["samples"] == 387 and summary["import"]["bad"] == 0
    traces = rows_of(summary["traces"])
    for trace in traces:
        said = trace["answer"].rpartition('"answer":')[2].strip(' "\n}`')
        if trace["gold"].isdigit() and said.isdigit():
            assert (trace["verdict"] == "correct") == (int(said) == int(trace["gold"])), trace["id"]
    assert summary["verdicts"]["correct"] == summary["kept"] >= 50
    assert sum(t["finish_reason"] == "length" for t in traces) == 17


@needs_traces
def test_shared_reasoning_gym_and_distill_samples(tmp_path: Path) -> None:
    gym = load_recipe(
        str(REPO / "recipes" / "distill-import-reasoning-gym.yaml"),
        [
            f"traces.path={SHARED}/traces/reasoning-gym-rl-qwen3b/algorithmic_to_geometry.json",
            f"output_dir={tmp_path / 'gym'}", "rewards=[{name: integer}]",
        ],
    )  # fmt: skip
    summary = run(gym)
    assert summary["samples"] == 600 and summary["problems"] == 200 and summary["verdicts"]["correct"] > 50
    samples = table(tmp_path, traces__path=f"{SHARED}/traces/distill-samples/*.json")
    summary = run(validate(samples))
    assert summary["samples"] == 10 and summary["verdicts"] == {"correct": 10}


@pytest.mark.parametrize(
    "name", ["distill-import-odyssey", "distill-import-reasoning-gym", "distill-deepseek-api", "distill-vllm-qwen"]
)
def test_shipped_recipes_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(f"{REPO}/recipes/{name}.yaml")
    assert recipe.pipeline == "distill"
    if recipe.teacher is not None:
        assert recipe.teacher.temperature == 0.6 and recipe.teacher.top_p == 0.95
        monkeypatch.setenv("DEEPSEEK_API_KEY", "key")
        assert "# sampling" in check(recipe)
