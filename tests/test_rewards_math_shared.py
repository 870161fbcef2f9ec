"""Agreement with the cases of other verifiers, file by file. Reasons for what we refuse: docs/verifier.md."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards.math import grade_many

ROOT = Path(__file__).parents[1]
ROWS = ROOT.parent / "shared" / "data" / "verifier"
pytestmark = pytest.mark.skipif(not ROWS.is_dir(), reason="shared verifier rows are not here")

# Rows on which math-verify 0.9.0 gives the expected verdict in the setting that is best for the file.
MATH_VERIFY = {
    "areal": 41, "hendrycks_math": 14, "math_verify": 256, "nemo_skills": 29, "open_r1_trl": 14, "opencompass": 6,
    "rllm": 10, "slime": 13, "tinker": 14, "verifiers": 6, "verl": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def judged() -> list[tuple[str, dict[str, Any], bool]]:
    """(file, row, our verdict) for each row that sets one."""
    rows = []
    for file in sorted(ROWS.glob("*.jsonl")):
        if file.stem == "adversarial":
            continue
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if row["expected"] is not None and "SPECIAL" not in row.get("note", ""):
                rows.append((file.stem, row))
    grades = grade_many([(row["pred"], row["gold"]) for _, row in rows], timeout_s=30)
    return [(file, row, grade.correct) for (file, row), grade in zip(rows, grades, strict=True)]


def test_at_least_as_many_as_math_verify_in_each_file(judged: list[tuple[str, dict[str, Any], bool]]) -> None:
    agreed = Counter(file for file, row, correct in judged if correct == row["expected"])
    assert {file: (agreed[file], least) for file, least in MATH_VERIFY.items() if agreed[file] < least} == {}


def test_agreement_is_99_percent_overall(judged: list[tuple[str, dict[str, Any], bool]]) -> None:
    agreed = sum(correct == row["expected"] for _, row, correct in judged)
    assert len(judged) >= 400 and agreed >= 0.99 * len(judged)


def test_the_page_lists_exactly_the_disagreements(judged: list[tuple[str, dict[str, Any], bool]]) -> None:
    page = (ROOT / "docs" / "verifier.md").read_text(encoding="utf-8")
    section = page.split("### Where we disagree")[1].split("\n#")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert Counter(listed) == Counter(file for file, row, correct in judged if correct != row["expected"])


def test_the_page_shows_the_counts(judged: list[tuple[str, dict[str, Any], bool]]) -> None:
    page = (ROOT / "docs" / "verifier.md").read_text(encoding="utf-8")
    rows = Counter(file for file, _, _ in judged)
    agreed = Counter(file for file, row, correct in judged if correct == row["expected"])
    for file, least in MATH_VERIFY.items():
        assert f"| {file} | {rows[file]} | {agreed[file]} | {least} |" in page
