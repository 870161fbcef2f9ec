"""The sampler's log-probabilities are not quite the trainer's: measure it, and correct for it.

Other kernels, lower precision and expert routing make pi_sampler differ from pi_trainer for the same
weights. Tokens were drawn from pi_sampler; the weight w = pi_trainer / pi_sampler corrects for that.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rl.objective.kl import kl_estimate, saturate

Correction = Literal["none", "tis", "mis", "sequence-mask"]


def correction_weights(
    trainer_logp: Tensor,
    sampler_logp: Tensor,
    sequence_ids: Tensor,
    *,
    kind: Correction = "none",
    cap: float = 2.0,
    low: float = 0.5,
    high: float = 5.0,
) -> Tensor | None:
    """Weights w [T] without gradient, or None for `none`; log-probabilities [T] of the same tokens.

    Pass the tokens of the loss only: others would count in a sequence's mean.

    tis  min(w, cap): truncated importance sampling (Yao et al. 2025, "off-policy training").
    mis  w where low <= w <= high, else 0: masked importance sampling.
    sequence-mask  1 for sequences whose length-normalised ratio exp(mean_t log w) lies within [low, high],
         else 0.
    """
    log_weight = (trainer_logp - sampler_logp).detach()
    weight = torch.exp(saturate(log_weight))
    if kind == "none":
        return None
    if kind == "tis":
        return weight.clamp(max=cap)
    if kind == "mis":
        return torch.where((weight >= low) & (weight <= high), weight, 0.0)
    if kind == "sequence-mask":
        _, sequence = torch.unique(sequence_ids, return_inverse=True)
        count = int(sequence.max()) + 1 if len(sequence) else 0
        sums = torch.zeros(count, dtype=log_weight.dtype, device=log_weight.device)
        mean = sums.index_add(0, sequence, log_weight) / sums.index_add(0, sequence, torch.ones_like(log_weight))
        ratio = torch.exp(saturate(mean))[sequence]
        return ((ratio >= low) & (ratio <= high)).to(log_weight.dtype)
    raise ValueError(f"correction must be 'none', 'tis', 'mis' or 'sequence-mask', not {kind!r}")


def mismatch(trainer_logp: Tensor, sampler_logp: Tensor) -> dict[str, Tensor]:
    """Of tokens [T]: the sum of k3, the largest |difference| and how many tokens are off by over 10 %.

    Pass the tokens of the loss only.

    k3 is taken under the sampler, from whom the tokens come: KL(sampler || trainer), in nats.
    """
    trainer_logp = trainer_logp.detach()
    difference = (trainer_logp - sampler_logp).abs()
    zero = difference.new_zeros(())
    return {
        "k3": kl_estimate(sampler_logp, trainer_logp, "k3").sum(),
        "max": difference.max() if len(difference) else zero,
        "beyond_10pct": ((trainer_logp - sampler_logp).exp() - 1).abs().gt(0.1).sum(),
    }
