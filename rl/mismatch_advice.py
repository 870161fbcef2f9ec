"""Words for a step whose samples were drawn from another distribution than the trainer computes."""

from __future__ import annotations

from collections.abc import Mapping

from rl.recipe import MismatchLimits

_MEANING = {
    "k3": "mean k3 {value:.2g} nats",
    "max": "largest |difference| {value:.2g} nats",
    "beyond_10pct": "{value:.0%} of the tokens off by more than 10 %",
}


def mismatch_advice(metrics: Mapping[str, float], limits: MismatchLimits, *, corrected: bool) -> str | None:
    """A warning if a step's `mismatch/...` metrics are beyond the limits. corrected: a correction is switched on."""
    beyond = []
    for name, meaning in _MEANING.items():
        value, limit = metrics.get(f"mismatch/{name}"), getattr(limits, name)
        if value is not None and limit is not None and not value <= limit:  # NaN is beyond any limit
            beyond.append(f"{meaning.format(value=value)} (rollout.mismatch.{name}: {limit:g})")
    if not beyond:
        return None
    advice = (
        "the sampler computes other log-probabilities than the trainer: it may hold older weights, another dtype, a "
        "quantised form, or route tokens to other experts (moe.replay_routing)"
    )
    if not corrected:
        advice += "; grpo.correction.kind: tis or mis bounds the effect on the gradient"
    return f"warning: {', '.join(beyond)}: {advice}"
