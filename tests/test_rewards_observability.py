"""What a run logs of its rewards, and `rl samples`, which lists completions of its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes import PROBLEMS, grpo, metrics, run
from rl.__main__ import main
from rl.experience import component_means, tally
from rl.recipe_io import validate
from rl.run.folder import Run
from rl.train_log import step_line


def completion(verdict: str | None, **components: float | None) -> Any:
    return SimpleNamespace(verdict=verdict, components=components)


def test_tally_counts_verdicts_values_and_nones() -> None:
    batch = [
        completion("correct", math=1.0, judge=0.5),
        completion("unparsed", math=0.0, judge=None),
        completion(None, math=None, judge=None),
    ]
    sums = tally(batch)
    assert {k: v for k, v in sums.items() if k.startswith("verdict/")} == {
        "verdict/correct": 1, "verdict/wrong": 0, "verdict/unparsed": 1, "verdict/timeout": 0,
    }  # fmt: skip
    assert (sums["none/math"], sums["none/judge"]) == (1, 2)
    assert component_means(sums) == {"reward/math": 0.5, "reward/judge": 0.5}
    assert not any(name.startswith(("reward/", "n/")) for name in sums)
    assert math.isnan(component_means(tally([completion(None, judge=None)]))["reward/judge"])


def test_the_step_line_says_how_answers_were_judged() -> None:
    zero = dict.fromkeys(("reward", "groups/informative", "length/mean", "grad_norm"), 0.0)
    counts = {"verdict/correct": 3.0, "verdict/wrong": 0.0, "verdict/unparsed": 5.0, "verdict/timeout": 0.0}
    assert "answers 3 correct 5 unparsed" in step_line(1, 2, zero | counts)
    assert "answers" not in step_line(1, 2, zero | dict.fromkeys(counts, 0.0))


# -- rl samples ------------------------------------------------------------------------------------


def row(step: int, verdict: str | None, text: str, **other: Any) -> dict[str, Any]:
    return {
        "step": step, "group": 0, "id": f"p{step}", "prompt_text": "PROMPT 70+3", "completion": text, "answer": "73",
        "reward": 0.0, "components": '{"math": 0.0}', "verdict": verdict, "advantage": 0.0, "finish_reason": "stop",
        "tokens": 9, "token_ids": [1], "logprobs": [0.0], "weights_version": 0, **other,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run of three steps, written by what writes them in a run."""
    written = Run(validate(grpo(tmp_path / "run")), rank=0)
    for step in (1, 2, 3):
        written.write_samples(
            f"samples/step_{step:08d}.parquet",
            [
                row(step, "unparsed", f"muttering {step}"),
                row(step, "correct", r"\boxed{73}", reward=1.0),
                row(step, "wrong", r"\boxed{74}", finish_reason="length"),
            ],
        )
    written.write_samples("evaluation/held_out_step_00000003.parquet", [row(3, None, "evaluated", reward=None)])
    return tmp_path / "run"


def listed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main(["samples", *map(str, arguments)]) == 0
    return capsys.readouterr().out.strip().split("\n\n")


def test_unparsed_samples_are_listed_newest_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *samples, count = listed(capsys, folder, "--verdict", "unparsed")
    assert [sample.splitlines()[-1].strip() for sample in samples] == ["muttering 3", "muttering 2", "muttering 1"]
    assert samples[0].startswith("step 3  group 0  unparsed  reward 0  9 tokens  answer '73'  id p3\n")
    assert '{"math": 0.0}' in samples[0] and "PROMPT" not in samples[0]
    assert count == "3 of 3 unparsed samples"


@pytest.mark.parametrize(
    ("arguments", "steps", "count"),
    [
        (["--step", "2"], ["2", "2", "2"], "3 of 3 samples"),
        (["--step", "2:"], ["3", "3", "3", "2", "2", "2"], "6 of 6 samples"),
        (["--step", ":1", "--verdict", "wrong"], ["1"], "1 of 1 wrong samples"),
        (["--step", "2:3", "--limit", "4"], ["3", "3", "3", "2"], "4 of 6 samples"),
        (["--step", "9"], [], "0 of 0 samples"),
        (["--verdict", "timeout"], [], "0 of 0 timeout samples"),
    ],
)
def test_steps_and_limit(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], steps: list[str], count: str
) -> None:
    *samples, last = listed(capsys, folder, *arguments)
    assert [sample.split()[1] for sample in samples] == steps
    assert last == count


def test_full_shows_prompt_and_completion_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "thinking " * 100 + "no answer"
    Run(validate(grpo(folder)), rank=0).write_samples("samples/step_00000004.parquet", [row(4, "unparsed", long)])
    short, _ = listed(capsys, folder, "--step", "4")
    assert short.endswith("no answer") and "… " in short and len(short) < 400
    whole, _ = listed(capsys, folder, "--step", "4", "--full")
    assert f"--- prompt\nPROMPT 70+3\n--- completion\n{long}" in whole


def test_an_evaluation_is_listed_by_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample, count = listed(capsys, folder, "--set", "held_out")
    assert "no verdict  reward none" in sample and count == "1 of 1 samples"
    for file in folder.glob("samples/*"):
        file.unlink()
    assert listed(capsys, folder) == [sample, count]  # the only samples there are


def test_escape_sequences_of_a_completion_do_not_reach_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J 73 \u202e\r"
    Run(validate(grpo(folder)), rank=0).write_samples("samples/step_00000005.parquet", [row(5, "wrong", hostile)])
    for extra in ([], ["--full"]):
        out = "".join(listed(capsys, folder, "--step", "5", *extra))
        assert "\\x1b]0;title\\x07" in out
        assert not any(ord(letter) < 32 and letter != "\n" or letter == "\u202e" for letter in out)


def test_what_is_not_a_run_is_refused_with_status_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = folder.parent / "empty"
    empty.mkdir()
    only_sft = folder.parent / "sft"
    Run(validate(grpo(only_sft)), rank=0)
    for arguments, message in [
        ([empty], "is not the folder of a run: it has no recipe.yaml"),
        ([folder.parent / "rnu"], "did you mean 'run'?"),
        ([folder.parent], f"give one of: {folder}"),
        ([only_sft], "holds no samples (yet)"),
        ([folder, "--set", "held-out"], "did you mean 'held_out'?"),
    ]:
        assert main(["samples", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    for arguments in (["--verdict", "wrnog"], ["--step", "x"], ["--limit", "0"], []):
        with pytest.raises(SystemExit) as caught:
            main(["samples", *([str(folder)] if arguments else []), *arguments])
        assert caught.value.code == 2


def test_it_starts_without_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom rl.__main__ import main\n"
        "status = main(sys.argv[1:])\nprint({'torch', 'transformers', 'datasets'} & set(sys.modules))\nsys.exit(status)"
    )
    result = run("samples", str(folder), "--limit", "1", code=code)
    assert result.returncode == 0 and result.stdout.endswith("1 of 9 samples\nset()\n"), result.stdout + result.stderr


# -- a run -----------------------------------------------------------------------------------------


def test_training_and_evaluation_log_verdicts_components_and_nones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rl.runner import run as run_recipe

    rewards = [{"name": "math"}, {"name": "language", "args": {"target": "en"}}]
    evaluate = {"data": {**PROBLEMS, "limit": 5}, "max_tokens": 6, "samples": 2, "rewards": rewards}
    recipe = grpo(tmp_path / "run", rewards=rewards, grpo__steps=1, evaluate=evaluate)
    summary = run_recipe(validate(recipe))
    line, evaluation = metrics(tmp_path / "run")
    out = capsys.readouterr().out
    samples = {"": 16, "eval/held_out/": 10}
    for (prefix, count), values in zip(samples.items(), (line, evaluation), strict=True):
        verdicts = {v: values[f"{prefix}verdict/{v}"] for v in ("correct", "wrong", "unparsed", "timeout")}
        assert sum(verdicts.values()) == count and values[f"{prefix}none/math"] == 0
        assert values[f"{prefix}reward/math"] == verdicts["correct"] / count
        listing = ["--set", "held_out"] if prefix else []
        for verdict, expected in verdicts.items():
            last = listed(capsys, tmp_path / "run", "--verdict", verdict, *listing)[-1]
            assert last.endswith(f"of {expected:.0f} {verdict} samples")
        assert 0 <= values[f"{prefix}none/language"] <= count
    assert "answers " in out and "unparsed" in out
    assert summary["evaluation"]["eval/held_out/verdict/unparsed"] == evaluation["eval/held_out/verdict/unparsed"]
    json.loads((tmp_path / "run" / "summary.json").read_text())
