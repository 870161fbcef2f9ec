"""Cross-entropy of next tokens without full logits: a chunk of them exists at a time, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a target that is not in the loss


def cross_entropy(hidden_TC: Tensor, weight_VC: Tensor, target_T: Tensor, chunk: int = 1024) -> Tensor:
    """Mean negative log-probability in nats over targets that are not IGNORED; 0 if there are none."""
    kept = (target_T != IGNORED).nonzero()[:, 0]
    hidden_TC, target_T = hidden_TC[kept], target_T[kept]
    total = hidden_TC.new_zeros((), dtype=torch.float32)
    for hidden, target in zip(hidden_TC.split(chunk), target_T.split(chunk), strict=True):
        total = total + checkpoint(_summed, hidden, weight_VC, target, use_reentrant=False)
    return total / max(1, len(kept))


def _summed(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), target, reduction="sum")
