"""Duplicates and evaluation problems: what is the same however it is typeset, and what is not."""

import itertools
import random
import re

import pytest

from data.curation.contamination import ContaminationIndex, EvaluationProblem
from data.curation.duplicates import find_duplicates, near_duplicates, shingle_set
from data.curation.problem import Problem
from data.curation.residue import cut_residue
from data.curation.spec import ContaminationSpec, DuplicateSpec
from data.curation.statements import tokens

LONG = (
    "Let $x$, $y$ and $z$ be positive integers such that $\\frac{x}{3}+\\left(\\frac{y}{4}\\right)=12$ and "
    "$x \\cdot z \\leq 40$. A fair coin is tossed $7$ times, and the probability of exactly 4 heads can be written as "
    "$\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. Find $m+n+x$."
)
SHORT = "Compute $\\dbinom{16}{5}-7$."


def same_typesetting(text: str) -> dict[str, str]:
    return {
        "dfrac": text.replace("\\frac", "\\dfrac"),
        "round brackets": text.replace("$", "\\(", 1).replace("$", "\\)", 1),
        "display": text.replace("$", "$$"),
        "no left and right": text.replace("\\left", "").replace("\\right", ""),
        "big brackets": text.replace("\\left", "\\bigl").replace("\\right", "\\bigr"),
        "spacing": text.replace("+", " + ").replace(" ", "  ").replace("$.", "$ \\, ."),
        "thin spaces": text.replace("=", "\\,=\\;").replace(" and ", "~and~"),
        "case": re.sub(r"\\[A-Z]+", lambda command: command[0].lower(), text.upper()),
        "punctuation": text.replace(".", " .").replace(",", ""),
        "unicode": text.replace("\\leq", "\u2264").replace("\\cdot", "\u00d7").replace("-", "\u2212"),
        "line breaks": text.replace(" ", "\n"),
        "empty scripts": text.replace("x$", "x_{}^{}$"),
        "fonts": re.sub(r"(Find|Compute)", r"\\textbf{\1}", text.replace("$m$", "$\\mathrm{m}$")),
    }  # fmt: skip


@pytest.mark.parametrize("form", same_typesetting(LONG))
@pytest.mark.parametrize("text", [LONG, SHORT])
def test_typesetting_does_not_matter(text: str, form: str) -> None:
    assert tokens(same_typesetting(text)[form]) == tokens(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [("$x+1$", "$x-1$"), ("$3.5$", "$35$"), ("$5!$", "$5$"), ("$x^2$", "$x2$"), ("$1,2$", "$12$"), ("$x<y$", "$x>y$"),
     ("$x \\leq y$", "$x \\geq y$"), ("$x=1$", "$x \\neq 1$"), ("$\\sin x$", "$\\cos x$"), ("$|x|$", "$x$")],
)  # fmt: skip
def test_meaning_does(one: str, other: str) -> None:
    assert tokens(one) != tokens(other)


def problems(*pairs: tuple[str, str]) -> list[Problem]:
    return [Problem("s", f"f:{i}", text, answer, answer, "integer") for i, (text, answer) in enumerate(pairs, start=1)]


def test_exact_duplicates_keep_the_first() -> None:
    found = find_duplicates(
        problems((LONG, "7"), ("Other", "1"), (LONG.replace("\\frac", "\\tfrac"), "7")), DuplicateSpec()
    )
    assert {i: r.reason for i, r in found.items()} == {2: "exact duplicate"} and "f:1" in found[2].detail


def test_duplicates_that_disagree_are_all_left_out() -> None:
    found = find_duplicates(problems((LONG, "7"), (LONG, "8"), (LONG, "7"), ("Other", "1")), DuplicateSpec())
    assert set(found) == {0, 1, 2} and {r.reason for r in found.values()} == {"duplicates with different answers"}


@pytest.mark.parametrize(
    ("change", "answer", "near"),
    [
        (("A fair coin", "One fair coin"), "7", False),  # a number in words
        (("A fair coin", "The fair coin"), "7", True),
        (("12$", "13$"), "7", False),
        (("4 heads", "four heads"), "7", False),
        (("A fair coin", "The fair coin"), "8", False),
    ],
)
def test_near_duplicates_have_the_same_numbers_and_answer(change: tuple[str, str], answer: str, near: bool) -> None:
    found = find_duplicates(problems((LONG, "7"), (LONG.replace(*change), answer)), DuplicateSpec())
    assert (1 in found) is near


def test_words_in_capitals_tell_problems_apart() -> None:
    pair = problems(
        *((f"Determine the number of ways to arrange the letters of the word {w}.", "60") for w in ("PROOF", "RADII"))
    )
    assert find_duplicates(pair, DuplicateSpec(near=0.5)) == {}


def test_near_duplicates_against_all_pairs() -> None:
    rng = random.Random(5)
    texts = [[rng.choice("abcdefgh") for _ in range(rng.randint(5, 25))] for _ in range(60)]
    for text in list(texts):  # versions with a few letters changed
        copy = list(text)
        for _ in range(rng.randint(0, 3)):
            copy[rng.randrange(len(copy))] = rng.choice("xyz")
        texts.append(copy)
    sets = [shingle_set(text, 2) for text in texts]
    groups = [rng.randrange(2) for _ in texts]
    for least in (0.3, 0.5, 0.8, 1.0):
        found = near_duplicates(sets, groups, least)
        kept: list[int] = []
        for i, one in enumerate(sets):  # the same by comparing each with every kept one before it
            similar = [j for j in kept if groups[j] == groups[i] and len(one & sets[j]) / len(one | sets[j]) >= least]
            assert (i in found) is bool(similar)
            assert not similar or found[i][0] == similar[0]
            if not similar:
                kept.append(i)
        assert found


EVALUATION = [LONG, SHORT, "Find $x$.", "What is the greatest common divisor of $84$ and $126$?"]


@pytest.fixture(scope="module")
def index() -> ContaminationIndex:
    rows = [EvaluationProblem("exam", f"exam:{i}", text) for i, text in enumerate(EVALUATION, start=1)]
    return ContaminationIndex(rows, ContaminationSpec())


AROUND = {
    "alone": "{}",
    "before": "Solve this problem step by step and give a reason for each. {}",
    "after": "{} Put your final answer in a box.",
    "both": "A question from last year's paper, which many did not solve:\n\n{}\n\n(Calculators are not allowed.)",
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("form", same_typesetting(LONG))
@pytest.mark.parametrize("which", [0, 1, 3])
def test_planted_copies_are_found(index: ContaminationIndex, which: int, form: str, around: str) -> None:
    planted = AROUND[around].replace("{}", same_typesetting(EVALUATION[which])[form])
    match = index.find(planted)
    assert match is not None and match.problem.place == f"exam:{which + 1}"
    assert (match.kind == "equal") is (around == "alone")


def test_a_very_short_statement_must_be_the_whole(index: ContaminationIndex) -> None:
    assert index.find("find x") is not None
    assert index.find("Find $x$ if $2x=4$.") is None


def test_options_do_not_hide_a_copy() -> None:
    stem = "How many numbers below 100 are divisible by 7 but neither by 2 nor by 3 nor by any square above 1?"
    options = "\n(A) 10 (B) 13 (C) 27"
    for evaluation, planted in ((stem + options, stem), (stem, stem + options)):
        index = ContaminationIndex([EvaluationProblem("e", "e:1", evaluation)], ContaminationSpec())
        assert index.find(planted) is not None


def test_a_phrase_in_common_is_no_copy(index: ContaminationIndex) -> None:
    other = (
        "The volume of the cone can be written as $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive "
        "integers. Find $m+n$."
    )
    shared = set(itertools.pairwise(tokens(other))) & set(itertools.pairwise(tokens(LONG)))
    assert len(shared) > 10 and index.find(other) is None


def test_residue_of_a_page() -> None:
    text = "Find the area of $ABC$."
    figure = "[asy] draw(A--B); [/asy]"
    signed = "\n ~ someone_3.14\n ~ else"
    for residue in (signed, f"\nDiagram\n Let $AP=x$. {figure} ~SOMEONE", "\n note: easy", "\nHint\n Use it."):
        assert cut_residue(text + residue) == text
    for own in (
        "\nNote: $ABC$ is a triangle.",
        "\n[asy] draw(A--B); [/asy]",
        " Here $a ~ b$ means that $a$ divides $b$.",
    ):
        assert cut_residue(text + own) == text + own
