"""Estimators of KL(pi || pi_ref) from samples of pi (Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

# exp() of a log-ratio beyond this is no longer a useful number in float32 (e^40 = 2e17).
LOG_RATIO_LIMIT = 40.0


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: Estimator = "k3", mask: Tensor | None = None) -> Tensor:
    """Per-token estimate [T], in nats, from log pi and log pi_ref of the sampled tokens [T].

    Tokens outside the mask give 0, whatever their log-probabilities, and get no gradient.

    k1 = log pi - log pi_ref: unbiased, any sign. k2 = k1^2 / 2: biased, its gradient is the KL's on-policy.
    k3 = pi_ref/pi - log(pi_ref/pi) - 1: unbiased, never negative (DeepSeekMath 2402.03300 eq. 4).
    k3 computes pi_ref/pi as exp of a log-ratio saturated at +-LOG_RATIO_LIMIT with the gradient passed
    through: the value stays finite and a token that has drifted that far is still pulled back.
    """
    k1 = logp - ref_logp
    if mask is not None:
        k1 = torch.where(mask.to(torch.bool), k1, 0.0)
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1.square()
    if kind == "k3":
        return torch.expm1(saturate(-k1)) + k1
    raise ValueError(f"kl estimator must be 'k1', 'k2' or 'k3', not {kind!r}")


def saturate(log_ratio: Tensor, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """Value clamped to +-limit, gradient as if it were not: d/dx = 1 everywhere.

    A plain clamp has gradient zero exactly where the policies have drifted most. (x + (clamp(x) - x).detach()
    would lose the value itself to cancellation from about 1e8 on.)
    """
    slope = torch.where(torch.isfinite(log_ratio), log_ratio, 0.0)
    return log_ratio.detach().clamp(-limit, limit) + (slope - slope.detach())
