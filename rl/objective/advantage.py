"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1) and their variants."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave-one-out"]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-6,
) -> Tensor:
    """A_i = (r_i - b_i) / (s_i + eps), computed in float64, returned as float32 [N].

    rewards [N]: one number per completion; NaN means "not scored": left out of every mean, A = 0.
    group_ids [N]: completions of one prompt carry one id, in any order.
    baseline `mean`: b = mean of the group (2402.03300 eq. 3); `leave-one-out`: mean of the others
    (RLOO, 2402.14740 eq. 9).
    scale `group`: s = sample standard deviation (N-1) of the group; `batch`: of all scored completions;
    `none`: A_i = r_i - b_i (Dr. GRPO, 2503.20783 section 3.2).

    Whether a group is uniform is decided by exact comparison of its raw rewards, never by its standard
    deviation: rounding of the mean would be blown up to |A| near 1 by a small eps. A uniform group and one
    with fewer than two scored completions get exactly zero.
    """
    if rewards.shape != group_ids.shape or rewards.ndim != 1:
        raise ValueError(f"rewards and group_ids must be [N] alike, got {rewards.shape} and {group_ids.shape}")
    reward = rewards.detach().to(torch.float64)
    scored = ~torch.isnan(reward)
    _, group = torch.unique(group_ids, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    value = torch.where(scored, reward, 0.0)

    count = _per_group(scored.to(torch.float64), group, groups)
    total = _per_group(value, group, groups)
    mean = total / count.clamp(min=1)
    if baseline == "mean":
        base = mean[group]
    elif baseline == "leave-one-out":
        base = (total[group] - value) / (count[group] - 1).clamp(min=1)
    else:
        raise ValueError(f"baseline must be 'mean' or 'leave-one-out', not {baseline!r}")

    if scale == "group":
        squares = _per_group(torch.where(scored, (value - mean[group]) ** 2, 0.0), group, groups)
        spread = (squares / (count - 1).clamp(min=1)).sqrt()[group]
    elif scale == "batch":
        spread = value[scored].std(correction=1) if int(scored.sum()) > 1 else reward.new_ones(())
    elif scale == "none":
        spread = reward.new_tensor(1.0 - eps)
    else:
        raise ValueError(f"scale must be 'group', 'batch' or 'none', not {scale!r}")

    advantage = (value - base) / (spread + eps)
    flat = uniform_groups(rewards, group_ids)
    return torch.where(scored & ~flat, advantage, 0.0).to(torch.float32)


def uniform_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Bool [N]: the completion's group teaches nothing (all scored rewards equal, or fewer than two)."""
    reward = rewards.detach().to(torch.float64)
    scored = ~torch.isnan(reward)
    _, group = torch.unique(group_ids, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    low = reward.new_full((groups,), float("inf"))
    high = reward.new_full((groups,), float("-inf"))
    low = low.scatter_reduce(0, group[scored], reward[scored], "amin")
    high = high.scatter_reduce(0, group[scored], reward[scored], "amax")
    return ~(low < high)[group]


def _per_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64, device=values.device).index_add_(0, group, values)
