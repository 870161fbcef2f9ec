"""The contract test finds each kind of broken reward, and passes those that are right."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rewards import RewardError, available_rewards, load_reward
from rewards.contract import assert_reward_contract, check_reward, main

ROOT = Path(__file__).parents[1]
REQUIRED = {"soft_overlong": {"max_length": 100, "buffer": 10}, "cosine_length": {"max_length": 100}}


@pytest.mark.parametrize("name", [name for name in available_rewards() if name not in ("judge", "code")])
def test_the_built_in_rewards_keep_the_contract(name: str) -> None:
    assert check_reward({"name": name, "args": REQUIRED.get(name, {})}) == []


async def polite(completions, **columns):  # type: ignore[no-untyped-def]
    return [None if not text else 1.0 for text in completions]


def plain(completions, answer):  # type: ignore[no-untyped-def]
    return [float(len(gold)) for gold in answer]


def test_functions_of_every_kind_keep_the_contract() -> None:
    assert check_reward(polite) == []
    assert check_reward(plain) == []
    assert check_reward(lambda completion_ids: [len(ids) for ids in completion_ids]) == []
    assert check_reward(load_reward({"name": "format", "args": {"style": "think"}})) == []
    assert_reward_contract(plain, columns={"answer": ["a", "bb"]}, prompts=["p", "q"])


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def too_few(completions):  # type: ignore[no-untyped-def]
    return [1.0] * (len(completions) - 1)


def not_a_number(completions):  # type: ignore[no-untyped-def]
    return [float("nan")] * len(completions)


def fails_on_empty_text(completions):  # type: ignore[no-untyped-def]
    return [1.0 if text_of(c)[0] == "<" else 0.0 for c in completions]


def reads_ascii_only(completions):  # type: ignore[no-untyped-def]
    return [float(len(text_of(c).encode("ascii"))) for c in completions]


def fails_on_long_text(completions):  # type: ignore[no-untyped-def]
    assert max([len(text_of(c)) for c in completions], default=0) < 100_000, "too long"
    return [0.0] * len(completions)


def fails_on_an_empty_batch(completions):  # type: ignore[no-untyped-def]
    longest = max(len(text_of(c)) for c in completions)
    return [0.0 * longest] * len(completions)


def counts_its_calls(completions, calls=[0]):  # type: ignore[no-untyped-def]  # noqa: B006
    calls[0] += 1
    return [float(calls[0])] * len(completions)


def stops_working(completions, calls=[0]):  # type: ignore[no-untyped-def]  # noqa: B006
    calls[0] += 1
    if calls[0] > 11:  # after the eight single completions, the batch and the empty one
        raise ConnectionError("the service is gone")
    return [0.0] * len(completions)


def fails_on_a_whole_batch(completions):  # type: ignore[no-untyped-def]
    return [0.0] if len(completions) == 1 else []


def depends_on_order(completions):  # type: ignore[no-untyped-def]
    return [float(i) for i in range(len(completions))]


def reads_strings_only(completions):  # type: ignore[no-untyped-def]
    return [float(len(c.strip())) for c in completions]


def chokes_on_columns(prompts, completions, completion_ids, **columns):  # type: ignore[no-untyped-def]
    return [float(sum(len("".join(values)) for values in columns.values()))] * len(completions)


def sorts_its_ids(completions, completion_ids):  # type: ignore[no-untyped-def]
    for ids in completion_ids:
        ids.sort()
    return [0.0] * len(completions)


def clears_a_column(completions, answer):  # type: ignore[no-untyped-def]
    answer.sort()
    return [0.0] * len(completions)


shared: list[str] = []


def keeps_state_between_threads(completions):  # type: ignore[no-untyped-def]
    shared.clear()
    for completion in completions:
        shared.append(text_of(completion))
        time.sleep(0.005)
    return [float(len(shared))] * len(completions)


@pytest.mark.parametrize(
    ("fn", "problem"),
    [
        (too_few, "returned 0 values for 1 completions"),
        (not_a_number, "returned nan"),
        (fails_on_empty_text, "an empty completion: reward 'fails_on_empty_text' raised IndexError"),
        (reads_ascii_only, "a completion that is not ASCII: "),
        (fails_on_long_text, "a very long completion: "),
        (fails_on_an_empty_batch, "an empty batch"),
        (counts_its_calls, "the same call again gave other values"),
        (stops_working, "ConnectionError: the service is gone"),
        (fails_on_a_whole_batch, "a batch of 8: reward 'fails_on_a_whole_batch' returned 0 values"),
        (depends_on_order, "in another order the samples got other values"),
        (reads_strings_only, "completions that are chat messages: "),
        (chokes_on_columns, "a column that it does not know: "),
        (sorts_its_ids, "it changed its input completion_ids"),
        (clears_a_column, "it changed its input columns"),
        (keeps_state_between_threads, "4 threads at once: "),
    ],
)
def test_each_breach_is_found_and_named(fn: Any, problem: str) -> None:
    found = check_reward(fn)
    assert any(problem in sentence for sentence in found), found
    with pytest.raises(AssertionError, match="breaks its contract"):
        assert_reward_contract(fn)


def test_one_fault_is_not_told_as_many() -> None:
    assert len(check_reward(fails_on_empty_text)) == 1
    assert len(check_reward(depends_on_order)) == 1
    assert len(check_reward(counts_its_calls)) == 1
    assert len(check_reward(fails_on_a_whole_batch)) == 1


def test_made_up_columns_are_admitted_and_real_ones_are_used() -> None:
    def needs_a_dict(completions, rubric):  # type: ignore[no-untyped-def]
        return [row["points"] for row in rubric]

    (*_, problem) = check_reward(needs_a_dict)
    assert "columns rubric held made-up values" in problem
    assert check_reward(needs_a_dict, columns={"rubric": [{"points": 1}]}) == []
    with pytest.raises(RewardError, match="rubric: give a list"):
        check_reward(needs_a_dict, columns={"rubric": []})


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    check_reward(plain)
    assert threading.active_count() == before


# -- the command -----------------------------------------------------------------------------------


def test_the_command_reports_and_exits_with_0_1_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def good(completions, scale=1.0):\n    return [scale] * len(completions)\n"
        "def bad(completions):\n    return [float(i) for i in range(len(completions))]\n"
        "def rated(completions, rating):\n    return [r + 0.5 for r in rating]\n"
    )
    columns = tmp_path / "columns.json"
    columns.write_text(json.dumps({"rating": [1, 2]}))
    assert main([f"{file}:good", "--args", '{"scale": 2}']) == 0
    assert "reward 'good': keeps the contract" in capsys.readouterr().out
    assert main([f"{file}:bad"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN  in another order" in out and "ok      an empty batch" in out and "1 broken" in out
    assert main([f"{file}:rated", "--columns", str(columns)]) == 0
    capsys.readouterr()
    for wrong, message in [
        ([f"{file}:absent"], "has no function 'absent'"),
        ([f"{file}:good", "--args", "{"], "error: "),
        ([f"{file}:good", "--args", '{"scael": 2}'], "did you mean 'scale'?"),
        ([f"{file}:rated", "--columns", str(tmp_path / "none.json")], "none.json"),
        (["formatt"], "did you mean 'format'?"),
    ]:
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("async def good(completions):\n    return [None] * len(completions)\n")
    command = [sys.executable, "-m", "rewards.contract", f"{tmp_path}/mine.py:good"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "async reward 'good': keeps the contract" in result.stdout, result.stderr
