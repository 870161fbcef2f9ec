"""Multiple choice: options recognised in all their forms, removed, and letters turned into values."""

import pytest

from data.curation.choices import find_choices, letter_of, resolve_choices
from data.curation.problem import Problem, Rejected

VALUES = {"A": "10", "B": "13", "C": "27", "D": "120"}
STEM = "How many different scores are possible?"


def row(label_and_value: str, between: str = " ") -> str:
    """The four options, @ standing for the letter and # for the value."""
    return between.join(label_and_value.replace("@", k).replace("#", v) for k, v in VALUES.items())


FORMS = {
    "brackets": "\n" + row("(@) #") + "\n",
    "bold": "\n$" + row(r"\textbf{(@)}\ #", r" \qquad ") + "$\n",
    "bold, gap inside": "\n$" + row(r"\textbf{(@) }#", r"\qquad") + r"\qquad$",
    "bold, tilde": "\n$" + row(r"\textbf{(@)}~#", r"\qquad") + "$",
    "mathrm around": "\n$" + row(r"\mathrm{(@) \ # }", r" \qquad ") + "$",
    "nested fonts": "\n$" + row(r"\mathrm{\textbf{(@)} \ }#", r"\qquad ") + "$",
    "text values": "\n$" + row(r"\textbf{(@)} \text{ #}", r" \qquad ") + "$",
    "display": "\n\\[" + row(r"\textbf{(@)} \ #", r" \qquad") + "\\]\n",
    "decoded tab": "\n$" + row("\\textbf{(@)} #", " \\qquad").replace("\\textbf{(C)", "\textbf{(C)") + "$",
    "no brackets": " $$\n" + row(r"\text @. \ \ #", r" \qquad ") + "\n$$",
    "align": "\n\\begin{align*}\n" + row(r"\text{@)}\ & #", " &\n") + "\\\\\n\\end{align*}",
    "lines, dot": "\n\n" + row("@. $#$", "\n\n"),
    "lines, bracket": "\n\n\\noindent Options:\\\\\n" + row("@) #", "\\\\\n"),
    "lines, both": "\n" + row("@). $#$", "\n"),
    "lines, brackets": "\n" + row("(@) #", "\n"),
    "bullets": "\n\n" + row(r"$\bullet$ @. #", "\n\n"),
    "enumerate": "\n\\begin{enumerate}[(A)]\n" + row(r"\item #", "\n") + "\n\\end{enumerate}",
    "labelled items": "\n\\begin{enumerate}\n" + row(r"\item[(@)] #", "\n") + "\n\\end{enumerate}",
}


def problem(statement: str, answer: str) -> Problem:
    return Problem("test", "file:1", statement, answer, answer, "math")


@pytest.mark.parametrize("form", FORMS)
def test_form(form: str) -> None:
    choices = find_choices(STEM + FORMS[form])
    assert choices is not None and choices.statement == STEM
    # Dollar signs and fonts around a value go later, with those around any other gold.
    assert {k: v.replace("\\text{ ", "").strip("${} ") for k, v in choices.options.items()} == VALUES


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ["C", "$C$", "\\text{(C)}", "\\textbf{(C)}", "(C)", "C.", "C\\\\\n\\noindent", "27"])
def test_the_letter_becomes_its_value(form: str, answer: str) -> None:
    from data.curation.integers import to_integer

    solved = resolve_choices(problem(STEM + FORMS[form], answer))
    assert isinstance(solved, Problem) and solved.statement == STEM
    solved = to_integer(solved)
    assert isinstance(solved, Problem) and solved.answer == "27"


@pytest.mark.parametrize(
    ("statement", "answer", "reason"),
    [
        ("Which of the following divides $n$?\n(A) 5 (B) 7 (C) 11", "7", "no sense without its options"),
        ("The mean of $S$ is closest to\n(A) 5 (B) 7 (C) 11", "B", "no sense without its options"),
        ("What could be the value of $x$?\n(A) 5 (B) 7 (C) 11", "B", "no sense without its options"),
        ("Which of the following divides $n$?", "7", "options that are not there"),
        ("Which ones?\n(A) 5 (B) 7 (C) 11", "A, C", "several letters"),
        ("Which ones?\n(A) 5 (B) 7 (C) 11", "\\text{A,C}", "several letters"),
        ("Find $x$.", "B", "no options in the statement"),
        ("Find $x$.\n(A) 5 (B) 7 (C) 11", "E", "without an option of that letter"),
        ("Find $x$.\n(A) 5 (B) 7 (C) none of these", "C", "refers to the others"),
        ("Find $x$.\n(A) 5 (B) 7 (C) 11", "8", "none of the options"),
    ],
)
def test_what_cannot_be_saved_is_rejected(statement: str, answer: str, reason: str) -> None:
    found = resolve_choices(problem(statement, answer))
    assert isinstance(found, Rejected) and reason in found.reason


@pytest.mark.parametrize(
    ("statement", "answer"),
    [
        # Conditions, points, angles and parts of a question are not options.
        ("Find how many numbers satisfy: (A) the first digit is 1, (B) the last is even, (C) all differ.", "54"),
        ("In triangle $ABC$ with $\\sin (A) + \\sin (B) + \\sin (C) = 2$ find the perimeter.", "5"),
        ("[asy] label(\"(A) 1\",A); label(\"(B) 2\",B); label(\"(C) 3\",C); [/asy] Find the area.", "3"),
        ("A graph $f$ has $f(A)=1$, $f(B)=2$, $f(C)=3$. What is $f(D)$?", "4"),
        ("(a) Find $x$. (b) Find $y$. (c) What is $x+y$?", "7"),
        ("How many of the following are prime: 3, 5, 9?", "2"),
        ("The set of all such numbers has the following properties. How many are there?", "12"),
    ],
)  # fmt: skip
def test_statements_without_options_stay_as_they_are(statement: str, answer: str) -> None:
    assert resolve_choices(problem(statement, answer)) == problem(statement, answer)


def test_a_question_that_only_sounds_like_a_choice_is_kept() -> None:
    text = "How many values $n$ can be the number of participants?"
    solved = resolve_choices(problem(text + "\n(A) 477 (B) 482 (C) 557", "557"))
    assert isinstance(solved, Problem) and solved.statement == text


def test_figures_and_notes_behind_the_options_stay() -> None:
    figure = '[asy]\nlabel("(A)",A);\n[/asy]'
    choices = find_choices(f"Find $x$.\n(A) 1\n(B) 2\n(C) 3\n\n{figure}\n\nNote: $x$ is real.")
    assert choices is not None and choices.options == {"A": "1", "B": "2", "C": "3"}
    assert choices.statement == f"Find $x$.\n{figure}\n\nNote: $x$ is real."


def test_instructions_about_letters_go() -> None:
    choices = find_choices("What curve is it?\n\n(A) Line\n(B) Circle\n\nEnter the letter of the correct option.")
    assert choices is not None and choices.statement == "What curve is it?"


@pytest.mark.parametrize("text", ["12", "AB", "a_1", "x", "", "K", "\\text{even}", "(A,B)"])
def test_no_letter(text: str) -> None:
    assert letter_of(text) is None
