"""Naming and loading rewards, and every message for what can be wrong with an entry."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rewards import Reward, RewardError, RewardSpec, available_rewards, load_reward

BUILT_INS = ["code", "cosine_length", "format", "integer", "judge", "language", "math", "repetition", "soft_overlong"]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(
        "import math\n"
        "def brevity(completions, length, scale=1.0, **columns):\n"
        "    return [scale * n for n in length]\n"
        "def exact(completions, answer):\n"
        "    return [1.0 for _ in answer]\n"
        "def pinned(completions, /):\n"
        "    return []\n"
        "def _private(completions):\n"
        "    return []\n"
        "class Judge:\n"
        "    pass\n"
        "LIMIT = 3\n"
    )
    return tmp_path


def test_built_ins_load_by_name_with_args_and_weight() -> None:
    assert [name for name in available_rewards() if name in BUILT_INS] == BUILT_INS
    for name in BUILT_INS:
        assert load_reward(name).name == name
    reward = load_reward({"name": "soft_overlong", "weight": 2, "args": {"max_length": 10, "buffer": 5}})
    assert (reward.weight, reward.required_columns) == (2.0, ())
    assert load_reward(RewardSpec(name="math", weight=0.5)).weight == 0.5


def test_a_file_path_is_relative_to_base_dir(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_reward({"path": "mine.py:brevity", "args": {"scale": 3.0}}, base_dir=plugin)
    assert reward.name == "brevity"
    assert reward.fn(completions=["x"], length=[2], **reward.args) == [6.0]
    monkeypatch.chdir(plugin)
    assert load_reward("mine.py:brevity").fn is reward.fn


def test_a_dotted_path_is_imported(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plugin / "r1forge_test_pkg").mkdir()
    (plugin / "r1forge_test_pkg" / "inner.py").write_text("def one(completions):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(plugin))
    assert load_reward("r1forge_test_pkg.inner:one").fn(completions=["x"]) == [1.0]


class FakeEntryPoint:
    name = "politeness"
    value = "polite_pkg:reward"

    def __init__(self, result: Any) -> None:
        self.result = result

    def load(self) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def install(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    def entry_points(*, group: str) -> list[FakeEntryPoint]:
        return [FakeEntryPoint(result)] if group == "r1forge.rewards" else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_entry_points_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def polite(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    install(monkeypatch, polite)
    assert available_rewards() == sorted([*BUILT_INS, "politeness"])
    assert load_reward("politeness").fn is polite


def test_an_entry_point_that_fails_quotes_its_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ImportError("no module named torchfoo"))
    with pytest.raises(RewardError, match=r"politeness.*polite_pkg:reward.*ImportError: no module named torchfoo"):
        load_reward("politeness")


def test_unknown_name_gives_the_nearest_and_the_list() -> None:
    with pytest.raises(RewardError) as caught:
        load_reward("maths")
    assert "did you mean 'math'?" in str(caught.value)
    assert all(name in str(caught.value) for name in BUILT_INS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "exactly one of 'name' and 'path'"),
        ({"name": "math", "path": "a.py:b"}, "exactly one of 'name' and 'path'"),
        ({"name": "math", "wieght": 1.0}, "unknown key 'wieght'; did you mean 'weight'?"),
        ({"name": "math", "weight": "1"}, "weight: Input should be a valid number"),
        ({"name": "math", "weight": float("nan")}, "weight: "),
        ({"path": "mine.py"}, "must be 'file.py:function'"),
        ({"path": "mine.py:"}, "must be 'file.py:function'"),
        ({"path": "absent.py:brevity"}, "absent.py does not exist"),
        (
            {"path": "mine.py:brevety"},
            "did you mean 'brevity'?; functions there: Judge, brevity, exact, pinned",
        ),
        ({"path": "mine.py:LIMIT"}, "'LIMIT' is not a function but a int"),
        ({"path": "mine.py:Judge"}, "'Judge' is not a function but the class Judge"),
        ({"path": "mine.py:pinned"}, "positional-only parameter 'completions'"),
        ({"path": "mine.py:exact", "args": {"scale": 1}}, "takes no argument 'scale'; it takes: answer"),
        ({"path": "mine.py:brevity", "args": {"prompts": []}}, "'prompts' is passed by the trainer"),
        ({"name": "format", "args": {"stile": "think"}}, "takes no argument 'stile'; did you mean 'style'?"),
        ({"name": "format", "args": {"style": "xml"}}, "reward 'format': style must be one of"),
        ({"name": "soft_overlong", "args": {"max_length": 5, "buffer": 9}}, "need 0 < buffer <= max_length"),
        ({"name": "judge", "args": {"url": "ftp://host"}}, "url must be http://"),
        ({"name": "language", "args": {"target": "eng"}}, "unknown language code 'eng'; did you mean 'en'?"),
        ({"path": "no_such_package_here.sub:f"}, "no module named 'no_such_package_here'"),
    ],
)
def test_every_wrong_entry_says_what_is_wrong(plugin: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError) as caught:
        load_reward(entry, base_dir=plugin)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = x / 0\n", "bad.py:2: ZeroDivisionError: division by zero"),
        (
            "import nothing_of_the_kind\n",
            "bad.py:1: ModuleNotFoundError: No module named 'nothing_of_the_kind'",
        ),
        ("def f(:\n", "bad.py:1: SyntaxError: "),
        ("import json\n\njson.loads('{')\n", "bad.py:3: JSONDecodeError: "),
        ("raise SystemExit('no licence')\n", "bad.py:1: SystemExit: no licence"),
    ],
)
def test_a_failing_import_quotes_the_users_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(RewardError) as caught:
        load_reward("bad.py:f", base_dir=tmp_path)
    assert message in str(caught.value)
    (tmp_path / "bad.py").write_text("def f(completions):\n    return [0.5]\n")
    assert load_reward("bad.py:f", base_dir=tmp_path).fn(completions=["x"]) == [0.5]


def test_a_dotted_module_that_fails_quotes_its_own_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r1forge_test_broken.py").write_text("\nimport nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match=r"broken\.py:2: ModuleNotFoundError: .*nothing_of_the_kind"):
        load_reward("r1forge_test_broken:f")


def test_required_columns_are_parameters_without_default_that_args_leave_open() -> None:
    def judge(prompts, completions, completion_ids, answer, rubric, prefill, strict=True, **columns):  # type: ignore[no-untyped-def]
        return []

    assert Reward("judge", judge).required_columns == ("answer", "rubric")
    assert Reward("judge", judge, args={"rubric": "kind"}).required_columns == ("answer",)
    assert load_reward("math").required_columns == ("answer",)


def test_check_columns_names_the_missing_column_and_the_nearest() -> None:
    reward = load_reward("math")
    reward.check_columns(["answer", "source"])
    with pytest.raises(RewardError, match=r"'math' needs a column .*'answer'; did you mean 'answers'\?"):
        reward.check_columns(["answers", "source"])
    with pytest.raises(RewardError, match="columns: none"):
        reward.check_columns([])


def test_importing_the_package_stays_light() -> None:
    heavy = {"torch", "sympy", "pydantic", "numpy", "asyncio", "rl", "data", "model"}
    code = f"import sys, rewards, rewards.math; print(sorted({heavy!r} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
