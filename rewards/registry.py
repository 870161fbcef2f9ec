"""Finding reward functions: built-ins by name, entry points by name, the user's own by path."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RewardError, did_you_mean
from .plugins import load_path

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .spec import RewardSpec

ENTRY_POINT_GROUP = "r1forge.rewards"

_BUILT_INS = {
    "math": ("rewards.accuracy", "math_reward"),
    "integer": ("rewards.accuracy", "integer_reward"),
    "code": ("rewards.code.reward", "code_reward"),
    "format": ("rewards.format", "format_reward"),
    "soft_overlong": ("rewards.length", "soft_overlong"),
    "cosine_length": ("rewards.length", "cosine_length"),
    "repetition": ("rewards.repetition", "repetition"),
    "language": ("rewards.language", "language"),
    "judge": ("rewards.judge", "judge"),
}

# What every call provides besides the data set's columns; `prefill` goes to functions that name it.
_PROVIDED = frozenset({"prompts", "completions", "completion_ids", "prefill"})
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Reward:
    """A reward function with its weight and bound arguments.

    fn: called with keywords prompts, completions, completion_ids and columns (TRL's convention); returns, or
        is async and returns, one float or None per completion. A function without **kwargs only receives the
        parameters it names.
    per_group: what it gives a completion depends on nothing outside the completions of the same prompt, so that it
        may be called with some groups now and others later.
    """

    name: str
    fn: Callable[..., Any]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    per_group: bool = False

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that can be passed by keyword."""
        return {p.name: p for p in inspect.signature(self.fn).parameters.values() if p.kind in _KEYWORD}

    @cached_property
    def takes_any_keyword(self) -> bool:
        kinds = {parameter.kind for parameter in inspect.signature(self.fn).parameters.values()}
        return inspect.Parameter.VAR_KEYWORD in kinds

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Parameters that only a data set column can fill."""
        return tuple(
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty and name not in _PROVIDED and name not in self.args
        )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise RewardError if a required column is not among `columns`."""
        present = list(columns)
        for name in self.required_columns:
            if name not in present:
                raise RewardError(
                    f"reward {self.name!r} needs a column (or an entry in args) named {name!r}"
                    f"{did_you_mean(name, present)}; columns: {', '.join(sorted(present)) or 'none'}"
                )


def available_rewards() -> list[str]:
    """Names that `load_reward` knows: built-ins and entry points of group "r1forge.rewards"."""
    return sorted({*_BUILT_INS, *_entry_points()})


def load_reward(spec: "str | Mapping[str, Any] | RewardSpec", *, base_dir: str | Path | None = None) -> Reward:
    """The reward that `spec` names: a name, a path "file.py:function", or a recipe entry.

    base_dir: where relative file paths start (default: the working directory).
    Raises RewardError for whatever is wrong with the entry, saying what would be right.
    """
    from .spec import RewardSpec

    if isinstance(spec, str):
        spec = {"path" if ":" in spec else "name": spec}
    parsed = spec if isinstance(spec, RewardSpec) else _parse(spec)
    if parsed.path is not None:
        name, fn = load_path(parsed.path, Path.cwd() if base_dir is None else Path(base_dir))
    else:
        name, fn = _load_name(parsed.name or "")
    if not callable(fn) or inspect.isclass(fn):
        raise RewardError(f"reward {name!r} is not a function but {_kind(fn)}")
    ours = parsed.path is None and name in _BUILT_INS
    per_group = ours if parsed.per_group is None else parsed.per_group
    reward = Reward(name, fn, parsed.weight, dict(parsed.args), per_group)
    _check_signature(reward)
    if ours:
        _check_args(reward)
    return reward


def _parse(spec: Mapping[str, Any]) -> "RewardSpec":
    from pydantic import ValidationError

    from .spec import RewardSpec

    try:
        return RewardSpec.model_validate(dict(spec))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(f"unknown key {key!r}{did_you_mean(key, RewardSpec.model_fields)}")
            else:
                problems.append(f"{key}: {problem['msg']}" if key else problem["msg"])
        raise RewardError(f"reward entry {dict(spec)!r}: {'; '.join(problems)}") from None


def _load_name(name: str) -> tuple[str, object]:
    if name in _BUILT_INS:
        module, function = _BUILT_INS[name]
        return name, getattr(import_module(module), function)
    entry_points = _entry_points()
    if name not in entry_points:
        known = available_rewards()
        near = did_you_mean(name, known)
        raise RewardError(f"unknown reward {name!r}{near}; available: {', '.join(known)}")
    try:
        return name, entry_points[name].load()
    except Exception as error:
        target = entry_points[name].value
        reason = f"{type(error).__name__}: {error}"
        raise RewardError(f"entry point {name!r} ({target}) failed to load: {reason}") from error


def _entry_points() -> "dict[str, EntryPoint]":
    from importlib import metadata

    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _check_signature(reward: Reward) -> None:
    try:
        parameters = reward.parameters
        signature = inspect.signature(reward.fn)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {reward.name!r} has no readable signature: {error}") from None
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise RewardError(
                f"reward {reward.name!r} has the positional-only parameter {parameter.name!r}; "
                "everything is passed by keyword"
            )
    accepted = [name for name in parameters if name not in _PROVIDED]
    for name in reward.args:
        if name in _PROVIDED:
            raise RewardError(f"reward {reward.name!r}: {name!r} is passed by the trainer, not by args")
        if name not in parameters and not reward.takes_any_keyword:
            raise RewardError(
                f"reward {reward.name!r} takes no argument {name!r}{did_you_mean(name, accepted)}; "
                f"it takes: {', '.join(accepted) or 'none'}"
            )


def _check_args(reward: Reward) -> None:
    """A built-in looks at its args before its batch, so an empty batch tells what is wrong before a run starts."""
    columns: dict[str, Any] = {}
    for name, parameter in reward.parameters.items():
        if name in reward.args or parameter.default is not parameter.empty:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            return  # a setting that is missing; `check_columns` asks for it
        columns[name] = []
    try:
        result = reward.fn(**columns, **reward.args)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {reward.name!r}: {error}") from error
    if inspect.iscoroutine(result):
        result.close()


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
