"""Real data sets, where the shared development data is at hand."""

from collections import Counter
from pathlib import Path

import pytest

from data import DataError, load_problems

MATH = Path(__file__).parents[1].parent / "shared" / "data" / "math"
needs_math = pytest.mark.skipif(not MATH.is_dir(), reason="the shared development data is not on this machine")


@needs_math
def test_gsm8k_train_file() -> None:
    problems = load_problems({"path": str(MATH / "gsm8k" / "train.jsonl")})
    assert len(problems) == 7473 and set(problems["kind"]) == {"integer"}
    assert problems["answer"][:3] == ["72", "10", "5"]
    assert all(str(int(answer)) == answer for answer in problems["answer"])
    assert not any("<<" in text or "####" in text for text in problems["reasoning"])
    assert len(set(problems["id"])) == 7473


@needs_math
def test_aime_and_amc_files() -> None:
    aime = load_problems({"path": str(MATH / "deepscaler" / "train_aime_1983_2023.json")})
    assert len(aime) == 975 and set(aime["kind"]) == {"integer"}
    assert all(0 <= int(answer) <= 999 and str(int(answer)) == answer for answer in aime["answer"])
    assert aime["year"][0] == 1983
    amc = load_problems({"path": str(MATH / "ai-mo" / "aimo-validation-amc.jsonl")})
    assert len(amc) == 83 and amc["answer"][0] == "142" and list(amc["source_id"])[:3] == [0, 1, 2]


@needs_math
def test_math_file_with_four_missing_answers() -> None:
    path = str(MATH / "deepscaler" / "train_math.json")
    with pytest.raises(DataError, match=r"train_math\.json row 887: the answer is missing"):
        load_problems({"path": path})
    problems = load_problems({"path": path, "on_error": "skip"})
    assert len(problems) == 7470 and set(problems["kind"]) == {"integer", "math"}


@needs_math
def test_odyssey_file_of_keyed_lines() -> None:
    problems = load_problems({"path": str(MATH / "odyssey-math" / "*.jsonl")})
    assert len(problems) == 387 and list(problems["key"])[:2] == ["Problem_1", "Problem_2"]
    assert not any("noindent" in text[-20:] for text in [*problems["problem"], *problems["answer"]])
    assert Counter(problems["kind"]) == {"integer": 145, "math": 242}
    assert {"reasoning", "label", "level"} <= set(problems.column_names)
