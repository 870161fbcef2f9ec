"""Rollouts that are collected and not yet trained on, as plain values for a checkpoint.

Prompts and texts are not among them: the place in the stream of prompts and the token ids give them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from rl.experience import Batch, Completion, completions_of
from rl.prompts import Prompt
from rl.rollout import Sample

_KEPT = ("group", "position", "reward", "task_reward", "components", "verdict", "masked")


def plain(batch: Batch) -> dict[str, Any]:
    """This process's part of a step."""
    return {
        "completions": [
            {**{name: getattr(c, name) for name in _KEPT}, "sample": _plain_sample(c.sample)} for c in batch.completions
        ],
        "cursor": batch.cursor,
        "resampled": batch.resampled,
        "drafts": dict(batch.drafts),
        "seconds": dict(batch.seconds),
    }


def restored(
    parts: Sequence[Mapping[str, Any]], rank: int, world: int, prompt_at: Callable[[int], Prompt], tokenizer: Any
) -> Batch:
    """The part of process `rank` of `world`, from the parts of the processes that saved the step: others, perhaps.

    Counts that are summed over processes go to the first one.
    """
    rows = [row for part in parts for row in part["completions"] if row["group"] % world == rank]
    rows.sort(key=lambda row: row["group"])  # stable: samples of a group stay in their order
    first = parts[0]
    drafts: dict[str, float] = {}
    for part in parts if rank == 0 else ():
        for name, count in part["drafts"].items():
            drafts[name] = drafts.get(name, 0.0) + count
    return Batch(
        completions=[_completion(row, prompt_at(row["position"]), tokenizer) for row in rows],
        cursor=first["cursor"],
        resampled=sum(part["resampled"] for part in parts) if rank == 0 else 0,
        drafts=drafts,
        seconds=dict(first["seconds"]),
    )


def _completion(row: Mapping[str, Any], prompt: Prompt, tokenizer: Any) -> Completion:
    (completion,) = completions_of([prompt], [row["group"]], [row["position"]], [[_sample(row["sample"])]], tokenizer)
    for name in _KEPT:
        setattr(completion, name, row[name])
    return completion


def _plain_sample(sample: Sample) -> dict[str, Any]:
    """Tensors in place of long lists, which a checkpoint would store number by number."""
    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    values["token_ids"] = torch.tensor(sample.token_ids, dtype=torch.int32)
    values["logprobs"] = torch.tensor(sample.logprobs, dtype=torch.float64)
    routed = sample.routed_experts
    values["routed_experts"] = None if routed is None else torch.from_numpy(np.ascontiguousarray(routed))
    return values


def _sample(values: Mapping[str, Any]) -> Sample:
    routed = values["routed_experts"]
    return Sample(
        **{
            **values,
            "token_ids": values["token_ids"].tolist(),
            "logprobs": values["logprobs"].tolist(),
            "routed_experts": None if routed is None else routed.numpy(),
        }
    )
