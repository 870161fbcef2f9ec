"""Language consistency: hand-counted shares in several scripts, and what counts as no language."""

import time

import pytest

from rewards import load_reward, score
from rewards.language import language, language_share, reasoning


@pytest.mark.parametrize(
    ("text", "code", "share"),
    [
        ("First we add the two numbers.", "en", 1.0),
        ("First we add the two numbers.", "zh", 0.0),
        ("首先我们把两个数相加。", "zh", 1.0),
        ("First we add 两个数", "en", 3 / 6),
        ("首先 we add the numbers", "zh", 2 / 6),
        ("まず二つの数を足します", "ja", 1.0),
        ("まず二つの数を足します", "zh", 3 / 11),
        ("먼저 두 수를 더하면 first", "ko", 4 / 5),
        ("Сначала сложим числа", "ru", 1.0),
        ("Сначала add числа", "ru", 2 / 3),
        ("Πρώτα προσθέτουμε", "el", 1.0),
        ("نجمع العددين", "ar", 1.0),
        ("पहले दोनों संख्याएँ जोड़ें", "hi", 1.0),
        ("บวกเลข add", "th", 6 / 7),
        ("Zuerst addieren wir die Zahlen für später", "de", 1.0),
        ("ｆｕｌｌ ｗｉｄｔｈ 字", "en", 2 / 3),
    ],
)
def test_share_of_words_by_script(text: str, code: str, share: float) -> None:
    assert language_share(text, code) == pytest.approx(share)


@pytest.mark.parametrize(
    "nothing",
    [
        r"$x + \text{apples}$",
        r"\[ \frac{a}{b} = \sin x \]",
        r"\( 2\pi r \)",
        r"\boxed{73}",
        r"\begin{align} x \end{align}",
        "$$area = width$$",
        "`print(result)`",
        "```python\nfor number in numbers:\n    print(number)\n```",
        "3.14, 12cm, 10,000",
        "x = y",
        "sin(x) max mod",
        "α + β",
        "ℝ 𝑥 𝐀𝐁 µ x²",
        "https://example.org/long/path",
        "<think><answer>",
    ],
)
def test_what_belongs_to_no_language_is_left_out(nothing: str) -> None:
    assert language_share(nothing, "zh") is None
    assert language_share(f"因此 {nothing} 成立", "zh") == 1.0


def test_dollars_of_money_do_not_hide_words() -> None:
    assert language_share("它 costs $5 and $6 together", "zh") == pytest.approx(1 / 4)


def test_only_the_reasoning_counts() -> None:
    assert reasoning("<think>a</think>b</think>c") == "<think>a</think>b"
    assert reasoning("abc") == "abc"
    text = "<think>We add them.</think> 答案是七十三"
    assert language([text], target="en") == [1.0]
    assert language([text], target="zh") == [0.0]


def test_prefill_chat_and_the_column_of_codes() -> None:
    chat = [{"role": "assistant", "content": "我们 add</think> 73"}]
    assert language([chat, chat], [None, "zh"], target="en", prefill="<think>\n") == pytest.approx([1 / 3, 2 / 3])
    reward = load_reward({"name": "language", "args": {"target": "zh"}})
    scores = score([reward], ["q"] * 2, ["我们", "73"], [[1]] * 2, {"target_language": ["en", None]})
    assert scores.components["language"] == [0.0, None]


def test_an_unknown_code_is_an_error() -> None:
    with pytest.raises(ValueError, match="'xx'"):
        language(["a"], target="xx")
    with pytest.raises(ValueError, match="'klingon'"):
        language(["a"], ["klingon"])
    with pytest.raises(ValueError, match="unknown language code 1"):
        language([], target=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", [r"\[", r"\(", "$", "$a", "`", "```", "<a", r"\begin{", "http://", "字", "a b ", "9"])
def test_time_is_linear_in_hostile_text(piece: str) -> None:
    start = time.process_time()
    language_share(piece * (200_000 // len(piece)), "en")
    assert time.process_time() - start < 5  # under 0.1 s on a quiet machine; a quadratic search takes minutes
