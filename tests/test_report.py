"""`rl report`: what is read from a run's folder, what is shown of it, and that nothing in it can break out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import HOSTILE, grpo_run, pipeline, sample, sft_run, write_run, write_samples

from recipes import PROBLEMS, grpo, sft
from recipes import run as run_command
from rl.__main__ import main
from rl.recipe_io import validate
from rl.report.completions import LONGEST_COMPLETION, choose, pick, shares, shortened
from rl.report.figures import Figure, figures, steps_per_point
from rl.report.overview import facts, overview, state
from rl.report.page import data_block
from rl.report.read import RunData, read_report, read_run
from rl.report.series import POINTS, bins, thinned, with_speeds


def by_title(run: RunData) -> dict[str, Figure]:
    return {figure.title: figure for figure in figures(run)}


def curves(figure: Figure) -> dict[str, list[float | None]]:
    return {series.name: series.y for series in figure.series}


# -- reading ---------------------------------------------------------------------------------------


def test_a_run_is_read_whatever_its_state(tmp_path: Path) -> None:
    folder = grpo_run(tmp_path / "run", steps=5, complete=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rewa')  # killed while it wrote
    run = read_run(folder, "run")
    assert [line["step"] for line in run.training] == [1, 2, 3, 4, 5]
    assert [(point.step, point.metrics["avg"]) for point in run.evaluations["held_out"]] == [(0, 0.2)]
    assert state(run) == "unfinished, step 5 of 40" and not run.complete
    assert state(read_run(tmp_path / "none", "none")) == "not begun"
    (folder / "metrics.jsonl").unlink()
    assert state(read_run(folder, "run")) == "unfinished, step 0 of 40"
    distilled = {"pipeline": "gkd", "gkd": {"steps": 7, "prompts_per_step": 4, "samples_per_prompt": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(distilled))
    assert state(read_run(folder, "run")) == "unfinished, step 0 of 7"
    assert ("batch", "4 prompts × 2 samples a step") in facts(read_run(folder, "run"))


def test_an_evaluation_without_metrics_is_read_from_its_summary(tmp_path: Path) -> None:
    results = {"eval/gsm8k/avg": 0.5, "eval/gsm8k/samples": 1.0, "eval/gsm8k/verdict/correct": 3.0}
    folder = write_run(tmp_path / "e", {"pipeline": "eval"}, [], {"pipeline": "eval", "evaluation": results})
    run = read_run(folder, "e")
    assert run.evaluations["gsm8k"][0].metrics == {"avg": 0.5, "samples": 1.0, "verdict/correct": 3.0}
    assert figures(run) == []  # one point is no curve; the table has it
    assert overview([run], named=False).bodies[0][0][-1] == "50.0%"


def test_the_stages_stand_in_the_order_of_the_recipe_with_those_to_come(tmp_path: Path) -> None:
    report = read_report(pipeline(tmp_path / "all"))
    assert [run.name for run in report.runs] == ["cold start", "grpo", "zz-pool", "student"]
    table = overview(report.runs, named=True)
    cells = [dict(zip(table.columns, row, strict=True)) for rows in table.bodies for row in rows]
    assert [(row["stage"], row["problems"], row["state"]) for row in cells] == [
        ("cold start", "held_out", "complete"),
        ("grpo", "held_out", "unfinished, step 40 of 40"),
        ("grpo", "aime", "unfinished, step 40 of 40"),
        ("zz-pool", "", "complete"),
        ("student", "", "not begun"),
    ]
    assert cells[1]["avg@k ± s.e."] == "70.0% ± 2.0%" and cells[1]["at the start"] == "20.0% ± 2.0%"
    assert (cells[1]["pass@k"], cells[1]["maj@k"], cells[1]["k"]) == ("80.0% ± 3.0%", "75.0% ± 4.0%", "4")
    assert (cells[0]["updates"], cells[0]["time"], cells[1]["time"]) == ("1,200", "5 min", "2 min")
    # A kind of stage that the report does not know: its outcome and its documents are shown.
    assert ("kept", "1,234") in facts(report.runs[2]) and list(report.runs[2].documents) == ["report.md"]
    (tmp_path / "all" / "stages.yaml").unlink()  # then in the order in which they were begun
    assert [run.name for run in read_report(tmp_path / "all").runs] == ["cold start", "grpo", "zz-pool"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: (run / "recipe.yaml").write_text("a: [b"), "recipe.yaml is not YAML"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json is not JSON"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n'), "metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "not a mapping with a number `step`"),
        (lambda run: (run / "samples" / "step_00000001.parquet").write_text("no"), "not a file of samples"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    spoil: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = grpo_run(tmp_path / "run", steps=2)
    spoil(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (folder / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "has a recipe.yaml or summary.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "emptyy")]) == 2
    assert "no folder" in (error := capsys.readouterr().err) and "did you mean 'empty'" in error
    folder = sft_run(tmp_path / "run", 3)
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path / "none" / "r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(folder), "--samples", "-1"])


# -- figures ---------------------------------------------------------------------------------------


def test_figures_hold_the_metrics(tmp_path: Path) -> None:
    run = read_run(grpo_run(tmp_path / "run", steps=20), "run")
    found = by_title(run)
    reward = found["Reward"]
    assert reward.x == list(range(1, 21)) and list(curves(reward)) == ["total", "format", "math"]
    assert curves(reward)["format"][:3] == [0.1, 0.2, 0.3]
    assert list(curves(found["Verdicts"])) == ["correct", "wrong", "unparsed", "timeout"]
    assert found["Verdicts"].kind == "stack"
    accuracy = found["Accuracy, held_out"]
    assert accuracy.x == [0, 10, 20] and curves(accuracy)["avg@4"] == [0.2, 0.325, 0.45]
    assert accuracy.series[1].name == "pass@4" and accuracy.series[1].error == [0.03] * 3
    # A reward that always applies and groups that are never resampled are not worth a figure; null is not zero.
    assert list(curves(found["Rewards that did not apply"])) == ["format"]
    assert not {"Groups resampled", "Tokens off by over 10 %", "Loss"} & found.keys()
    shares = found["Load of every expert"]
    assert [series.name for series in shares.series] == ["layer 1", "layer 2", "layer 3"] and len(shares.x) == 8
    assert sum(value or 0 for value in shares.series[0].y) == pytest.approx(
        8 * sum(run.training[-1]["moe/share/1"]), rel=1e-3
    )
    assert found["Largest over mean load"].kind == "lines"
    # What no plan knows is shown all the same.
    assert found["something/new"].group == "Other"
    assert list(curves(found["Time of a step"])) == ["rollout", "reward", "train", "sync", "other"]


def test_many_layers_are_a_heat_map(tmp_path: Path) -> None:
    figure = by_title(read_run(grpo_run(tmp_path / "run", steps=3, layers=12), "run"))["Entropy of the router"]
    assert figure.kind == "heat"
    assert [series.name for series in figure.series] == [f"layer {n}" for n in range(1, 13)]


def test_the_total_of_a_single_reward_is_drawn_once(tmp_path: Path) -> None:
    lines = [{"step": n, "reward": n / 4, "reward/math": n / 4} for n in (1, 2)]
    run = read_run(write_run(tmp_path / "run", {"pipeline": "grpo"}, lines, None), "run")
    assert curves(by_title(run)["Reward"]) == {"total": [0.25, 0.5]}


def test_speeds_and_phases_of_a_step() -> None:
    line = {
        "completions": 64.0, "length/mean": 50.0, "tokens_trained": 1000.0, "time/rollout": 4.0, "time/reward": 1.0,
        "time/train": 2.0, "time/step": 7.0,
    }  # fmt: skip
    found = with_speeds(line)
    assert found["speed/sampled"] == 800.0 and found["speed/trained"] == 500.0
    phases = {name: value for name, value in found.items() if name.startswith("phase/")}
    assert phases == {"phase/rollout": 3.0, "phase/reward": 1.0, "phase/train": 2.0, "phase/other": 1.0}
    # A rollout beside the training is no phase of the step; waiting for it is.
    ahead = with_speeds({"completions": 64.0, "length/mean": 50.0, "tokens_trained": 1000.0, "time/rollout": 4.0,
                         "time/reward": 1.0, "time/wait": 2.5, "time/train": 2.0, "time/step": 5.0})  # fmt: skip
    assert {name: value for name, value in ahead.items() if name.startswith(("phase/", "beside/", "speed/"))} == {
        "phase/wait": 2.5, "phase/train": 2.0, "phase/other": 0.5, "beside/rollout": 4.0,
        "speed/sampled": 800.0, "speed/trained": 500.0,
    }  # fmt: skip
    assert with_speeds({"tokens_trained": 100.0, "time/step": 2.0})["speed/trained"] == 50.0
    assert not [name for name in with_speeds({"time/step": 2.0}) if name.startswith(("speed", "phase"))]


def test_long_runs_are_averaged_over_neighbours(tmp_path: Path) -> None:
    places = bins(1001)
    assert len(places) <= POINTS and [i for place in places for i in place] == list(range(1001))
    assert thinned([1.0, 2.0, None, 4.0, None, None], bins(6, 3)) == [1.5, 4.0, None]
    assert thinned([1.0, 2.0, None, 4.0], bins(4, 2), peak=True) == [2.0, 4.0]
    run = read_run(sft_run(tmp_path / "run", 1200), "run")
    loss = by_title(run)["Loss"]
    assert steps_per_point(run) == 3 and len(loss.x) == 400 and loss.x[-1] == 1200
    assert loss.series[0].y[0] == pytest.approx((3 + 1.5 + 1) / 3, rel=1e-5)


# -- completions -----------------------------------------------------------------------------------


def test_shares_use_the_whole_budget_fairly() -> None:
    assert shares([100, 100, 100], 10) == [4, 3, 3]
    assert shares([2, 100, 0, 100], 10) == [2, 4, 0, 4]
    assert shares([3, 4], 100) == [3, 4] and shares([], 5) == [] and shares([5], 0) == [0]


def test_every_verdict_is_among_the_chosen_and_steps_are_spread() -> None:
    verdicts: list[list[str | None]] = [["wrong"] * 50 for _ in range(40)]
    verdicts[7][3], verdicts[31][9] = "timeout", None
    chosen = pick(verdicts, 20)
    assert len(chosen) == len(set(chosen)) == 20 and chosen == sorted(chosen)
    assert (7, 3) in chosen and (31, 9) in chosen
    files = [file for file, _ in chosen]
    assert max(files) == 39 and min(files) <= 2 and len(set(files)) >= 18
    assert len(pick(verdicts, 10**6)) == 2000


def test_the_number_and_length_of_completions_are_bounded(tmp_path: Path) -> None:
    folder = grpo_run(tmp_path / "run", steps=30)
    write_samples(folder / "samples" / "step_00000031.parquet", [sample(31, 0, completion="x" * 10**6)])
    (folder / "evaluation" / ".partial-held_out_step_00000031.parquet").write_text("half a file")
    runs = read_report(folder).runs
    training, held_out = choose(runs, 40)
    assert (training.name, held_out.name) == ("training", "held_out")
    assert training.total == 30 * 16 + len(HOSTILE) + 1 and held_out.total == 30
    assert len(training.rows) == len(held_out.rows) == 20
    assert {row["verdict"] for row in training.rows} == {"correct", "wrong", "unparsed", "timeout"}
    assert choose(runs, 40) == [training, held_out]
    assert all(not source.rows for source in choose(runs, 0))
    longest = max((row for source in choose(runs, 10**6) for row in source.rows), key=lambda r: len(r["completion"]))
    assert (
        len(longest["completion"]) < LONGEST_COMPLETION + 100 and "988,000 characters left out" in longest["completion"]
    )
    assert shortened("abcdefghij", 4) == "ab\n[… 6 characters left out …]\nij"


# -- the page --------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.raw[-1] += data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = pipeline(tmp_path_factory.mktemp("runs") / '<i>all & "more"</i>')
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_what_a_run_holds_is_text_never_markup(text: str) -> None:
    found = Elements(text)
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 2 and not {"img", "iframe", "svg", "i", "b"} & set(names)
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "style"]
    assert "&lt;i&gt;all &amp; &quot;more&quot;&lt;/i&gt;" in text and "models/&lt;b&gt;tiny&lt;/b&gt;" in text
    data = json.loads(found.raw[1])
    hostile = {row["id"]: row for source in data["sources"] for row in source["rows"] if row["id"] in HOSTILE}
    assert hostile and all(row["completion"] == row["prompt"] == name for name, row in hostile.items())


def test_the_page_may_run_its_own_script_only_and_fetch_nothing(text: str) -> None:
    found = Elements(text)
    policy = next(
        a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    for kind in ("style", "script"):
        body = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert len(body) == 1
        digest = base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    links = [a.get(name) for _, a in found.tags for name in ("href", "src") if name in a]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text)


@pytest.mark.parametrize("hostile", [*HOSTILE, "\u2028\u2029<!-- & -->", "\ud800"])
def test_a_data_block_cannot_end_its_element(hostile: str) -> None:
    block = data_block({hostile: [hostile]})
    assert block.isascii() and not set("<>&") & set(block)
    assert json.loads(block) == {hostile: [hostile]}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = grpo_run(tmp_path / "run", steps=4)
    for name in ("a.html", "b.html"):
        assert main(["report", str(folder), "--out", str(tmp_path / name), "--samples", "9"]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    folder = sft_run(tmp_path / "run", 3)
    code = "import sys; from rl.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    result = run_command("report", str(folder), code=code)
    assert result.stdout.splitlines() == [str(folder / "report.html"), "False"], result.stderr


# -- real runs -------------------------------------------------------------------------------------


def test_a_pipeline_that_really_ran(tmp_path: Path) -> None:
    """What the pipelines write is what the report reads: two stages, trained here."""
    from rl.runner import run as run_recipe

    def without_folder(recipe: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in recipe.items() if name != "output_dir"}

    evaluate = {"data": {**PROBLEMS, "limit": 4}, "max_tokens": 6, "samples": 2, "every": 1, "at_start": True}
    second = grpo(tmp_path, grpo__steps=2, model={"path": "${cold.model}", "dtype": "float32"}, evaluate=evaluate)
    stages = {"cold": without_folder(sft(tmp_path, sft__steps=2)), "rl": without_folder(second)}
    run_recipe(validate({"pipeline": "stages", "output_dir": str(tmp_path / "run"), "stages": stages}))
    report = read_report(tmp_path / "run")
    cold, rl = report.runs
    assert (cold.name, cold.pipeline, rl.name, rl.pipeline) == ("cold", "sft", "rl", "grpo") and rl.complete
    assert report.recipe_text.startswith("pipeline: stages") and rl.versions["torch"]
    assert [point.step for point in rl.evaluations["held_out"]] == [0, 1, 2]
    titles = by_title(rl).keys()
    assert {"Accuracy", "Reward", "Entropy", "Length", "Gradient norm", "Tokens per second", "Time of a step"} <= titles
    assert {figure.group for run in report.runs for figure in figures(run)}.isdisjoint({"Other"})
    training, held_out = choose(report.runs, 1000)
    assert (training.run, training.total, held_out.total) == ("rl", 32, 24)
    assert main(["report", str(tmp_path / "run")]) == 0
