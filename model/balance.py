"""Balancing the experts' loads without an auxiliary loss (arXiv 2408.15664), and what to watch of it.

The decoder counts every expert's tokens while it trains. After each optimizer step the trainer calls `update_biases`
once: overloaded experts become less eligible, underloaded ones more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.moe import MixtureOfExperts
from model.router import updated_bias

SHARES_LISTED = 2048  # experts of all layers together, above which a line of metrics would be long


@torch.no_grad()
def take_loads(model: Any, group: Any = None) -> dict[int, Tensor]:
    """Layer -> tokens per expert [E] int64 since the last call, summed over the processes of `group`; starts anew."""
    decoder = getattr(model, "model", model)
    total_LE = _taken(decoder.load_LE, group)
    return {layer: total_LE[layer] for layer, _ in _mixtures(decoder)}


@torch.no_grad()
def take_entropies(model: Any, group: Any = None) -> dict[int, float]:
    """Layer -> Σ over tokens of the router's entropy (nats) since the last call, over all processes; starts anew."""
    decoder = getattr(model, "model", model)
    total_L = _taken(decoder.entropy_L, group)
    return {layer: float(total_L[layer]) for layer, _ in _mixtures(decoder)}


@torch.no_grad()
def update_biases(model: Any, speed: float, group: Any = None) -> dict[str, Any]:
    """b += speed · sign(mean load − load) in every layer; returns `metrics`. speed 0 (as in RL) only counts.

    A layer without tokens keeps its biases.
    """
    decoder = getattr(model, "model", model)
    found, entropies = take_loads(decoder, group), take_entropies(decoder, group)
    for layer, mixture in _mixtures(decoder):
        if speed and found[layer].any():
            bias = mixture.gate.e_score_correction_bias
            bias.copy_(updated_bias(bias, found[layer], speed))
    found_metrics = metrics(found)
    for layer, load in found.items():
        if load.any():
            tokens = float(load.sum()) / decoder.config.num_experts_per_tok
            found_metrics[f"moe/router_entropy/{layer}"] = entropies[layer] / tokens
    return found_metrics


def metrics(load: dict[int, Tensor]) -> dict[str, Any]:
    """Per layer: the largest load over the mean one (1 is perfect), the share of the busiest and the idlest expert, the
    entropy of the loads in nats (ln E is uniform) and, while they are few, the share of every expert, as a list."""
    found: dict[str, Any] = {}
    listed = sum(len(load_E) for load_E in load.values()) <= SHARES_LISTED
    for layer, load_E in load.items():
        total = int(load_E.sum())
        if not total:
            continue
        share = load_E.double() / total
        found[f"moe/max_over_mean/{layer}"] = float(share.max() * len(share))
        found[f"moe/busiest/{layer}"] = float(share.max())
        found[f"moe/idlest/{layer}"] = float(share.min())
        found[f"moe/load_entropy/{layer}"] = float(torch.special.entr(share).sum())
        if listed:
            found[f"moe/share/{layer}"] = [round(x, 5) for x in share.tolist()]
    return found


def _taken(count: Tensor, group: Any) -> Tensor:
    """A running count, summed over the processes of `group`; it starts anew."""
    total = count.clone()
    count.zero_()
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def _mixtures(decoder: Any) -> Iterator[tuple[int, MixtureOfExperts]]:
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer.mlp, MixtureOfExperts):
            yield index, layer.mlp
