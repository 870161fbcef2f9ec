"""docs/rewards.md: every code block runs as printed, and its table is that of the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from data import load_problems
from recipes import grpo, metrics, run, write
from rewards import available_rewards, load_reward, score
from rewards.contract import check_reward
from rewards.registry import _BUILT_INS, ENTRY_POINT_GROUP
from rl.recipe_io import validate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def python_block(holding: str) -> str:
    (block,) = [block for block in blocks("python") if holding in block]
    return block


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's my_rewards.py in it, to work in."""
    (tmp_path / "my_rewards.py").write_text(python_block("def brevity"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_of_a_kind_that_is_tested_here() -> None:
    assert set(re.findall(r"^```(\w+)$", PAGE, re.MULTILINE)) == {"python", "yaml", "toml", "sh"}
    counts = {kind: len(blocks(kind)) for kind in ("python", "yaml", "toml", "sh")}
    assert counts == {"python": 3, "yaml": 4, "toml": 1, "sh": 2}


def test_the_reward_of_five_lines_trains(folder: Path) -> None:
    source = python_block("def brevity")
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 5
    rewards = yaml.safe_load(blocks("yaml")[1])["rewards"]
    recipe = grpo(folder / "run", rewards=rewards, grpo__steps=1)
    result = run(str(write(folder / "recipe.yaml", recipe)), cwd=folder)
    assert result.returncode == 0, result.stderr
    (line,) = metrics(folder / "run")
    assert line["reward/brevity"] > 0 and line["reward"] == pytest.approx(0.1 * line["reward/brevity"])
    commands = [shlex.split(command, comments=True)[1:] for command in blocks("sh")[1].strip().splitlines()]
    for command in commands[:2]:
        command[command.index("runs/NAME")] = str(folder / "run")
        listed = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert listed.returncode == 0, listed.stderr
    assert "--set" in commands[2]  # tested with a run that has evaluations in test_rewards_observability.py


def test_the_async_reward(folder: Path) -> None:
    (folder / "slow.py").write_text(python_block("async def"))
    reward = load_reward("slow.py:slow_service")
    assert score([reward], ["q"] * 3, ["a", "b", "c"], [[1]] * 3, {}).total == [1.0, 1.0, 1.0]
    assert check_reward(reward) == []


def test_the_contract_command_and_its_test(folder: Path) -> None:
    (command,) = blocks("sh")[0].strip().splitlines()
    result = run_python(shlex.split(command)[1:], folder)
    assert result.returncode == 0 and "keeps the contract" in result.stdout, result.stdout + result.stderr
    names: dict[str, Any] = {}
    exec(compile(python_block("def test_brevity"), "docs/rewards.md", "exec"), names)
    names["test_brevity"]()


def run_python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def test_the_recipes_are_valid_and_their_rewards_load(folder: Path) -> None:
    for block in blocks("yaml"):
        recipe = validate(grpo(folder / "run", rewards=yaml.safe_load(block)["rewards"]))
        assert [load_reward(spec).weight for spec in recipe.rewards] == [spec.weight for spec in recipe.rewards]


def test_the_code_problems_are_read(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("yaml") if "data:" in block]
    spec = yaml.safe_load(block)["data"]
    row = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "code": "add = sum"}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row))
    problems = load_problems({**spec, "hub": None, "path": str(tmp_path / "mbpp.jsonl")})
    assert problems[0]["tests"] == row["test_list"] and row["test_list"][0] in problems[0]["prompt"][0]["content"]


def test_the_entry_point_group() -> None:
    (entries,) = tomllib.loads(blocks("toml")[0])["project"]["entry-points"].items()
    assert entries == (ENTRY_POINT_GROUP, {"politeness": "my_package.rewards:politeness"})


def test_the_table_lists_every_built_in_with_its_args_and_defaults() -> None:
    section = PAGE.partition("## Built in")[2]
    rows = {row[0]: row[2] for row in re.findall(r"^\| `(\w+)` \|(.*?)\|(.*?)\|.*\|$", section, re.MULTILINE)}
    listed = {name for name in rows if name in available_rewards()}
    assert listed == set(_BUILT_INS)
    for name in listed - {"integer", "judge", "language", "code"}:  # these rows say more than args and defaults
        written = dict(re.findall(r"`(\w+)`(?: \w)? ?(?:\(([^;)]*)[;)])?", rows[name]))
        assert set(written) - {"max_length", "buffer"} == set(settings(name)) - {"max_length", "buffer"}, name
        for arg, default in settings(name).items():
            if default is not inspect.Parameter.empty:
                assert literal(written[arg]) == default, (name, arg)


@pytest.mark.parametrize("name", ["code", "judge"])
def test_the_table_of_a_reward_lists_its_args_and_defaults(name: str) -> None:
    table = PAGE.partition(f"\n### {name}\n")[2].partition("| arg | default | meaning |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|.*\|$", table, re.MULTILINE)
    written = {}
    for names, values in rows:
        written |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    assert set(written) == set(settings(name))
    for arg, value in written.items():
        default = settings(name)[arg]
        if isinstance(default, str | int | float) and not (name == "judge" and arg == "rubric"):
            written_default = (
                {"false": False, "true": True}.get(value) if isinstance(default, bool) else literal(value.strip("`"))
            )
            assert written_default == default, arg


def settings(name: str) -> dict[str, Any]:
    """The keyword-only parameters of a built-in reward, with their defaults."""
    parameters = inspect.signature(load_reward(name).fn).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "prefill"}


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.replace("−", "-"))
    except (ValueError, SyntaxError):
        return text
