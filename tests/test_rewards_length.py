"""The cosine length reward against the paper's end points and hand-computed values between them."""

import math

import pytest

from rewards import load_reward, score
from rewards.length import cosine, cosine_length, soft_overlong


def of_length(length: int) -> list[int]:
    return list(range(length))


def test_the_ends_are_those_of_the_paper() -> None:
    right, wrong = r"\boxed{73}", r"\boxed{74}"
    ids = [of_length(n) for n in (0, 0, 100, 100, 101, 101)]
    rewards = cosine_length([right, wrong] * 3, ids, ["73"] * 6, max_length=100)
    assert rewards == [2.0, -10.0, -10.0, -10.0, -10.0, -10.0]


def test_values_between_the_ends_by_hand() -> None:
    # cos(pi/3) = 1/2, cos(pi/2) = 0, cos(2 pi/3) = -1/2
    ids = [of_length(n) for n in (20, 30, 40)]
    correct = cosine_length([r"\boxed{73}"] * 3, ids, ["73"] * 3, max_length=60)
    wrong = cosine_length([r"\boxed{74}"] * 3, ids, ["73"] * 3, max_length=60)
    assert correct == pytest.approx([1 + 1 / 2 * 1.5, 1.5, 1 + 1 / 2 * 0.5])
    assert wrong == pytest.approx([-5 * 1.5, -5.0, -5 * 0.5])


def test_short_is_better_when_right_and_long_is_better_when_wrong() -> None:
    for right in (True, False):
        text = r"\boxed{73}" if right else "no idea"
        rewards = cosine_length([text] * 50, [of_length(n) for n in range(50)], ["73"] * 50, max_length=50)
        assert rewards == sorted(rewards, reverse=right)  # type: ignore[type-var]
        assert len(set(rewards)) == 50


def test_every_end_can_be_set() -> None:
    ends = {"correct_at_0": 5.0, "correct_at_max": 3.0, "wrong_at_0": -1.0, "wrong_at_max": -3.0, "exceed": -7.0}
    texts = [r"\boxed{73}", "no idea", r"\boxed{73}"]
    rewards = cosine_length(texts, [of_length(5), of_length(5), of_length(10)], ["73"] * 3, max_length=10, **ends)
    assert rewards == pytest.approx([4.0, -2.0, -7.0])


def test_verdicts_are_those_of_math_and_none_is_for_samples_without_gold() -> None:
    texts = [r"\boxed{73}", r"\boxed{74}", "no idea", r"\boxed{73}"]
    reward = load_reward({"name": "cosine_length", "args": {"max_length": 10}})
    scores = score([reward], ["q"] * 4, texts, [[1]] * 4, {"answer": ["73", "73", "73", None]})
    assert scores.verdicts == ["correct", "wrong", "unparsed", None]
    assert scores.failures == [3]


def test_prefill_and_mode_reach_the_grading() -> None:
    prefilled = cosine_length(["so 73"], [[1]], ["73"], max_length=10, prefill="<think>")
    boxed = cosine_length(["The answer is 73"], [[1]], ["73"], max_length=10, mode="boxed")
    assert prefilled[0] is not None and prefilled[0] < 0
    assert boxed[0] is not None and boxed[0] < 0


@pytest.mark.parametrize("args", [{"max_length": 0}, {"max_length": 10, "exceed": math.inf}])
def test_wrong_args_are_refused(args: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="max_length >= 1 and finite"):
        cosine_length([], [], [], **args)  # type: ignore[arg-type]


def test_cosine_is_half_a_wave() -> None:
    assert cosine(0.0, 4.0, -2.0) == 4.0
    assert cosine(0.5, 4.0, -2.0) == pytest.approx(1.0)
    assert cosine(1.0, 4.0, -2.0) == -2.0


def test_soft_overlong_against_the_three_cases_of_equation_13() -> None:
    def reference(length: int, longest: int, cache: int) -> float:
        if length <= longest - cache:
            return 0.0
        if length <= longest:
            return ((longest - cache) - length) / cache
        return -1.0

    lengths = range(40)
    for longest, cache in [(30, 10), (20, 20), (25, 1)]:
        rewards = soft_overlong([of_length(n) for n in lengths], max_length=longest, buffer=cache)
        assert rewards == [reference(n, longest, cache) for n in lengths]
