"""Scoring completions with several rewards: one weighted sum per completion.

    total_i = sum of weight_k * r_k,i over the rewards k with r_k,i not None; NaN if there is none

The calling convention is TRL's, so that existing reward functions plug in unchanged: everything is passed by
keyword, and for chat prompts each completion is a list with one assistant message.
"""

import math
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from inspect import isawaitable, iscoroutine
from numbers import Real
from typing import Any

from .errors import RewardError
from .messages import Completion, is_conversation
from .registry import Reward

# What a reward that judges answers says of each (`rewards.math.grade.Verdict`), in the order of reports.
VERDICTS = ("correct", "wrong", "unparsed", "timeout")

# Names that a column cannot take over.
_RESERVED = ("prompts", "completions", "completion_ids", "prefill")


@dataclass(frozen=True)
class Scores:
    """What `score` returns; every list has one entry per completion.

    total: the weighted sum, NaN where no reward applies.
    components: unweighted values by reward name; a repeated name gets a suffix (`brevity`, `brevity_2`).
    verdicts: of the first reward that judges answers (`math`, `integer`), None without one; an entry is None
        where that reward does not apply.
    failures: indices of the completions that no reward applies to.
    """

    total: list[float]
    components: dict[str, list[float | None]]
    verdicts: list[str | None] | None
    failures: list[int]

    def verdict_counts(self) -> dict[str, int]:
        """How many completions were judged correct, wrong, unparsed, timeout; empty without verdicts."""
        if self.verdicts is None:
            return {}
        counts = Counter(self.verdicts)
        return {verdict: counts[verdict] for verdict in VERDICTS}


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    *,
    prefill: str = "",
) -> Scores:
    """Score completions. Entry i of every argument, and of every column, belongs to the same sample.

    completions: texts (wrapped as messages if the prompts are conversations), or messages.
    prefill: text of the chat template that the completions continue; rewards with a parameter of that name
        receive it.
    Raises RewardError, naming the reward, if one raises or returns something else than one finite number or
    None per completion: a run must not go on with silent zeros.
    """
    _check_lengths(prompts, completions, completion_ids, columns)
    for reward in rewards:
        reward.check_columns(columns)
    if prompts and is_conversation(prompts[0]):
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in completions
        ]
    provided = {
        **{name: values for name, values in columns.items() if name not in _RESERVED},
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "prefill": prefill,
    }
    results = _call_all(rewards, provided)
    returned = [_as_list(reward, result, len(prompts)) for reward, result in zip(rewards, results, strict=True)]
    labels = _labels(rewards)
    components = {
        label: [_number(reward, i, value) for i, value in enumerate(values)]
        for label, reward, values in zip(labels, rewards, returned, strict=True)
    }
    weights = {label: reward.weight for label, reward in zip(labels, rewards, strict=True)}
    total = [_weighted_sum(weights, components, i) for i in range(len(prompts))]
    return Scores(
        total=total,
        components=components,
        verdicts=_verdicts(returned),
        failures=[i for i, value in enumerate(total) if math.isnan(value)],
    )


def _check_lengths(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    lengths = {"completions": len(completions), "completion_ids": len(completion_ids)}
    lengths |= {f"column {name!r}": len(values) for name, values in columns.items()}
    for name, length in lengths.items():
        if length != len(prompts):
            raise RewardError(f"{name} has {length} entries for {len(prompts)} prompts")


# -- calling ---------------------------------------------------------------------------------------


def _call_all(rewards: Sequence[Reward], provided: Mapping[str, Any]) -> list[Any]:
    """Call every reward; await those that return awaitables together."""
    results: list[Any] = []
    try:
        for reward in rewards:
            try:
                results.append(reward.fn(**_keywords(reward, provided)))
            except Exception as error:
                raise _failed(reward, error) from error
    except RewardError:
        for result in results:
            if iscoroutine(result):
                result.close()  # never to be awaited: do not warn about it on top
        raise
    waiting = [i for i, result in enumerate(results) if isawaitable(result)]
    if waiting:
        finished = _run([_guard(rewards[i], results[i]) for i in waiting])
        for i, result in zip(waiting, finished, strict=True):
            results[i] = result
    return results


def _keywords(reward: Reward, provided: Mapping[str, Any]) -> dict[str, Any]:
    """All that is provided for functions with **kwargs, else what the function names. `args` win."""
    names = reward.parameters
    if reward.takes_any_keyword:
        passed = {name: value for name, value in provided.items() if name != "prefill" or name in names}
    else:
        passed = {name: value for name, value in provided.items() if name in names}
    return {**passed, **reward.args}


async def _guard(reward: Reward, result: Awaitable[Any]) -> Any:
    try:
        return await result
    except Exception as error:
        raise _failed(reward, error) from error


def _run(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await all concurrently in one event loop, in a helper thread if this one already runs a loop."""
    import asyncio  # here, because importing it takes longer than the rest of the package
    from concurrent.futures import ThreadPoolExecutor

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: asyncio.run(gather())).result()


def _failed(reward: Reward, error: Exception) -> RewardError:
    return RewardError(f"reward {reward.name!r} raised {type(error).__name__}: {error}")


# -- checking and adding ---------------------------------------------------------------------------


def _as_list(reward: Reward, result: Any, expected: int) -> list[Any]:
    values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
    if not isinstance(values, list | tuple):
        raise RewardError(f"reward {reward.name!r} returned a {type(result).__name__}, not a list")
    if len(values) != expected:
        raise RewardError(f"reward {reward.name!r} returned {len(values)} values for {expected} completions")
    return list(values)


def _number(reward: Reward, index: int, value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item"):
        value = value.item()  # array and tensor scalars
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"reward {reward.name!r} returned {value!r} for completion {index}; "
            "it must be a finite number, or None where it does not apply"
        )
    return number


def _labels(rewards: Sequence[Reward]) -> list[str]:
    seen: Counter[str] = Counter()
    labels = []
    for reward in rewards:
        seen[reward.name] += 1
        labels.append(reward.name if seen[reward.name] == 1 else f"{reward.name}_{seen[reward.name]}")
    return labels


def _weighted_sum(weights: Mapping[str, float], components: Mapping[str, Sequence[float | None]], index: int) -> float:
    values = [(weights[name], column[index]) for name, column in components.items()]
    applied = [weight * value for weight, value in values if value is not None]
    return math.fsum(applied) if applied else math.nan


def _verdicts(returned: Sequence[Sequence[Any]]) -> list[str | None] | None:
    """The verdicts that a reward's values carry (see `accuracy.JudgedScore`)."""
    for values in returned:
        verdicts = [getattr(value, "verdict", None) for value in values]
        if any(verdict is not None for verdict in verdicts):
            return verdicts
    return None
