"""Normalisation keeps what carries meaning, and the split depends on nothing but the statement."""

import pytest

from data import held_out, normalise_statement


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Find  x.\n", "find x"),
        ("Tom, who is 5, sleeps.", "Tom who is 5 sleeps"),
        ("$3 + 4$", "3+4"),
        ("\\( x \\, y \\)", "$x y$"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("10{,}000", "10,000"),
        ("x\u00b2 + 1", "x^2+1"),
        ("\uff11\uff12", "12"),
        ("5 \u2212 3", "5 - 3"),
        ("Tom\u2019s", "Tom's"),
        ("\u00bd", "1/2"),
        ("a\u00a0b", "a b"),
    ],
)
def test_typesetting_does_not_matter(a: str, b: str) -> None:
    assert normalise_statement(a) == normalise_statement(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3.5", "35"), ("1,2", "12"), ("3:4", "34"), ("5!", "5"), ("-3", "3"), ("3+4", "3-4"), ("3+4", "34"),
        ("2*3", "2/3"), ("2\u00b3", "23"), ("1\u00bd", "11/2"), ("x_1", "x1"), ("(1)", "1"), ("x<3", "x>3"),
        (".5", "5"),
        ("\\leftarrow", "arrow"), ("5%", "5"), ("\\{1\\}", "\\[1\\]"), ("a b", "ab"),
    ],
)  # fmt: skip
def test_meaning_stays(a: str, b: str) -> None:
    assert normalise_statement(a) != normalise_statement(b)


def test_normalising_twice_changes_nothing() -> None:
    for text in (
        "Find $x$, if $x\u00b2 = 1{,}024$...",
        "1 , 2 , 3",
        "\\left( a \\right) ; 3 . 5",
        "x \u2212\u00bd",
    ):
        once = normalise_statement(text)
        assert normalise_statement(once) == once


def test_split_is_the_same_on_every_machine() -> None:
    # Literal expectations: a change of the hash or the normalisation would move problems between the sides.
    sides = [held_out(f"What is {n} + {n}?", 0.5, "r1forge") for n in range(16)]
    assert "".join("HT"[not side] for side in sides) == "TTHHHHHHHHHHTTTT"


def test_split_has_the_asked_share_and_keeps_duplicates_together() -> None:
    statements = [f"What is {n} times 3?" for n in range(4000)]
    held = [s for s in statements if held_out(s, 0.1, "a")]
    assert 320 < len(held) < 480
    assert all(held_out(s.upper().replace(" ", "  "), 0.1, "a") for s in held)
    assert {s for s in statements if held_out(s, 0.05, "a")} < set(held)
    assert set(held) != {s for s in statements if held_out(s, 0.1, "b")}
