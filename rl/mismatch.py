"""Warnings, with advice, when sampler and trainer disagree beyond `rollout.warn_mismatch`."""

from __future__ import annotations

from collections.abc import Mapping

from rl.recipe import GRPORecipe

_UNITS = {
    "k3": "mean k3 {:.2g} nats per token",
    "max": "a token off by {:.2g} nats",
    "beyond_10pct": "{:.0%} of tokens off by over 10 %",
}


class MismatchAlarm:
    """Speaks up at the first step beyond a threshold, and again when it has become twice as bad."""

    def __init__(self, recipe: GRPORecipe):
        self.recipe = recipe
        self.limits: dict[str, float | None] = recipe.rollout.warn_mismatch.model_dump()
        self.worst = 0.5  # largest share of a limit that was warned of; so the first warning is at 1

    def of(self, metrics: Mapping[str, float]) -> str | None:
        """The warning that a step's metrics call for."""
        shares = {
            name: metrics[f"mismatch/{name}"] / limit
            for name, limit in self.limits.items()
            if limit is not None and f"mismatch/{name}" in metrics
        }
        beyond = [name for name, share in shares.items() if share > 1]
        if not beyond or max(shares.values()) < 2 * self.worst:
            return None
        self.worst = max(shares.values())
        found = ", ".join(_UNITS[name].format(metrics[f"mismatch/{name}"]) for name in beyond)
        return f"the sampler's log-probabilities differ from the trainer's: {found}. {self.advice(metrics)}"

    def advice(self, metrics: Mapping[str, float]) -> str:
        recipe = self.recipe
        rollout, grpo = recipe.rollout, recipe.grpo
        parts = []
        if metrics.get("staleness/max"):
            parts.append(
                "Samples are of older weights (rollout.ahead), so part of it is learning: a lower learning rate or "
                "fewer minibatches_per_step lessen it"
            )
        if rollout.top_p < 1 or rollout.top_k or rollout.min_tokens:
            parts.append("rollout.top_p, top_k and min_tokens narrow what is sampled: 1, 0 and 0 do not")
        if grpo.correction.kind == "none" and grpo.old_logprobs == "trainer":
            parts.append("grpo.correction.kind: tis weighs tokens by what they differ")
        if "moe" in recipe.model_fields_set and not recipe.moe.replay_routing:
            parts.append("moe.replay_routing: true lets training meet the experts that the rollout met")
        parts.append("If it grows with the steps, weights do not arrive; model.dtype: float32 tells what is rounding")
        return ". ".join(parts) + "."
