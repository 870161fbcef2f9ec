"""The answer verifier: where a response states its answer, and which answers are equal."""

from fractions import Fraction

import pytest

from rewards.math import Grade, extract_answer, grade, grade_many
from rewards.math.exact import MAX_EXPONENT, parse_number

# -- where the answer is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{73}.", "73"),
        (r"\fbox{73}", "73"),
        (r"\boxed 73.", "73."),
        (r"\\boxed{73}", "73"),
        ("<answer> 73 </answer>", "73"),
        (r"<answer>It is \boxed{73} then.</answer>", "73"),
        (r"\boxed{\boxed{73}}", "73"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{2}\n<answer>3</answer>", "3"),
        (r"write \boxed{ at the end. \boxed{73}", "73"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"thought </think> \boxed{2}", "2"),
        (r"<think>a</think><think>b</think> \boxed{2}", "2"),
    ],
)
def test_the_last_complete_mark_is_the_answer(response: str, expected: str) -> None:
    assert extract_answer(response, mode="boxed") == expected
    assert extract_answer(response, mode="any") == expected


@pytest.mark.parametrize(
    "response",
    [
        r"<think>\boxed{73}",
        r"<think>\boxed{73}</think>",
        r"<think>a</think> \boxed{73} <think>",
        r"\boxed{72} and then \boxed{73",
        r"\boxed{72} \boxed{}",
        r"\boxed{72} \boxed{ }",
        r"\boxed{72} <answer>73",
        r"<answer>\boxed{73</answer>",
        r"<answer></answer>",
        "",
    ],
)
def test_an_unclosed_thought_and_an_empty_or_unfinished_last_mark_are_unparsed(response: str) -> None:
    assert grade(response, "73") == Grade(False, "unparsed", None)
    assert grade(response, "72").verdict == "unparsed"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The answer is 73.", "73"),
        ("Answer: 72 was a guess.\nAnswer: 73", "73"),
        ("**Final Answer:** 73\n", "73"),
        ("#### 1,234", "1,234"),
        ("The final answer is: The largest $n$ is 34. I hope so.", "34"),
        ("so it has 10 rows of 4 seats", "4"),
        ("So 5 + 5 = 10 apples", "10"),
        (r"$4\sqrt{2}$", r"4\sqrt{2}"),
        (r"\textbf{(C)}\ 73", r"\textbf{(C)}\ 73"),
        ("between 72 or 73", "72 or 73"),
    ],
)
def test_mode_any_falls_back_to_phrase_then_last_expression(response: str, expected: str) -> None:
    assert extract_answer(response, mode="any") == expected
    assert extract_answer(response, mode="boxed") is None


def test_a_phrase_with_nothing_after_it_is_unparsed() -> None:
    assert grade("That makes 73. The answer is", "73").verdict == "unparsed"


def test_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="'strict'"):
        grade("73", "73", mode="strict")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{74} or \boxed{73}",
        r"\boxed{73} or \boxed{74}",
        r"\boxed{74}, \boxed{73}",
        r"$\boxed{74}$ and $\boxed{73}$",
        r"\boxed{74}\boxed{73}",
        r"\boxed{74}, or maybe \boxed{73}",
        "<answer>74</answer> or <answer>73</answer>",
        r"<answer>\boxed{74} or \boxed{73}</answer>",
        r"\boxed{73 or 74}",
        r"\boxed{73 \text{ or } 74}",
        r"\boxed{73, 74}",
        r"\boxed{73,0}",
        r"\boxed{73, 000}",
        r"\boxed{\{73\}, 74}",
        r"\boxed{\pm 73}",
        r"\boxed{74 = 73}",
        r"\boxed{73 = 74}",
        r"\boxed{2x = 73}",
        r"\boxed{72 + \boxed{73}}",
        r"\boxed{73 \text{ million}}",
        r"\boxed{73!}",
        r"\boxed{73\pi}",
        r"\boxed{73_8}",
        r"\boxed{73.00000001}",
        "The answer is 72 or 73.",
        "73 or 74",
    ],
)
def test_hedges_and_near_misses_are_wrong(response: str) -> None:
    assert grade(response, "73").verdict == "wrong"


def test_a_later_statement_is_not_a_hedge() -> None:
    assert grade("\\boxed{74}\n\n\\boxed{73}", "73").correct
    assert grade(r"\boxed{74} is wrong. It is \boxed{73}.", "73").correct


def test_joined_boxes_are_not_merged_into_a_number_or_a_set() -> None:
    assert not grade(r"\boxed{7}\boxed{3}", "73").correct
    assert not grade(r"\boxed{1},\boxed{000}", "1000").correct


# -- exact numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("073", 73), ("+73", 73), ("-0", 0), ("000", 0), ("73.0", 73), ("73.", 73), ("\u221273", -73),
        ("10,000", 10_000), ("10{,}000", 10_000), (r"10\,000", 10_000), ("10 000", 10_000),
        (r"11,\! 111,\! 100", 11_111_100), (".5", "1/2"), ("-.5", "-1/2"), ("$1,000.99$", "100099/100"),
        (r"\frac{1}{2}", "1/2"), (r"\dfrac12", "1/2"), (r"-\tfrac{10}{9}", "-10/9"),
        (r"\frac{-1}{2}", "-1/2"),
        ("12/3", 4), ("2 1/2", "5/2"), (r"918\frac{1}{2}", "1837/2"), (r"-2\frac{1}{2}", "-5/2"),
        ("1 234/567", Fraction(1234, 567)), ("7.3e1", 73), (r"1.5\times10^{3}", 1500), ("10^{-2}", "1/100"),
        (r"10\text{ units}", 10), (r"35\mathrm{~cm}^2", 35), ("35 cm", 35), (r"\text{73}", 73),
        ("{(73)}", 73),
        (r"45^\circ", 45), ("45\u00b0", 45), ("90 degrees", 90), (r"\$10", 10), (r"-\$5.50", "-11/2"),
        (r"28\%", 28), ("28 percent", 28), ("N=73", 73), ("m+n = 73", 73), ("73 = 73.0", 73),
        ("16\\\\\n\\noindent", 16), ("185\\", 185),
    ],
)  # fmt: skip
def test_spellings_of_numbers(text: str, value: int | str | Fraction) -> None:
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1 0000", "1,2345", "12,34,567", "1/0", "1/2/3", "1\n000", "$1$ $000$", "1$000", "--73", "5x",
     "5m", r"2\pi", "5 million", "half", "nan", "inf", "0x1F", "1_000", "2^10", "3+4", r"2\frac{7}{2}",
     "(1,2)", "12:30", r"\text{C}", r"\sqrt{4}", "10^999999999", "1e-999999999", "9" * 5000,
     "5 squared", "5 not 6"],
)  # fmt: skip
def test_what_is_not_one_plain_number(text: str) -> None:
    assert parse_number(text) is None


def test_exponents_are_bounded() -> None:
    assert parse_number(f"10^{{{MAX_EXPONENT}}}") == 10**MAX_EXPONENT
    assert parse_number(f"10^{{{MAX_EXPONENT + 1}}}") is None


def test_decimal_comma_only_against_a_fractional_number() -> None:
    assert grade(r"\boxed{1000,99}", "1000.99").correct
    assert not grade(r"\boxed{1,0}", "1").correct
    assert not grade(r"\boxed{1,2}", "12").correct


def test_percent_is_a_unit_not_a_factor() -> None:
    assert grade(r"\boxed{28\%}", "28").correct
    assert not grade(r"\boxed{28\%}", "0.28").correct


def test_strings_compare_normalised_when_neither_side_is_a_number() -> None:
    assert grade(r"\boxed{\text{(C)}}", r"\boxed{C}").correct
    assert grade(r"\boxed{\left( 1, \dfrac{9}{2} \right)}", r"$(1,\frac{9}{2})$").correct
    assert not grade(r"\boxed{(2, 1)}", "(1, 2)").correct
    assert not grade(r"\boxed{\text{}}", "").correct


def test_a_number_never_equals_a_string_that_normalises_to_it() -> None:
    assert not grade(r"\boxed{1 2}", "12").correct
    assert not grade(r"\boxed{73\infty}", "73").correct


def test_grade_many_keeps_order_and_does_not_stop_at_bad_text() -> None:
    pairs = [(r"\boxed{1}", "1"), (r"\boxed{", "1"), (r"\boxed{2}", "1")]
    assert [g.verdict for g in grade_many(pairs)] == ["correct", "unparsed", "wrong"]
