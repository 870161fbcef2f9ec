"""The built-in rewards: accuracy, format, soft overlong, repetition."""

import copy
import pickle

import pytest

from rewards import load_reward, score
from rewards.accuracy import integer_reward, math_reward, verdicts
from rewards.format import format_reward
from rewards.length import soft_overlong
from rewards.repetition import repetition

COMPLETIONS = [r"\boxed{73}", r"\boxed{74}", "no idea", r"\boxed{5}"]
ANSWERS = ["73", "73", "73", None]


def test_math_scores_and_verdicts() -> None:
    assert math_reward(COMPLETIONS, ANSWERS) == [1.0, 0.0, 0.0, None]
    assert math_reward(COMPLETIONS, ANSWERS, correct=1.0, wrong=-1.0) == [1.0, -1.0, -1.0, None]
    assert verdicts(COMPLETIONS, ANSWERS) == ["correct", "wrong", "unparsed", None]


def test_math_mode_boxed_does_not_read_prose() -> None:
    assert math_reward(["The answer is 73"], ["73"]) == [1.0]
    assert math_reward(["The answer is 73"], ["73"], mode="boxed") == [0.0]


def test_math_reads_chat_completions_and_numeric_columns() -> None:
    chat = [{"role": "assistant", "content": r"\boxed{142}"}]
    assert math_reward([chat], [142.0]) == [1.0]
    assert math_reward([[{"role": "user", "content": r"\boxed{142}"}]], ["142"]) == [0.0]


def test_a_prefilled_thought_that_never_ends_has_no_answer() -> None:
    assert math_reward(["so 73 it is"], ["73"], prefill="<think>\n") == [0.0]
    assert math_reward([r"so </think> \boxed{73}"], ["73"], prefill="<think>\n") == [1.0]


def test_integer_accepts_only_integers() -> None:
    assert integer_reward([r"\boxed{073}", r"\boxed{73.5}"], ["73", "73"]) == [1.0, 0.0]
    assert integer_reward([r"\boxed{x}"], ["x"]) == [None]
    assert integer_reward([r"\boxed{1/2}"], ["1/2"]) == [None]
    [score_of_a_name] = integer_reward([r"\boxed{x}"], ["73"])
    assert getattr(score_of_a_name, "verdict", None) == "unparsed"


def test_scores_collect_verdicts_of_one_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = math_reward.__globals__["grade_many"]

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    rewards = [load_reward("format"), load_reward("math")]
    monkeypatch.setitem(math_reward.__globals__, "grade_many", counting)
    scores = score(rewards, ["q"] * 4, COMPLETIONS, [[1]] * 4, {"answer": ANSWERS})
    assert scores.verdicts == ["correct", "wrong", "unparsed", None]
    assert scores.verdict_counts() == {"correct": 1, "wrong": 1, "unparsed": 1, "timeout": 0}
    assert calls == 1
    assert all(type(value) is float for value in scores.components["math"][:3])


def test_judged_scores_survive_copies_and_processes() -> None:
    [judged, *_] = math_reward(COMPLETIONS, ANSWERS)
    for twin in (copy.deepcopy(judged), pickle.loads(pickle.dumps(judged))):
        assert twin == 1.0 and twin.verdict == "correct"  # type: ignore[union-attr]


# -- format ----------------------------------------------------------------------------------------

GOOD = "<think>\nbecause\n</think>\n<answer>73</answer>\n"


@pytest.mark.parametrize(
    ("text", "tagged", "plain"),
    [
        (GOOD, 1.0, 1.0),
        ("<think>because</think>\n73", 0.0, 1.0),
        ("<think>because</think> so <answer>73</answer>", 0.0, 1.0),
        ("<think>because</think><answer>73</answer> done", 0.0, 1.0),
        ("<think>because</think><answer>7</answer><answer>3</answer>", 0.0, 1.0),
        ("<think>a <answer>7</answer></think><answer>3</answer>", 0.0, 1.0),
        ("<think>because</think>", 0.0, 0.0),
        ("<think>because</think> \n", 0.0, 0.0),
        ("<think>because</think><answer> </answer>", 0.0, 1.0),
        ("<think> </think><answer>73</answer>", 0.0, 0.0),
        ("Hm. " + GOOD, 0.0, 0.0),
        ("\n" + GOOD, 0.0, 0.0),
        (GOOD + GOOD, 0.0, 0.0),
        ("<think>a<think>b</think><answer>73</answer>", 0.0, 0.0),
        ("<think>a</think>b</think><answer>73</answer>", 0.0, 0.0),
        ("because</think><answer>73</answer>", 0.0, 0.0),
        ("<answer>73</answer><think>because</think>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_format(text: str, tagged: float, plain: float) -> None:
    assert format_reward([text]) == [tagged]
    assert format_reward([text], style="think") == [plain]


def test_format_scores_prefill_and_completion_together() -> None:
    completion = "because</think><answer>73</answer>"
    assert format_reward([completion], prefill="<think>\n") == [1.0]
    assert format_reward([GOOD], prefill="<think>\n") == [0.0]
    reward = load_reward("format")
    assert score([reward], ["q"], [completion], [[1]], {}, prefill="<think>\n").total == [1.0]
    assert score([reward], ["q"], [completion], [[1]], {}).total == [0.0]


def test_format_refuses_an_unknown_style() -> None:
    with pytest.raises(ValueError, match="'xml'"):
        format_reward([GOOD], style="xml")  # type: ignore[arg-type]


# -- length and repetition -------------------------------------------------------------------------


def test_soft_overlong_follows_equation_13() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 500]
    rewards = soft_overlong([[0] * n for n in lengths], max_length=100, buffer=20)
    assert rewards == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_soft_overlong_refuses_a_buffer_outside_the_length(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong([[0]], max_length=100, buffer=buffer)


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    distinct, constant, short = list(range(10)), [7] * 10, [7]
    rewards = repetition([distinct, constant, short, [1, 2, 1, 2]], n=2, max_penalty=-2.0)
    assert rewards == pytest.approx([0.0, -2.0 * (1 - 1 / 9), 0.0, -2.0 * (1 - 2 / 3)])


def test_repetition_refuses_a_bonus() -> None:
    with pytest.raises(ValueError, match="max_penalty"):
        repetition([[1]], max_penalty=1.0)
    with pytest.raises(ValueError, match="n >= 1"):
        repetition([[1]], n=0)
