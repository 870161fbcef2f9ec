"""Calling rewards as TRL does, sync and async, and summing what they return."""

import asyncio
import gc
import math
import warnings
from typing import Any

import numpy
import pytest

from rewards import Reward, RewardError, Scores, score

PROMPTS = ["p0", "p1"]
COMPLETIONS = ["c0", "c1"]
IDS = [[1], [2, 3]]


def run(*rewards: Reward, columns: dict[str, list[Any]] | None = None, **options: Any) -> Scores:
    return score(list(rewards), PROMPTS, COMPLETIONS, IDS, columns or {}, **options)


def constant(*values: Any) -> Any:
    return lambda completions, **columns: list(values)


def test_everything_is_passed_by_keyword() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts, completions, completion_ids, **columns):  # type: ignore[no-untyped-def]
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [0.0, 0.0]

    reward = Reward("spy", spy, args={"scale": 2})
    run(reward, columns={"answer": ["a", "b"], "prompts": ["x", "y"]}, prefill="<think>")
    assert seen == {
        "prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS,
        "answer": ["a", "b"], "scale": 2,
    }  # fmt: skip


def test_without_kwargs_only_named_parameters_are_passed() -> None:
    def lengths(completion_ids, answer):  # type: ignore[no-untyped-def]
        return [len(ids) + len(gold) for ids, gold in zip(completion_ids, answer, strict=True)]

    columns = {"answer": ["a", "bb"], "source": ["x", "y"]}
    assert run(Reward("lengths", lengths), columns=columns).total == [2.0, 4.0]


def test_prefill_reaches_those_that_name_it() -> None:
    def prefix(completions, prefill):  # type: ignore[no-untyped-def]
        return [float(len(prefill))] * len(completions)

    assert run(Reward("prefix", prefix), prefill="<think>").total == [7.0, 7.0]


def test_chat_prompts_turn_completions_into_messages() -> None:
    seen: list[Any] = []

    def spy(completions, **columns):  # type: ignore[no-untyped-def]
        seen.extend(completions)
        return [0.0]

    message = [{"role": "assistant", "content": "c"}]
    chat = [[{"role": "user", "content": "q"}]]
    score([Reward("spy", spy)], chat, ["c"], [[1]], {})
    score([Reward("spy", spy)], chat, [message], [[1]], {})
    score([Reward("spy", spy)], ["q"], ["c"], [[1]], {})
    assert seen == [message, message, "c"]


def test_total_is_the_weighted_sum_over_what_applies() -> None:
    scores = run(Reward("a", constant(1.0, None), 2.0), Reward("b", constant(0.5, None), -1.0))
    assert scores.total[0] == 1.5
    assert math.isnan(scores.total[1])
    assert scores.failures == [1]
    assert scores.components == {"a": [1.0, None], "b": [0.5, None]}
    assert scores.verdicts is None and scores.verdict_counts() == {}
    assert run(Reward("a", constant(1.0, None), 2.0), Reward("b", constant(None, 3.0))).total == [2.0, 3.0]


def test_rewards_of_the_same_name_keep_their_own_component() -> None:
    scores = run(Reward("a", constant(1, 1)), Reward("a", constant(2, 2), 10.0))
    assert scores.components == {"a": [1.0, 1.0], "a_2": [2.0, 2.0]}
    assert scores.total == [21.0, 21.0]


@pytest.mark.parametrize(
    "returned", [[True, False], (1, 0), numpy.array([1.0, 0.0]), [numpy.float32(1), numpy.bool_(False)]]
)
def test_numbers_of_every_kind_become_floats(returned: Any) -> None:
    values = run(Reward("r", lambda completions: returned)).components["r"]
    assert values == [1.0, 0.0]
    assert [type(value) for value in values] == [float, float]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'r' returned 1 values for 2 completions"),
        (1.0, "'r' returned a float, not a list"),
        (None, "'r' returned a NoneType, not a list"),
        ("ab", "'r' returned a str, not a list"),
        ([0.0, "1.0"], "'r' returned '1.0' for completion 1"),
        ([0.0, math.nan], "'r' returned nan for completion 1"),
        ([-math.inf, 0.0], "'r' returned -inf for completion 0"),
        ([0.0, 10**400], "for completion 1"),
        ([0.0, 1j], "'r' returned 1j for completion 1"),
    ],
)
def test_what_is_not_one_finite_number_per_completion_is_an_error(returned: Any, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        run(Reward("r", lambda completions: returned))
    assert message in str(caught.value)


def failing(completions: list[str]) -> list[float]:
    raise KeyError("rubric")


async def failing_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    raise KeyError("rubric")


@pytest.mark.parametrize("fn", [failing, failing_later])
def test_an_exception_names_the_reward_and_is_never_a_zero(fn: Any) -> None:
    with pytest.raises(RewardError, match="reward 'judge' raised KeyError: 'rubric'") as caught:
        run(Reward("fine", constant(1.0, 1.0)), Reward("judge", fn))
    assert isinstance(caught.value.__cause__, KeyError)


def test_coroutines_left_behind_by_an_exception_do_not_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RewardError):
            run(Reward("later", failing_later), Reward("judge", failing))
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def meeting() -> list[Reward]:
    """Two async rewards that each wait for the other: they end only if they run concurrently."""
    arrived: list[str] = []

    async def meet(name: str) -> list[float]:
        arrived.append(name)
        for _ in range(10_000):
            if len(arrived) == 2:
                return [1.0, 2.0]
            await asyncio.sleep(0)
        raise TimeoutError(name)

    async def first(completions: list[str]) -> list[float]:
        return await meet("first")

    def second(completions: list[str]) -> Any:  # not a coroutine function, but returns an awaitable
        return meet("second")

    return [Reward("first", first), Reward("second", second), Reward("sync", constant(0.5, 0.5))]


def test_async_rewards_run_concurrently() -> None:
    assert run(*meeting()).total == [2.5, 4.5]


def test_async_rewards_run_inside_a_running_event_loop() -> None:
    async def caller() -> Scores:
        return run(*meeting())

    assert asyncio.run(caller()).total == [2.5, 4.5]


def test_a_missing_column_is_named_before_anything_is_called() -> None:
    called: list[str] = []

    def first(completions, **columns):  # type: ignore[no-untyped-def]
        called.append("first")
        return [0.0, 0.0]

    def second(completions, answer):  # type: ignore[no-untyped-def]
        return [0.0, 0.0]

    with pytest.raises(RewardError, match="'second' needs a column .*'answer'"):
        run(Reward("first", first), Reward("second", second))
    assert called == []


def test_ragged_input_is_an_error() -> None:
    with pytest.raises(RewardError, match="column 'answer' has 1 entries for 2 prompts"):
        run(Reward("a", constant(1, 1)), columns={"answer": ["x"]})
    with pytest.raises(RewardError, match="completion_ids has 1 entries for 2 prompts"):
        score([], PROMPTS, COMPLETIONS, [[1]], {})
