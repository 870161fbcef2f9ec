"""The answer verifier on rows of other verifiers, on random text, and on a megabyte of it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards.math import extract_answer, grade
from rewards.math.exact import parse_number

ROWS = Path(__file__).parents[1].parent / "shared" / "data" / "verifier"
needs_rows = pytest.mark.skipif(not ROWS.is_dir(), reason="shared verifier rows are not here")


# -- the shared rows -------------------------------------------------------------------------------

# Upstream wants no inequality where the gold is a set; it is the same set.
SAME_SET = {r"$-2 \\le x \\le 7$"}


def _rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with an expected verdict that does not depend on an option of their source."""
    for file in sorted(ROWS.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            note = row.get("note", "")
            if row["expected"] is not None and "SPECIAL" not in note and "KNOWN-WRONG" not in note:
                yield file.stem, row


@needs_rows
def test_no_false_reward_on_any_shared_row() -> None:
    rows = [(source, row) for source, row in _rows() if not row["expected"] and row["pred"] not in SAME_SET]
    assert len(rows) > 100
    paid = [(source, row["gold"], row["pred"]) for source, row in rows if grade(row["pred"], row["gold"]).correct]
    assert paid == []


@needs_rows
def test_plain_numbers_of_the_shared_rows_are_recognised() -> None:
    def plain(text: str) -> bool:
        boxed = extract_answer(text, mode="boxed")
        return parse_number(text if boxed is None else boxed) is not None

    rows = [row for _, row in _rows() if row["expected"] and plain(row["gold"]) and plain(row["pred"])]
    assert len(rows) > 100
    missed = [(row["gold"], row["pred"]) for row in rows if not grade(row["pred"], row["gold"]).correct]
    assert missed == []


# -- properties ------------------------------------------------------------------------------------

SPELLINGS = [
    lambda n: f"{n}",
    lambda n: f"{n}.0",
    lambda n: f"{n:,}",
    lambda n: f"{n:,}".replace(",", "{,}"),
    lambda n: f"{n:,}".replace(",", r"\,"),
    lambda n: f"{'-' if n < 0 else ''}00{abs(n)}",
    lambda n: rf"\text{{{n}}}",
    lambda n: rf"\frac{{{2 * n}}}{{2}}",
    lambda n: rf"${n}^\circ$",
    lambda n: rf"{n}\%",
    lambda n: rf"x = {n}",
    lambda n: rf"{n}\text{{ apples}}",
]
integers = st.integers(-(10**30), 10**30)


@given(integers, st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
def test_an_integer_equals_itself_in_any_two_spellings(n: int, spell: Any, spell_gold: Any) -> None:
    assert grade(rf"\boxed{{{spell(n)}}}", spell_gold(n)).correct


@given(integers, st.integers(1, 1000) | st.integers(1, 10**30), st.sampled_from(SPELLINGS))
def test_different_integers_never_match(n: int, distance: int, spell: Any) -> None:
    for response in (rf"\boxed{{{spell(n)}}}", f"The answer is {spell(n)}."):
        assert grade(response, str(n + distance)).verdict == "wrong"


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 50))
def test_fractions_compare_by_value(numerator: int, denominator: int, factor: int) -> None:
    response = rf"\boxed{{\frac{{{numerator * factor}}}{{{denominator * factor}}}}}"
    assert grade(response, f"{numerator}/{denominator}").correct
    assert not grade(response, f"{numerator + 1}/{denominator}").correct


PIECES = ["\\boxed{", "}", "{", "<think>", "</think>", "<answer>", "</answer>", "\\frac", "\\text{", "$",
          "\\", "73", ",", "=", "^", "answer is ", "10^", "e9", " or ", "\n", "%",
          "(", ")", "²", "٣"]  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30).map("".join)


@settings(max_examples=400)
@given(hostile, hostile)
@example("\ud800\\boxed{\udfff}", "\x00")
def test_no_text_raises(response: str, gold: str) -> None:
    for mode in ("any", "boxed"):
        judged = grade(response, gold, mode=mode)
        assert judged.correct == (judged.verdict == "correct")
        assert (judged.extracted is None) == (judged.verdict == "unparsed")


SIZE = 1_000_000
LONG = {
    "open braces": "{" * SIZE,
    "closing braces": "}" * SIZE,
    "unclosed boxes": r"\boxed{" * (SIZE // 7),
    "nested boxes": r"\boxed{" * (SIZE // 8) + "7" + "}" * (SIZE // 8),
    "joined boxes": r"\boxed{7}," * (SIZE // 10),
    "boxes inside a tag": "<answer>" + r"\boxed{7} x " * (SIZE // 12) + "</answer>",
    "backslashes": "\\" * SIZE,
    "open tags": "<answer>" * (SIZE // 8),
    "phrases": "answer is " * (SIZE // 10),
    "a phrase and blanks": "answer" + " " * SIZE,
    "digits": "1" * SIZE,
    "equations": r"\boxed{" + "a=" * (SIZE // 2) + "7}",
    "parentheses": r"\boxed{" + "(" * (SIZE // 2) + ")" * (SIZE // 2) + "}",
    "text groups": r"\boxed{" + r"\text{" * (SIZE // 6) + "}" * (SIZE // 6) + "}",
    "sentences": "answer is " + ". " * (SIZE // 2),
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_is_graded_in_linear_time(name: str) -> None:
    start = time.perf_counter()
    assert not grade(LONG[name], "73").correct
    assert not grade(r"\boxed{73}", LONG[name]).correct
    assert time.perf_counter() - start < 5  # about 0.6 s; a quadratic pass takes hours


def test_long_padding_and_long_integers_are_still_right() -> None:
    assert grade(r"\boxed{73}" + " " * SIZE, "73").correct
    assert grade(r"\boxed{" + "1" * 100_000 + "}", "1" * 100_000).correct
    assert not grade(r"\boxed{" + "1" * 100_000 + "}", "1" * 99_999 + "2").correct
