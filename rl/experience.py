"""Rollouts turned into experience: completions with rewards and advantages, ready to be packed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards import Reward, score
from rewards.compose import VERDICTS
from rewards.length import soft_overlong
from rl.objective import group_advantages, uniform_groups
from rl.policy.packing import Document
from rl.prompts import Prompt, Prompts, columns_of
from rl.recipe import AdvantageSpec, TruncationSpec
from rl.rollout import Sample


@dataclass
class Completion:
    """One sampled completion and what became of it."""

    prompt: Prompt
    group: int  # place of its prompt in the step, over all processes
    position: int  # place of its prompt in the stream of training prompts
    sample: Sample
    text: str
    reward: float = math.nan  # NaN: no reward applies
    task_reward: float = math.nan  # the same without the penalty for length
    components: dict[str, float | None] = field(default_factory=dict)
    verdict: str | None = None
    advantage: float = 0.0
    masked: bool = False  # truncated, and left out of the loss
    old_logp: Tensor | None = None  # by the trainer's policy before the step, where it is needed
    ref_logp: Tensor | None = None

    @property
    def truncated(self) -> bool:
        return self.sample.finish_reason == "length"

    @property
    def document(self) -> Document:
        routed = self.sample.routed_experts
        routed = None if routed is None else torch.from_numpy(routed)
        return Document(self.prompt.ids, self.sample.token_ids, group=self.group, routed=routed)

    def record(self, step: int) -> dict[str, Any]:
        """A row of the samples file."""
        return {
            "step": step,
            "group": self.group,
            "id": str(self.prompt.row.get("id")),
            "prompt_text": self.prompt.text,
            "completion": self.text,
            "answer": str(self.prompt.row.get("answer")),
            "reward": None if math.isnan(self.reward) else self.reward,
            "components": json.dumps(self.components),
            "verdict": self.verdict,
            "advantage": self.advantage,
            "finish_reason": self.sample.finish_reason,
            "tokens": len(self.sample.token_ids),
            "token_ids": self.sample.token_ids,
            "logprobs": self.sample.logprobs,
            "weights_version": self.sample.weights_version,
            "newest_version": self.sample.last_version,
        }


@dataclass
class Batch:
    """What a step learns from, as it was sampled and scored: this process's share."""

    completions: list[Completion]
    cursor: int  # place in the stream of prompts where the next step begins
    resampled: int = 0  # groups that dynamic sampling replaced
    drafts: dict[str, float] = field(default_factory=dict)  # `Acceptance.sums` of speculative decoding
    seconds: dict[str, float] = field(default_factory=dict)  # of `rollout`, and of `reward` in it


def completions_of(
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    positions: Sequence[int],
    samples: Sequence[Sequence[Sample]],
    tokenizer: Any,
) -> list[Completion]:
    return [
        Completion(prompt, group, position, sample, tokenizer.decode(sample.token_ids, skip_special_tokens=True))
        for prompt, group, position, row in zip(prompts, groups, positions, samples, strict=True)
        for sample in row
    ]


def assign_rewards(
    batch: list[Completion],
    rewards: Sequence[Reward],
    prompts: Prompts,
    truncation: TruncationSpec,
    max_tokens: int,
) -> None:
    """Scores a batch in place; DAPO's overlong penalty is one more component."""
    if not batch:
        return
    scores = score(
        rewards,
        prompts=[c.prompt.row["prompt"] if prompts.chat else c.prompt.text for c in batch],
        completions=[c.text for c in batch],
        completion_ids=[c.sample.token_ids for c in batch],
        columns={k: v for k, v in columns_of([c.prompt.row for c in batch]).items() if k != "prompt"},
        prefill=prompts.prefill,
    )
    for i, completion in enumerate(batch):
        completion.reward = completion.task_reward = scores.total[i]
        completion.components = {name: values[i] for name, values in scores.components.items()}
        completion.verdict = scores.verdicts[i] if scores.verdicts else None
        if truncation.mode == "mask":
            completion.masked = completion.truncated
        elif truncation.mode == "penalty":
            (penalty,) = soft_overlong([completion.sample.token_ids], max_length=max_tokens, buffer=truncation.buffer)
            completion.components["overlong"] = penalty
            completion.reward += penalty


def tally(batch: Sequence[Completion]) -> dict[str, float]:
    """What is logged of rewards, as sums over completions that add up over processes.

    verdict/V: completions with that verdict. reward/NAME and n/reward/NAME: sum and number of the reward's values.
    none/NAME: completions that it does not apply to, or had no score for (a judge that does not answer).
    """
    sums = {f"verdict/{verdict}": float(sum(c.verdict == verdict for c in batch)) for verdict in VERDICTS}
    for name in sorted({name for c in batch for name in c.components}):
        values = [value for c in batch if (value := c.components.get(name)) is not None]
        sums[f"reward/{name}"] = math.fsum(values)
        sums[f"n/reward/{name}"] = float(len(values))
        sums[f"none/{name}"] = float(len(batch) - len(values))
    return sums


def component_means(sums: dict[str, float]) -> dict[str, float]:
    """Takes `reward/NAME` and `n/reward/NAME` out of sums of `tally`; returns the means, NaN of nothing."""
    names = [name for name in sums if name.startswith("reward/")]
    pairs = {name: (sums.pop(name), sums.pop(f"n/{name}")) for name in names}
    return {name: total / count if count else math.nan for name, (total, count) in pairs.items()}


def assign_advantages(batch: list[Completion], spec: AdvantageSpec, gathered: list[list[tuple[int, float]]]) -> None:
    """Advantages in place. `gathered`: (group, reward) of every process, for the batch-wide deviation."""
    if spec.scale == "batch":
        flat = [pair for pairs in gathered for pair in pairs]
    else:
        flat = [(c.group, c.reward) for c in batch]
    if not batch:
        return
    rewards = torch.tensor([reward for _, reward in flat], dtype=torch.float64)
    groups = torch.tensor([group for group, _ in flat])
    values = group_advantages(rewards, groups, scale=spec.scale, baseline=spec.baseline, eps=spec.eps)
    by_group: dict[int, list[float]] = {}
    for group, value in zip(groups.tolist(), values.tolist(), strict=True):
        by_group.setdefault(group, []).append(value)
    for completion in batch:
        completion.advantage = by_group[completion.group].pop(0)


def uninformative(batch: Sequence[Completion], *, task: bool = False) -> set[int]:
    """Groups whose completions all have the same reward; `task`: before the penalty for length, as DAPO filters."""
    if not batch:
        return set()
    groups = torch.tensor([c.group for c in batch])
    rewards = [c.task_reward if task else c.reward for c in batch]
    flat = uniform_groups(torch.tensor(rewards, dtype=torch.float64), groups)
    return set(groups[flat].tolist())


def subtract_kl(batch: Sequence[Completion], coefficient: float) -> None:
    """KL in the reward: A -= beta (KL_i - mean of the group), with KL_i = sum over the completion of k1.

    After scaling, and from the task rewards' groups: otherwise a uniform group would be normalised to
    |A| near 1 from KL noise alone. Completions that no reward applies to are left out.
    """
    batch = [c for c in batch if not math.isnan(c.reward)]
    sums: dict[int, list[float]] = {}
    values = []
    for completion in batch:
        assert completion.old_logp is not None and completion.ref_logp is not None
        values.append(float((completion.old_logp - completion.ref_logp).sum()))
        sums.setdefault(completion.group, []).append(values[-1])
    for completion, value in zip(batch, values, strict=True):
        group = sums[completion.group]
        completion.advantage -= coefficient * (value - math.fsum(group) / len(group))
