"""Pure functions on tensors: advantages, KL estimators, policy losses and mismatch corrections."""

from rl.objective.advantage import group_advantages, uniform_groups
from rl.objective.correction import correction_weights, mismatch
from rl.objective.kl import kl_estimate
from rl.objective.policy_loss import aggregate, policy_loss

__all__ = [
    "aggregate",
    "correction_weights",
    "group_advantages",
    "kl_estimate",
    "mismatch",
    "policy_loss",
    "uniform_groups",
]
