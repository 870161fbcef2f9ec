"""Golds as canonical integers: typesetting goes, values do not change, nothing is computed."""

import pytest

from data.curation.integers import in_range, read_integer, to_integer
from data.curation.problem import Problem, Rejected

INTEGERS = {
    "16\\\\\n\\noindent": "16", "27.0": "27", "073": "73", "10{,}000": "10000", "1,\\!657": "1657",
    "52000 \\\\\n\\noindent": "52000", "\\boxed{5}": "5", "so $x=\\boxed{-7}$.": "-7", "$12$": "12",
    "\\(12\\)": "12", "\\[ 12 \\]": "12", "$-1.$": "-1", "$2\n$ \\\\": "2", "-0": "0", "+5": "5", "\u22125": "-5",
    "000": "0", "1,000,000": "1000000", "10. \\\\\n\\noindent": "10", "\\$425": "425", "-\\$5": "-5",
    " \\$ 5": "5", "$\\$1,\\!657$": "1657", "17\\%": "17", "20 \\%": "20", "50^\\circ": "50",
    "300^{\\circ}": "300", "30^\\circ.": "30", "20\\text{ miles}": "20", "5225 \\text{ cubic inches}": "5225",
    "\\text{ 510}": "510", "32\\text{ cm}^2": "32", "20 \\  \\text{mph}": "20", "40\\ {cm}^3": "40",
    "20 \\mathrm{~cm}": "20", "34\\text{ sq. units}": "34", "4ft": "4",
    "12345678901234567890": "12345678901234567890", "\\indent 25": "25",
}  # fmt: skip
OTHERS = [
    "", "x", "1,9", "251,7", "3^{4}", "$2^{22}$", "100!", "\\frac{6}{3}", "6/3", "x = 4", "$x=-1$", "2.5",
    "13.45 years", "2e", "3\\pi", "5i", "2 \\text{ or } -12", "2, 3, \\text{ and } 4", "3 \\text{ million}",
    "9\\text{ a.m.}", "1331_5", "[1,2]", "(0,3)", "\\text{Friday}", "\\text{B}", "5 \\times 10^3", "--5", "1 2",
    "\\sqrt{4}", "7 or 8", "1110_2", "0.0001", "1,00", "__import__('os')", "10**9", "5\\text{ or more}",
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), INTEGERS.items())
def test_integer(text: str, wanted: str) -> None:
    assert read_integer(text) == wanted


@pytest.mark.parametrize("text", OTHERS)
def test_no_integer(text: str) -> None:
    assert read_integer(text) is None


def test_a_gold_of_many_digits_is_read_as_text() -> None:
    assert read_integer("0" + "9" * 10_000) == "9" * 10_000


def problem(answer: str, **changes: object) -> Problem:
    return Problem("test", "file:1", "Find it.", answer, answer, "math", **changes)  # type: ignore[arg-type]


def test_filter() -> None:
    solved = to_integer(problem("$27.0$"))
    assert isinstance(solved, Problem) and (solved.answer, solved.kind, solved.raw_answer) == (
        "27",
        "integer",
        "$27.0$",
    )
    assert to_integer(problem("2^{10}")) == Rejected("the answer is no integer", "2^{10}")


@pytest.mark.parametrize(
    ("answer", "inside"), [("0", True), ("073", True), ("999", True), ("1000", False), ("-1", False)]
)
def test_aime_range(answer: str, inside: bool) -> None:
    aime = problem(answer, aime=True)
    assert (in_range(aime) == aime) is inside
    assert in_range(problem(answer)) == problem(answer)  # only where the source says so
