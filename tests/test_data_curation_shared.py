"""Curation of real contest and schoolbook problems, where the shared development data is at hand."""

import re
from collections import Counter
from pathlib import Path

import pytest

from data.curation.adapters import read_source
from data.curation.contamination import ContaminationIndex, EvaluationProblem
from data.curation.pipeline import Curated, apply_filters
from data.curation.problem import Problem
from data.curation.spec import ContaminationSpec, DuplicateSpec, FilterSpec, SourceSpec

MATH = Path(__file__).parents[1].parent / "shared" / "data" / "math"
pytestmark = pytest.mark.skipif(not MATH.is_dir(), reason="the shared development data is not on this machine")

FILES = {
    "amc": "ai-mo/aimo-validation-amc.jsonl",
    "aime": "deepscaler/train_aime_1983_2023.json",
    "math": "deepscaler/train_math.json",
    "odyssey": "odyssey-math/*.jsonl",
    "gsm8k": "gsm8k/train.jsonl",
}
# Loose on purpose, and not the code's own: two or more labels in a row, in any of the forms that the files have.
LABELS = re.compile(
    r"(?<![\w}])\(A\).{0,200}(?<![\w}])\(B\)|(?:^|\n)\W*A[.)].{0,200}\n\W*B[.)]|\\t?ext\w*\s*\{?\s*\(?A[.)]|\\mathrm\s*\{\(A\)|(?<![(\w])A\)\s.{0,200}(?<![(\w])B\)\s"
    r"|\b[Ll]etter of the correct",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def raw() -> dict[str, list[Problem]]:
    specs = (SourceSpec(name=name, path=str(MATH / file), aime=name == "aime") for name, file in FILES.items())
    return {spec.name: list(read_source(spec, lambda error: None)) for spec in specs}


@pytest.fixture(scope="module")
def curated(raw: dict[str, list[Problem]]) -> Curated:
    everything = [problem for problems in raw.values() for problem in problems]
    return apply_filters(Curated(everything), FilterSpec(), DuplicateSpec(), None)


def test_every_answer_is_an_integer(curated: Curated) -> None:
    assert len(curated.problems) > 13_000
    assert all(re.fullmatch(r"0|-?[1-9][0-9]*", problem.answer) for problem in curated.problems)
    assert all(0 <= int(problem.answer) <= 999 for problem in curated.problems if problem.source == "aime")
    kept = Counter(problem.source for problem in curated.problems)
    assert kept["amc"] == 83 and kept["aime"] == 975  # clean sources lose nothing
    # Odyssey: its 145 plain integers, and letters whose option is one.
    plain = [p for p in curated.problems if p.source == "odyssey" and re.match(r"\W*\d", p.raw_answer)]
    assert len(plain) >= 140 and kept["odyssey"] - len(plain) >= 15


def test_no_option_letters_are_left(curated: Curated) -> None:
    visible = [re.sub(r"\[asy\].*?\[/asy\]", "", p.statement, flags=re.DOTALL) for p in curated.problems]
    left = [text for text in visible if LABELS.search(text)]
    # One problem has three conditions (A), (B) and (C): they are part of it.
    assert [text for text in left if "satisfy the following conditions: (A)" not in text] == []
    assert len(left) <= 1


@pytest.mark.parametrize(
    "letters", [("Problem_149", "-44"), ("Problem_172", "20"), ("Problem_256", "170"), ("Problem_178", "8")]
)
def test_letters_became_values(letters: tuple[str, str], raw: dict[str, list[Problem]], curated: Curated) -> None:
    name, value = letters
    place = raw["odyssey"][int(name.removeprefix("Problem_")) - 1].place
    (found,) = [p for p in curated.problems if p.source == "odyssey" and p.place == place]
    assert found.answer == value


def test_planted_copies_among_real_problems(raw: dict[str, list[Problem]]) -> None:
    exam = raw["aime"][:200]
    index = ContaminationIndex(
        [EvaluationProblem("aime", p.place, p.statement) for p in exam], ContaminationSpec()
    )  # fmt: skip
    for problem in exam:
        text = problem.statement
        copies = [
            text,
            text.replace("$", "$ ").replace("\\frac", "\\dfrac").replace("\\left(", "(").replace("\\right)", ")"),
            re.sub(r"\$([^$]+)\$", r"\\(\1\\)", text).lower(),
            f"Answer with an integer from 0 to 999.\n\n{text}\n\nThink step by step, and box your answer.",
        ]
        for copy in copies:
            match = index.find(copy)
            assert match is not None, copy


def test_no_false_alarm_between_sources(raw: dict[str, list[Problem]]) -> None:
    """AMC 2022/23, Odyssey and GSM8K share no problem with any other file, and none is reported."""
    for name in ("amc", "odyssey", "gsm8k"):
        index = ContaminationIndex(
            [EvaluationProblem(name, p.place, p.statement) for p in raw[name]], ContaminationSpec()
        )  # fmt: skip
        others = [problem for source in raw if source != name for problem in raw[source]]
        assert [problem.place for problem in others if index.find(problem.statement) is not None] == []
