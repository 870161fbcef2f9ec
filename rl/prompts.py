"""Problems as prompts in tokens, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.problems import load_problems
from data.spec import ProblemSpec
from data.templates import encode_prompt, render_prompt, resolve_template, uses_chat_template
from rl.recipe import SamplingSpec
from rl.recipe_io import RecipeError
from rl.rollout import SamplingParams
from rl.rollout.sampling import stream_key


@dataclass(frozen=True)
class Prompt:
    """A problem ready to be sampled from. `row` holds every column of the data set, for the rewards."""

    ids: list[int]
    text: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a data set and what the template put before the completion."""

    items: list[Prompt]
    prefill: str
    chat: bool  # rewards get conversations (TRL's convention for chat prompts), else texts
    dropped: int

    def __len__(self) -> int:
        return len(self.items)


def load_prompts(spec: ProblemSpec, tokenizer: Any, *, max_tokens: int, over_long: str = "drop") -> Prompts:
    """Loads and tokenises; prompts over max_tokens are dropped and counted, or refused."""
    template = resolve_template(spec.template)
    items, dropped = [], 0
    for row in load_problems(spec):
        ids = encode_prompt(row["prompt"], tokenizer, template)
        if len(ids) > max_tokens:
            if over_long == "error":
                raise RecipeError(
                    f"data: problem {row['id']} has {len(ids)} prompt tokens, over rollout.max_prompt_tokens "
                    f"({max_tokens}); raise it or set rollout.over_long_prompts: drop"
                )
            dropped += 1
            continue
        items.append(Prompt(ids, render_prompt(row["prompt"], tokenizer, template), dict(row)))
    if not items:
        raise RecipeError(f"data: no prompt is within max_prompt_tokens ({max_tokens}); {dropped} were longer")
    return Prompts(items, template.prefill, uses_chat_template(tokenizer, template), dropped)


def sampling_params(spec: SamplingSpec, n: int, seed: int) -> SamplingParams:
    """A recipe's sampling settings as the sampler takes them."""
    shared = {name: getattr(spec, name) for name in SamplingSpec.model_fields}
    return SamplingParams(n=n, seed=seed, **shared)


def permuted(position: int, count: int, seed: int) -> int:
    """Index of the data set at `position` of an endless stream: a fresh permutation each epoch."""
    epoch, place = divmod(position, count)
    return _permutation(count, stream_key(seed, epoch))[place]


_cache: dict[tuple[int, int], list[int]] = {}


def _permutation(count: int, key: int) -> list[int]:
    if (count, key) not in _cache:
        if len(_cache) > 3:
            _cache.clear()
        generator = torch.Generator().manual_seed(key >> 1)
        _cache[count, key] = torch.randperm(count, generator=generator).tolist()
    return _cache[count, key]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows -> columns, as reward functions take them."""
    return {name: [row.get(name) for row in rows] for name in (rows[0] if rows else {})}
