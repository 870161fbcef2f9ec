"""Metrics of a GRPO step: sums over micro-batches and processes, divided once at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewards.compose import VERDICTS
from rl.experience import Batch, component_means, tally, uninformative
from rl.rollout.speculative import acceptance_rates

if TYPE_CHECKING:
    from rl.policy.backend import Backend


class GRPOLog:
    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.maxima: dict[str, float] = {}
        self.norms: list[float] = []
        self.rate = 0.0
        self.experts: dict[str, Any] = {}  # how the loads of experts were balanced in the last update
        self.skipped = 0

    def tokens(self, loss: dict[str, Tensor], entropy: Tensor) -> None:
        """Of one micro-batch."""
        self._add("tokens", loss["tokens"])
        self._add("clip_fraction", loss["clipped"])
        self._add("ratio", loss["ratio"])
        self._add("entropy", entropy.sum())
        self._max("ratio_max", loss["ratio_max"])

    def mismatch(self, gap: dict[str, Tensor], tokens: int) -> None:
        """Sampler against trainer, of a micro-batch whose trainer's log-probabilities are from before the step."""
        self._add("n/mismatch", tokens)
        self._add("mismatch/k3", gap["k3"])
        self._add("mismatch/beyond_10pct", gap["beyond_10pct"])
        self._max("mismatch/max", gap["max"])

    def kl(self, per_token: Tensor) -> None:
        self._add("kl", per_token.detach().sum())

    def staleness(self, updates: Sequence[int], mixed: int) -> None:
        """How many updates older than the weights that are about to be trained those were that sampled each; how many
        were sampled by more than one version."""
        self._add("staleness/mean", sum(updates))
        self._add("staleness/mixed", mixed)
        self._max("staleness/max", max(updates, default=0))

    def update(self, norm: float, rate: float, updated: bool) -> None:
        self.norms.append(norm)
        self.skipped += not updated
        self.rate = rate

    def batch(self, collected: Batch) -> None:
        """Of this process's completions."""
        batch = collected.completions
        for name, value in collected.drafts.items():
            self._add(f"n/drafts/{name}", value)
        scored = [c.reward for c in batch if not math.isnan(c.reward)]
        lengths = [len(c.sample.token_ids) for c in batch]
        self._add("n/completions", len(batch))
        self._add("n/scored", len(scored))
        self._add("n/groups", len({c.group for c in batch}))
        self._add("reward", math.fsum(scored))
        self._add("reward_square", math.fsum(r * r for r in scored))
        self._add("groups/uniform", len(uninformative(batch)))
        self._add("groups/resampled", collected.resampled)
        self._add("length/mean", sum(lengths))
        self._add("length/truncated", sum(c.truncated for c in batch))
        self._max("length/max", max(lengths, default=0))
        for name, value in tally(batch).items():
            self._add(name, value)

    def finish(self, backend: Backend) -> dict[str, float]:
        """Means over everything, the same on every process."""
        sums = summed(self.sums, backend)
        maxima: dict[str, float] = {}
        for part in backend.gather(self.maxima):
            for name, value in part.items():
                maxima[name] = max(maxima.get(name, value), value)
        tokens, completions = sums.pop("tokens", 0.0), sums.pop("n/completions")
        scored, groups = sums.pop("n/scored"), sums.pop("n/groups")
        square = sums.pop("reward_square")
        result = {
            "reward": _ratio(sums.pop("reward"), scored),
            "groups/informative": 1 - _ratio(sums["groups/uniform"], groups),
            "length/mean": _ratio(sums.pop("length/mean"), completions),
            "length/truncated": _ratio(sums.pop("length/truncated"), completions),
            "grad_norm": sum(self.norms) / len(self.norms),
            "learning_rate": self.rate,
            "updates_skipped": float(self.skipped),
            "tokens_trained": tokens,
            "completions": completions,
        }
        for name in ("staleness/mean", "staleness/mixed"):
            if name in sums:
                result[name] = _ratio(sums.pop(name), completions)
        result["reward_std"] = math.sqrt(max(0.0, _ratio(square, scored) - result["reward"] ** 2))
        for name in ("clip_fraction", "ratio", "entropy", "kl"):
            if name in sums:
                result[name] = _ratio(sums.pop(name), tokens)
        compared = sums.pop("n/mismatch", 0.0)
        for name in ("mismatch/k3", "mismatch/beyond_10pct"):
            if name in sums:
                result[name] = _ratio(sums.pop(name), compared)
        result |= component_means(sums)
        drafts = {n.removeprefix("n/drafts/"): sums.pop(n) for n in list(sums) if n.startswith("n/drafts/")}
        if drafts:
            result |= {f"drafts/{n}": value for n, value in acceptance_rates(drafts).items()}
        result |= self.experts
        return {**result, **sums, **maxima}

    def _add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def _max(self, name: str, value: Tensor | float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), float(torch.as_tensor(value)))


def summed(sums: Mapping[str, float], backend: Backend) -> dict[str, float]:
    """Sums over all processes, which need not have counted the same things."""
    names = sorted({n for part in backend.gather(sorted(sums)) for n in part})
    return backend.sum({n: sums.get(n, 0.0) for n in names})


def step_line(step: int, steps: int, m: Mapping[str, float]) -> str:
    """One line a step for the log."""
    parts = [
        f"step {step}/{steps}",
        f"reward {m['reward']:.3f}",
        f"informative {m['groups/informative']:.0%}",
        f"length {m['length/mean']:.0f}",
        f"grad {m['grad_norm']:.2g}",
    ]
    if any(m[f"verdict/{verdict}"] for verdict in VERDICTS):
        parts.append("answers " + " ".join(f"{m[f'verdict/{v}']:.0f} {v}" for v in VERDICTS if m[f"verdict/{v}"]))
    if "entropy" in m:
        parts.append(f"entropy {m['entropy']:.3f}")
    if "kl" in m:
        parts.append(f"kl {m['kl']:.2g}")
    if "mismatch/k3" in m:
        parts.append(f"mismatch {m['mismatch/k3']:.1g}")
    if "staleness/mean" in m:
        parts.append(f"stale {m['staleness/mean']:.1f}")
    parts += [f"{k} {v:.3f}" for k, v in m.items() if k.startswith("eval/") and k.endswith("/avg")]
    timings = " ".join(f"{k.removeprefix('time/')} {v:.1f}" for k, v in m.items() if k.startswith("time/"))
    return ", ".join(parts) + f" | s: {timings}"


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
