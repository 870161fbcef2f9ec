"""The contract test: does a reward function keep what a run relies on?

    python -m rewards.contract my_rewards.py:brevity [--args '{"scale": 2}'] [--columns columns.json]

prints a line per check. Exit status: 0 all kept; 1 something is broken; 2 the function could not be loaded, or the
command line is wrong. In a test of your own:

    from rewards.contract import assert_reward_contract
    assert_reward_contract("my_rewards.py:brevity")

The function is called as in a run, by `rewards.score`: by keyword, with every column, awaited if it is async.
"""

import argparse
import copy
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compose import score
from .errors import RewardError
from .registry import Reward, load_reward

Spec = Callable[..., Any] | Reward | str | Mapping[str, Any]

_COMPLETIONS = {
    "an ordinary completion": "<think>\nFirst 70, then 3 more.\n</think>\n<answer>73</answer>",
    "another one": "Let me see: the answer is \\boxed{42}.",
    "an empty completion": "",
    "a completion of blanks": " \n\t ",
    "an unfinished thought": "<think>\nso, if we take",
    "a completion that is not ASCII": "因此答案是 ٧٣ → é́ 🧮\u200d\u202e\x00\x1b[31m",
    "unbalanced brackets": "\\boxed{{{[(<answer><think></answer> $ $$ \\[ ```python",
    "a very long completion": "so we try again \\frac{1}{2} " * 4_000,
}
_DEFAULT_VALUES = ("73", "42")
_ORDER = (5, 2, 7, 0, 3, 6, 1, 4)  # of a shuffled batch
_THREADS = 4


@dataclass(frozen=True)
class _Batch:
    prompts: list[Any]
    completions: list[str]
    ids: list[list[int]]
    columns: dict[str, list[Any]]

    def pick(self, order: Sequence[int]) -> "_Batch":
        return _Batch(
            [self.prompts[i] for i in order],
            [self.completions[i] for i in order],
            [self.ids[i] for i in order],
            {name: [values[i] for i in order] for name, values in self.columns.items()},
        )

    def copy(self) -> "_Batch":
        prompts, columns = copy.deepcopy((self.prompts, self.columns))
        return _Batch(prompts, list(self.completions), [list(ids) for ids in self.ids], columns)


def check_reward(
    reward: Spec, *, columns: Mapping[str, Sequence[Any]] | None = None, prompts: Sequence[str] | None = None
) -> list[str]:
    """What the reward breaks, one sentence each; an empty list if it keeps the contract.

    reward: a function, a loaded Reward, or what `load_reward` takes.
    columns: values for the data set columns that it reads, used in turn; required ones that are not given are filled
        with "73" and "42", as answers.
    prompts: texts to use in turn instead of a short question.
    Raises RewardError if it cannot be loaded, or a column or `prompts` is empty.
    """
    return [problem for _, problem in _results(_loaded(reward), columns, prompts) if problem]


def assert_reward_contract(
    reward: Spec, *, columns: Mapping[str, Sequence[Any]] | None = None, prompts: Sequence[str] | None = None
) -> None:
    """Raise AssertionError with everything that `check_reward` finds."""
    problems = check_reward(reward, columns=columns, prompts=prompts)
    if problems:
        raise AssertionError("the reward breaks its contract:\n" + "\n".join(f"- {problem}" for problem in problems))


def _loaded(reward: Spec) -> Reward:
    if isinstance(reward, Reward):
        return reward
    if callable(reward) and not isinstance(reward, str | Mapping):
        return Reward(getattr(reward, "__name__", type(reward).__name__), reward)
    return load_reward(reward)


# -- the checks ------------------------------------------------------------------------------------


def _results(
    reward: Reward, columns: Mapping[str, Sequence[Any]] | None, prompts: Sequence[str] | None
) -> list[tuple[str, str | None]]:
    """(what is checked, what is wrong with it or None) for each check."""
    batch = _batch(reward, columns or {}, prompts or ["What is 70 + 3?"])
    single = [(name, _single(reward, name, batch.pick([i]))) for i, name in enumerate(_COMPLETIONS)]
    if any(problem for _, problem in single):
        return single  # everything below would only say the same again
    checks: dict[str, Callable[[Reward, _Batch], str | None]] = {
        "a batch: one number or None for each": _whole_batch,
        "an empty batch": _empty_batch,
        "the same call again": _deterministic,
        "another order of the batch": _order,
        "chat messages": _chat,
        "columns that it does not know": _unknown_column,
        "its inputs are left as they are": _mutation,
        f"{_THREADS} threads at once": _threads,
    }
    results = single
    for name, check in checks.items():
        try:
            problem = check(reward, batch)
        except RewardError as error:  # it worked before, and does not any more
            problem = f"{name}: {error}"
        results.append((name, problem))
        if problem and check in (_whole_batch, _deterministic):
            break  # the checks that follow compare batches
    return results


def _single(reward: Reward, name: str, sample: _Batch) -> str | None:
    try:
        _values(reward, sample)
    except RewardError as error:
        return f"{name}: {error}{_hint(reward)}"
    return None


def _whole_batch(reward: Reward, batch: _Batch) -> str | None:
    return _raised(reward, batch, f"a batch of {len(batch.prompts)}")


def _empty_batch(reward: Reward, batch: _Batch) -> str | None:
    return _raised(reward, batch.pick([]), "an empty batch (a process may have no completions)")


def _deterministic(reward: Reward, batch: _Batch) -> str | None:
    first, second = _values(reward, batch), _values(reward, batch)
    if first != second:
        return f"the same call again gave other values: {_first_difference(first, second)}; a resumed run would differ"
    return None


def _order(reward: Reward, batch: _Batch) -> str | None:
    expected = [_values(reward, batch)[i] for i in _ORDER]
    found = _values(reward, batch.pick(_ORDER))
    if found != expected:
        return f"in another order the samples got other values: {_first_difference(expected, found)}"
    return None


def _chat(reward: Reward, batch: _Batch) -> str | None:
    chat = [[{"role": "user", "content": prompt}] for prompt in batch.prompts]
    problem = _raised(
        reward, _Batch(chat, batch.completions, batch.ids, batch.columns), "completions that are chat messages"
    )
    return problem and f"{problem} (rewards.messages.completion_text reads both kinds)"


def _unknown_column(reward: Reward, batch: _Batch) -> str | None:
    extra = {**batch.columns, "some_other_column": [{"any": "thing"}] * len(batch.prompts)}
    return _raised(reward, _Batch(batch.prompts, batch.completions, batch.ids, extra), "a column that it does not know")


def _mutation(reward: Reward, batch: _Batch) -> str | None:
    given = batch.copy()
    _values_in_place(reward, given)
    for name in ("prompts", "completions", "ids", "columns"):
        if getattr(given, name) != getattr(batch, name):
            shown = "completion_ids" if name == "ids" else name
            return f"it changed its input {shown}: other rewards and the training see the same lists"
    return None


def _threads(reward: Reward, batch: _Batch) -> str | None:
    expected = _values(reward, batch)
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(_values, reward, batch) for _ in range(_THREADS)]
    for future in futures:
        error = future.exception()
        if error is not None:
            return f"{_THREADS} threads at once: {error}"
        if future.result() != expected:
            return f"{_THREADS} threads at once: other values: {_first_difference(expected, future.result())}"
    return None


# -- calling ---------------------------------------------------------------------------------------


def _batch(reward: Reward, columns: Mapping[str, Sequence[Any]], prompts: Sequence[str]) -> _Batch:
    given = {**dict.fromkeys(reward.required_columns, _DEFAULT_VALUES), **columns}
    for name, values in {"prompts": prompts, **given}.items():
        if isinstance(values, str) or len(values) == 0:
            raise RewardError(f"{name}: give a list of at least one value")
    texts = list(_COMPLETIONS.values())
    return _Batch(
        prompts=[prompts[i % len(prompts)] for i in range(len(texts))],
        completions=texts,
        ids=[[1 + ord(letter) % 97 for letter in text[::4]] for text in texts],
        columns={name: [values[i % len(values)] for i in range(len(texts))] for name, values in given.items()},
    )


def _values(reward: Reward, batch: _Batch) -> list[float | None]:
    """What the reward gives for a copy of the batch, so that one that changes its inputs fails no other check."""
    return _values_in_place(reward, batch.copy())


def _values_in_place(reward: Reward, batch: _Batch) -> list[float | None]:
    scores = score([reward], batch.prompts, batch.completions, batch.ids, batch.columns)
    return scores.components[reward.name]


def _raised(reward: Reward, batch: _Batch, what: str) -> str | None:
    try:
        _values(reward, batch)
    except RewardError as error:
        return f"{what}: {error}"
    return None


def _hint(reward: Reward) -> str:
    filled = ", ".join(reward.required_columns)
    return f" (columns {filled} held made-up values unless you gave some: --columns, columns=)" if filled else ""


def _first_difference(expected: Sequence[object], found: Sequence[object]) -> str:
    names = list(_COMPLETIONS)
    i = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    return f"{expected[i]}, then {found[i]}" + (f" for {names[i]}" if len(expected) == len(names) else "")


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.contract", description="Test a reward function.")
    parser.add_argument("reward", help="FILE.py:function, package.module:function, or the name of a reward")
    parser.add_argument("--args", default="{}", help="its args, as JSON", metavar="JSON")
    parser.add_argument("--columns", type=Path, help="a JSON file of lists of values by column name", metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        columns = json.loads(options.columns.read_text(encoding="utf-8")) if options.columns else {}
        source = "path" if ":" in options.reward else "name"
        reward = load_reward({source: options.reward, "args": json.loads(options.args)})
        results = _results(reward, columns, None)
    except (OSError, ValueError) as error:  # RewardError and JSON's errors are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = [problem for _, problem in results if problem]
    for name, problem in results:
        print(f"BROKEN  {problem}" if problem else f"ok      {name}")
    kind = "async " if inspect.iscoroutinefunction(reward.fn) else ""
    print(f"{kind}reward {reward.name!r}: {f'{len(broken)} broken' if broken else 'keeps the contract'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
