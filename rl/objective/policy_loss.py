"""Policy losses on flat packed tokens: PPO/GRPO clip, GSPO and CISPO, with one global denominator.

T: the completion tokens of a micro-batch, of any number of sequences, in any order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rl.objective.kl import saturate

Kind = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["sequence", "token", "constant"]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    *,
    kind: Kind = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cap: float = 5.0,
    weights: Tensor | None = None,
    aggregation: Aggregation = "sequence",
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss to minimise (scalar), and metrics (masked sums over this micro-batch, to be divided by `tokens`).

    logp, old_logp [T]: log pi and log pi_old of the sampled tokens; only logp carries gradient.
    advantages [T], mask [T] (1 = a token of the loss), sequence_ids [T] (which completion a token is of).

    With rho_t = exp(logp - old_logp):
    ppo   -min(rho A, clip(rho, 1-clip_low, 1+clip_high) A)       (DeepSeekMath 2402.03300 eq. 3; clip-higher
          by clip_high > clip_low: DAPO 2503.14476 eq. 8). dual_clip c > 1: for A < 0 the loss is at most
          -c A (Ye et al. 1912.09729 eq. 5).
    gspo  the same with one ratio a sequence, exp(mean_t (logp - old_logp)), whose gradient reaches every
          token through its own log-probability (2507.18071 eq. 7 and 14).
    cispo -sg(min(rho, cap)) A logp: no token loses its gradient (MiniMax-M1 2506.13585 eq. 4).
    weights [T] multiply each token's loss (correction of the sampler/trainer mismatch), without gradient.

    Aggregation over a global optimizer batch of which this may be a part:
    sequence  sum over sequences of token means / denominator = number of sequences
    token     sum over tokens / denominator = number of tokens
    constant  sum over tokens / denominator = batch size * maximum length (Dr. GRPO 2503.20783)
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    keep = mask.to(torch.bool)
    log_ratio = torch.where(keep, logp - old_logp.detach(), 0.0)
    if kind == "gspo":
        log_ratio = _sequence_log_ratio(log_ratio, logp, keep, sequence_ids)
    ratio = torch.exp(saturate(log_ratio))

    if kind == "cispo":
        token_loss = -ratio.detach().clamp(max=cap) * advantages * torch.where(keep, logp, 0.0)
        clipped = ratio > cap
    elif kind in ("ppo", "gspo"):
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        token_loss = torch.maximum(-ratio * advantages, -bounded * advantages)
        clipped = (bounded - ratio) * advantages < 0
        if dual_clip is not None:
            ceiling = -dual_clip * advantages
            clipped = clipped | ((advantages < 0) & (token_loss > ceiling))
            token_loss = torch.where(advantages < 0, torch.minimum(token_loss, ceiling), token_loss)
    else:
        raise ValueError(f"loss kind must be 'ppo', 'gspo' or 'cispo', not {kind!r}")
    if weights is not None:
        token_loss = token_loss * weights.detach()

    loss = aggregate(token_loss, mask, sequence_ids, aggregation=aggregation, denominator=denominator)
    with torch.no_grad():
        metrics = {
            "tokens": keep.sum(),
            "clipped": (clipped & keep).sum(),
            "ratio": torch.where(keep, ratio, 0.0).sum(),
            "ratio_max": torch.where(keep, ratio, 0.0).max() if len(ratio) else ratio.new_zeros(()),
        }
    return loss, metrics


def aggregate(
    values: Tensor, mask: Tensor, sequence_ids: Tensor, *, aggregation: Aggregation, denominator: float
) -> Tensor:
    """Sums per-token values [T] to a scalar as described in `policy_loss`. Sequences are never split."""
    keep = mask.to(torch.bool)
    values = torch.where(keep, values, 0.0)
    if aggregation == "sequence":
        _, sequence = torch.unique(sequence_ids, return_inverse=True)
        count = int(sequence.max()) + 1 if len(sequence) else 0
        lengths = torch.zeros(count, device=values.device).index_add_(0, sequence, keep.to(torch.float32))
        values = values / lengths.clamp(min=1)[sequence]
    elif aggregation not in ("token", "constant"):
        raise ValueError(f"aggregation must be 'sequence', 'token' or 'constant', not {aggregation!r}")
    return values.sum() / denominator


def _sequence_log_ratio(log_ratio: Tensor, logp: Tensor, keep: Tensor, sequence_ids: Tensor) -> Tensor:
    """GSPO: value log s = mean_t (logp - old) of the token's sequence, gradient of the token's own logp.

    (GSPO-token form, 2507.18071 eq. 14: s_t = sg(s) * pi_t / sg(pi_t); with one advantage a sequence and
    `sequence` aggregation its gradient is that of eq. 5.)
    """
    _, sequence = torch.unique(sequence_ids, return_inverse=True)
    count = int(sequence.max()) + 1 if len(sequence) else 0
    sums = torch.zeros(count, dtype=log_ratio.dtype, device=log_ratio.device)
    total = sums.index_add(0, sequence, log_ratio.detach())
    tokens = sums.index_add(0, sequence, keep.to(log_ratio.dtype))
    mean = (total / tokens.clamp(min=1))[sequence]
    own = torch.where(keep, logp, 0.0)
    return mean + (own - own.detach())
