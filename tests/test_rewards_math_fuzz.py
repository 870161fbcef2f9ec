"""Properties of the verifier over generated answers: reflexive, symmetric, never confused about integers."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.math import grade
from rewards.math.pool import shared_pool

Text = st.SearchStrategy[str]
few = settings(max_examples=50, derandomize=True, deadline=None)

# -- answers by kind -------------------------------------------------------------------------------

integers = st.integers(-(10**9), 10**9)
small = st.integers(-20, 20)
positive = st.integers(1, 30)
symbols = st.sampled_from(["x", "y", "a", "n", r"\alpha", "x_1"])


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"


decimals = st.decimals(-1000, 1000, places=3).map(str)
fractions = st.builds(r"\frac{{{}}}{{{}}}".format, small, positive)
radicals = st.builds(
    lambda a, b, n, c: rf"\frac{{{a} {_signed(b)}\sqrt{{{n}}}}}{{{c}}}", small, st.integers(1, 20), positive, positive
)
roots = st.builds(r"{}\sqrt[{}]{{{}}}".format, positive, st.integers(3, 5), positive)
constants = st.sampled_from(
    [r"\frac{\pi}{3}", r"2\pi - 1", r"e^{2}", r"\ln 3", r"\log_2 5", r"\sin\frac{\pi}{7}", r"\cos 2",
     r"\arctan\frac{1}{3}", r"\pi^2 + e", r"\sqrt{2+\sqrt{3}}", r"2 + 3i", "5!", r"\binom{7}{3}", "2^{-98}"]
)  # fmt: skip
polynomials = st.builds(
    lambda s, a, b, c: f"{a}{s}^3 {_signed(b)}{s}^2 {_signed(c)}", symbols, st.integers(1, 20), small, small
)
quotients = st.builds(lambda s, a, b: rf"\frac{{{s} {_signed(a)}}}{{{s}^2 + {b}}}", symbols, small, positive)
functions = st.builds(
    lambda f, a, s: rf"{f}({a}{s}) + {s}", st.sampled_from([r"\sin", r"\cos", r"\ln", r"\exp"]), positive, symbols
)
scalars = st.one_of(integers.map(str), fractions, radicals, roots, constants, polynomials, quotients)

intervals = st.builds(
    lambda left, a, width, right: f"{left}{a}, {a + width}{right}",
    st.sampled_from("(["), small, positive, st.sampled_from(")]"),
)  # fmt: skip
unions = st.builds(r"(-\infty, {}) \cup [{}, \infty)".format, st.integers(-20, 0), positive)
sets = st.sets(small, min_size=1, max_size=5).map(lambda values: rf"\{{{', '.join(map(str, values))}\}}")
tuples = st.lists(scalars, min_size=2, max_size=4).map(lambda parts: f"({', '.join(parts)})")
matrices = st.integers(1, 3).flatmap(
    lambda columns: st.lists(st.lists(fractions, min_size=columns, max_size=columns), min_size=1, max_size=3).map(
        lambda rows: r"\begin{pmatrix}" + r" \\ ".join(" & ".join(row) for row in rows) + r"\end{pmatrix}"
    )
)
equations = st.builds("y = {}x {}".format, st.integers(2, 20), small.map(_signed))
inequalities = st.builds("x {} {}".format, st.sampled_from([r"\le", r"\ge", "<", ">"]), fractions)
plus_minus = st.builds(r"{} \pm \sqrt{{{}}}".format, small, positive)
words = st.sampled_from([r"\text{even}", r"\text{(C)}", r"\text{no solution}", r"\text{Monday}"])

KINDS: dict[str, Text] = {
    "integers": integers.map(str), "decimals": decimals, "fractions": fractions, "radicals": radicals,
    "roots": roots, "constants": constants, "polynomials": polynomials, "quotients": quotients,
    "functions": functions, "intervals": intervals, "unions": unions, "sets": sets, "tuples": tuples,
    "matrices": matrices, "equations": equations, "inequalities": inequalities, "plus-minus": plus_minus,
    "words": words,
}  # fmt: skip


# -- equal to itself -------------------------------------------------------------------------------


def _same(answer: str, gold: str) -> bool | None:
    """The workers' verdict alone: `grade` would already find equal strings equal."""
    return shared_pool().compare(answer, gold, limit_s=10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_equals_itself(kind: str) -> None:
    @few
    @given(KINDS[kind])
    def check(answer: str) -> None:
        assert grade(rf"so it is $\boxed{{{answer}}}$.", answer).correct
        assert grade(f"The final answer is ${answer}$.", rf"\boxed{{{answer}}}").correct
        assert _same(answer, answer) is True

    check()


@few
@given(st.lists(small, min_size=2, max_size=4), st.integers(2, 9), st.randoms(use_true_random=False))
def test_rewriting_a_polynomial_does_not_change_it(roots: list[int], scale: int, random: object) -> None:
    r"""Factors against the expanded sum, whose coefficients are computed here."""
    coefficients = [scale]
    for root in roots:
        shifted, scaled = [*coefficients, 0], [0, *(-root * c for c in coefficients)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    factored = f"{scale}" + "".join(f"(x {_signed(-root)})" for root in roots)
    degree = len(roots)
    expanded = " ".join(f"{_signed(c)}x^{{{degree - i}}}" for i, c in enumerate(coefficients)).lstrip("+ ")
    assert grade(rf"\boxed{{{factored}}}", expanded).correct
    assert grade(rf"\boxed{{{expanded} + x}}", factored).verdict == "wrong"


@few
@given(st.sets(small, min_size=2, max_size=5), small)
def test_sets_ignore_order_but_not_members(values: set[int], extra: int) -> None:
    forward = rf"\{{{', '.join(map(str, sorted(values)))}\}}"
    backward = rf"\{{{', '.join(map(str, sorted(values, reverse=True)))}\}}"
    assert grade(rf"\boxed{{{forward}}}", backward).correct
    changed = rf"\{{{', '.join(map(str, values ^ {extra}))}\}}"
    assert grade(rf"\boxed{{{changed}}}", forward).verdict == "wrong"


# -- symmetry and confusion ------------------------------------------------------------------------


# Kinds without decimals, whose rounding is judged by the gold's precision.
@few
@given(st.one_of(scalars, intervals, sets, tuples, matrices), st.one_of(scalars, intervals, sets, tuples, matrices))
def test_equality_of_exact_answers_is_symmetric(a: str, b: str) -> None:
    assert grade(rf"\boxed{{{a}}}", b).correct == grade(rf"\boxed{{{b}}}", a).correct


@few
@given(small, positive, small, positive)
def test_fractions_are_compared_by_value_in_both_directions(a: int, b: int, c: int, d: int) -> None:
    left, right = rf"\sqrt{{2}} + \frac{{{a}}}{{{b}}}", rf"\frac{{{c}}}{{{d}}} + \sqrt{{2}}"
    equal = a * d == b * c
    assert grade(rf"\boxed{{{left}}}", right).correct == equal
    assert grade(rf"\boxed{{{right}}}", left).correct == equal


COMPUTED: list[Callable[[int], str]] = [
    lambda n: f"{n - 70} + 70",
    lambda n: rf"\frac{{{3 * n}}}{{3}} \cdot 1",
    lambda n: rf"{'-' if n < 0 else ''}\sqrt{{{n * n}}}",
    lambda n: rf"({n})^1",
    lambda n: rf"\left({n}\right)",
    lambda n: rf"{n} + 0 \cdot x",
    lambda n: f"x = {n}",
    lambda n: rf"2 \cdot {n} - {n}" if n >= 0 else rf"2 \cdot ({n}) + {-n}",
]


@few
@given(integers, st.integers(1, 1000), st.sampled_from(COMPUTED))
def test_different_integers_never_match_even_if_one_must_be_computed(
    n: int, distance: int, spell: Callable[[int], str]
) -> None:
    assert grade(rf"\boxed{{{spell(n)}}}", str(n)).correct
    assert grade(rf"\boxed{{{spell(n)}}}", str(n + distance)).verdict == "wrong"
    assert grade(rf"\boxed{{{n + distance}}}", spell(n)).verdict == "wrong"


@few
@given(st.lists(integers, min_size=2, max_size=4, unique=True), st.sampled_from([", ", r" \text{ or } ", " or ", "; "]))
def test_several_values_never_equal_one_of_them(values: list[int], separator: str) -> None:
    answer = separator.join(map(str, values))
    for wrapped in (answer, rf"\{{{answer}\}}", f"({answer})"):
        for gold in map(str, values):
            assert not grade(rf"\boxed{{{wrapped}}}", gold).correct


# -- any text at all -------------------------------------------------------------------------------

PIECES = [r"\frac", r"\sqrt", r"\boxed{", "{", "}", "(", ")", "[", "]", "^", "_", "|", "!", "=", "<", ",", ";", "+",
          "-", r"\pm", r"\cup", r"\in", r"\sum_{k=1}^{n}", r"\int", r"\lim", r"\begin{pmatrix}", r"\end{pmatrix}", "&",
          r"\\", r"\left", r"\right.", r"\text{or}", r"\infty", "π", "²", "√", "٣", "x", "2", "10^9", "0", "1e9",
          "%", "'", "\x00", "\ud800"]  # fmt: skip
soup = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=20).map("".join)


@settings(few, max_examples=250)
@given(soup, soup)
def test_no_text_raises(answer: str, gold: str) -> None:
    for response in (rf"\boxed{{{answer}}}", answer):
        judged = grade(response, gold)
        assert judged.correct == (judged.verdict == "correct")
        assert (judged.extracted is None) == (judged.verdict == "unparsed")


@settings(few, max_examples=200)
@given(soup, integers)
def test_noise_after_a_number_is_never_worth_another_number(noise: str, n: int) -> None:
    assert not grade(rf"\boxed{{{n}}} {noise.replace('boxed', '')}", str(n + 1), mode="boxed").correct
