"""Verdicts that a hostile reading of the verifier found wrong: each case was decided the other way before."""

import time

import pytest

from rewards.math import grade_many
from rewards.math.extract import extract_answer

# (answer, gold) that were paid.
PAID = [
    (r"\boxed{0, 1}", "1,000,000"),
    (r"\boxed{100, 1}", "1,100,100"),
    (r"\boxed{73 \quad 74}", "7374"),
    (r"\boxed{1 \quad 234}", "1234"),
    ("$73$ $74$", "7374"),
    (r"\boxed{\bar{z}}", "z"),
    (r"\boxed{\tilde{x}+1}", "x+1"),
    (r"\boxed{\overline{73}}", "73"),
    (r"\boxed{73 \text{k}}", "73"),
    (r"\boxed{73\text{ at least}}", "73"),
    (r"\boxed{73 at most}", "73"),
    (r"\boxed{73 \text{ maybe}}", "73"),
    (r"\boxed{3.14...}", "3.14"),
    (r"\boxed{5\text{ m}}", r"5\text{ cm}"),
    (r"\boxed{5\sqrt2\text{ m}}", r"5\sqrt{2}\text{ cm}"),
    (r"\boxed{5 am}", "5 pm"),
    (r"\boxed{8:30\text{ a.m.}}", r"8:30\text{ p.m.}"),
    (r"\boxed{y=5}", "x=5"),
    (r"\boxed{x>5}", "y>5"),
    (r"\boxed{g(x)=5}", "f(x)=5"),
    (r"\boxed{(x,y)=(1,2)}", "(y,x)=(1,2)"),
    (r"\boxed{y=1, x=2}", "(1,2)"),
    (r"\boxed{x=1 \text{ or } y=2}", "(1,2)"),
    (r"\boxed{x=1, x=2}", "(1,2)"),
    (r"\boxed{73 \approx 74}", "73"),
    (r"\boxed{No such number}", "No"),
    ("The answer is not 73.", "73"),
    ("It is not $73$", "73"),
    (r"The answer is not \boxed{73}", "73"),
    (r"$x \ne \boxed{73}$", "73"),
    (r"$-\boxed{73}$", "73"),
    ("Answer: 73? No, 74", "73"),
    ("So $n = 4$.\n" + '```json\n{"reasoning": "n = 4", "answer": "infinitely many"}\n```', "4"),
]
# (response, gold) that were refused.
REFUSED = [
    ('### Final Answer:\n```json\n{"reasoning": "bla", "answer": 15.0}\n```', "15"),
    ('### Final Answer:\n```json\n{"r": "is \\( x \\).", "answer": "\\\\frac{\\\\sqrt{6}}{2}"}', r"\frac{\sqrt6}{2}"),
    ('### Final Answer:\n```json\n{"r": "is \\( x \\).", "answer": "\\frac{\\sqrt{6}}{2}"}', r"\frac{\sqrt6}{2}"),
    ('{"reasoning": "both", "answer": ["B", "F"]}', "B, F"),
    ("<answer>The answer is 73</answer>", "73"),
    (r"\boxed{\text{Answer: } 73}", "73"),
    ("Final Answer:\n```\n73\n```", "73"),
    ("Answer - 73", "73"),
    (r"$-\boxed{73}$", "-73"),
    (r"\boxed{\bf 73}", "73"),
    (r"\boxed{\textcolor{red}{73}}", "73"),
    (r"\boxed{\color{blue}73\pi}", r"73\pi"),
    (r"\boxed{\Large\frac{1}{2}}", "0.5"),
    (r'\boxed{"73"}', "73"),
    (r"\boxed{７３}", "73"),
    (r"\boxed{73\text{ times}}", "73"),
    (r"\boxed{73\text{ ways to arrange the letters}}", "73"),
    (r"\boxed{73 \frac{\text{km}}{\text{h}}}", "73"),
    (r"\boxed{73 \text{ m} / \text{s}}", "73"),
    (r"\boxed{AB^2 = 73}", "73"),
    (r"\boxed{[ABC] = 73}", "73"),
    (r"\boxed{\gcd(a,b) = 3}", "3"),
    (r"\boxed{\text{yes}}", "Yes"),
    (r"\boxed{yes}", "Yes"),
    (r"\boxed{8:30\text{ a.m.}}", "8:30 am"),
    (r"\boxed{(1011)_2}", "1011_2"),
    (r"\boxed{1011_{\text{two}}}", "1011_2"),
    (r"\boxed{\frac{10!}{3!7!}}", "120"),
    (r"\boxed{\begin{array}{c} 73 \end{array}}", "73"),
    (r"\boxed{\begin{aligned} x &= 3 \\ y &= 4 \end{aligned}}", "(3,4)"),
    (r"\boxed{\begin{aligned} x &= 70 + 3 \\ &= 73 \end{aligned}}", "73"),
]
# Neighbours of the cases above that must stay as they were.
KEPT = [
    (r"\boxed{2 h + 3 m}", "3 m + 2 h", True),
    (r"\boxed{2h + 3m}", "3m + 2h", True),
    ('{"answer": "73 or 74"}', "73", False),
    ('{"answer": [73, 74]}', "73", False),
    (r"\boxed{73 \text{ or more}}", "73", False),
    (r"\boxed{3\text{ to } 4}", "3", False),
    (r"\boxed{73 \text{ times } 2}", "73", False),
    (r"\boxed{y = x^2}", "f(x)=x^2", True),
    (r"\boxed{y=2x}", "x=y/2", True),
    (r"\boxed{x=2, y=1}", "y=1, x=2", True),
    (r"\boxed{5\text{ centimeters}}", r"5\text{ cm}", True),
    (r"\boxed{73\text{ miles per hour}}", r"73\text{ mph}", True),
    (r"\boxed{n \text{ cm}}", "n", True),
    (r"\boxed{\overline{AB}}", "AB", True),
    (r"\boxed{0.\overline{3}}", "1/3", True),
    (r"\boxed{AB}", "ab", False),
    ('{"answer": 72} Correction: the answer is 73.', "73", True),
    ('{"answer": 73} Correction: the answer is 72.', "73", False),
]


def test_what_was_paid_is_not() -> None:
    found = grade_many(PAID, timeout_s=60)
    assert [pair for pair, judged in zip(PAID, found, strict=True) if judged.correct] == []


def test_what_was_refused_is_paid() -> None:
    found = grade_many(REFUSED, timeout_s=60)
    assert [pair for pair, judged in zip(REFUSED, found, strict=True) if not judged.correct] == []


def test_their_neighbours() -> None:
    found = grade_many([(response, gold) for response, gold, _ in KEPT], timeout_s=60)
    assert [case for case, judged in zip(KEPT, found, strict=True) if judged.correct is not case[2]] == []


@pytest.mark.parametrize(
    "piece",
    [
        '"answer": "',
        '"answer": "\\"',
        "answer ",
        "answer: ",
        "not ",
        r"\quad ",
        "$-",
        r"\boxed{",
        r"\text{",
        "(",
        "x=",
        "1 ",
    ],
)
def test_extraction_is_linear(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    extract_answer(text)
    extract_answer(text + r" \boxed{" + piece * 100 + "}")
    assert time.process_time() - start < 2
