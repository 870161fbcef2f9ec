"""Group Relative Policy Optimization (DeepSeekMath 2402.03300), the step first.

sample -> score -> advantages -> for each mini-batch: log-probabilities, loss, gradient, update.
The mathematics is in `objective/`, the tokens in `policy/packing.py`, the weights in `policy/backend.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from rewards import load_reward
from rl.collecting import CollectingTraining
from rl.experience import Batch, Completion, assign_advantages, subtract_kl
from rl.mismatch import MismatchAlarm
from rl.objective import aggregate, correction_weights, kl_estimate, mismatch, policy_loss
from rl.objective.kl import saturate
from rl.policy.backend import learning_rate
from rl.policy.lora import AdapterReference
from rl.policy.moe import NOT_RECORDED
from rl.policy.packing import Pack
from rl.policy.processes import Processes
from rl.policy.reference import Reference
from rl.recipe import GRPORecipe
from rl.rollout import Sampler
from rl.run.progress import Timer
from rl.train_log import GRPOLog, step_line


class GRPO(CollectingTraining):
    """The state of a run and its step. `run()` is the whole of it.

    sampler: makes another sampler than the recipe asks for, once the policy is there.
    """

    recipe: GRPORecipe
    name = "grpo"

    def __init__(self, recipe: GRPORecipe, processes: Processes, sampler: Callable[[GRPO], Sampler] | None = None):
        super().__init__(recipe, processes)
        self.rewards = [load_reward(spec) for spec in recipe.rewards]
        self.prompts = self.load_prompts()
        for reward in self.rewards:
            reward.check_columns(self.prompts.items[0].row)
        self.load_policy(recipe.moe, recipe.rollout.temperature)
        self.reference = self.load_reference() if recipe.grpo.kl.coefficient else None
        self.replays = self.experts is not None and recipe.moe.replay_routing
        self.load_sampler(self.replays, sampler(self) if sampler else None)
        self.load_collector()
        self.before = 0  # updates before the step that is being trained
        self.mismatch_alarm = MismatchAlarm(recipe)

    @property
    def has_reference(self) -> bool:
        return bool(self.recipe.grpo.kl.coefficient) and self.recipe.model.lora is None

    def load_reference(self) -> Reference | AdapterReference:
        if self.recipe.model.lora is not None:
            return AdapterReference(self.policy)
        return Reference(self.policy, self.backend, self.recipe.grpo.reference)

    # ---- one step ------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        """Samples prompts_per_step groups and makes minibatches_per_step * epochs_per_step updates."""
        timer = Timer()
        with self.folder.progress.phase(f"step {index}: rollout"):
            batch = self.rollout(index, timer)
        self.link.make_room()
        return self.train(index, batch, timer)

    def train(self, index: int, collected: Batch, timer: Timer) -> dict[str, float]:
        """Step `index` on its rollouts; its metrics."""
        spec, log, batch = self.recipe.grpo, GRPOLog(), collected.completions
        self.before = self.updates
        if self.collector is not None:
            log.staleness(self.staleness(batch), sum(c.sample.newest_version is not None for c in batch))
        if self.replays and any(c.sample.routed_experts is None for c in batch):
            self.replays = False  # once is enough
            self.folder.progress.line(f"warning: {NOT_RECORDED}")
        assign_advantages(batch, spec.advantage, self.backend.gather([(c.group, c.reward) for c in batch]))

        several = spec.minibatches_per_step * spec.epochs_per_step > 1
        kl_in_reward = self.reference is not None and spec.kl.place == "reward"
        if (several and spec.old_logprobs == "trainer") or kl_in_reward:
            with timer("old_logprobs"), self.folder.progress.phase(f"step {index}: log-probabilities"):
                self.score_old(batch, kl_in_reward)
            if kl_in_reward:
                subtract_kl(batch, spec.kl.coefficient)

        prompts_per_minibatch = spec.prompts_per_step // spec.minibatches_per_step
        with timer("train"), self.folder.progress.phase(f"step {index}: training"):
            for _ in range(spec.epochs_per_step):
                for number in range(spec.minibatches_per_step):
                    minibatch = [c for c in batch if c.group // prompts_per_minibatch == number]
                    self.update(minibatch, log)

        synced = self.renew_sampler(index, timer)
        self.cursor = collected.cursor
        self.save_samples(index, batch)
        log.batch(collected)
        metrics = {**log.finish(self.backend), **synced}
        warning = self.mismatch_alarm.of(metrics)
        if warning:
            self.folder.progress.line(f"warning: {warning}")
        return {**metrics, **{f"time/{k}": v for k, v in (collected.seconds | timer.seconds).items()}}

    @torch.no_grad()
    def score_old(self, batch: list[Completion], with_reference: bool) -> None:
        """log pi_old by the trainer (and log pi_ref) of what will be trained on, before the first update."""
        spec = self.recipe.grpo
        if not with_reference:
            batch = [c for c in batch if self.contributes(c)]
        documents = [c.document for c in batch]
        packs = self.policy.pack(documents, spec.tokens_per_microbatch, spec.share_prompts)
        for pack in self.backend.micro_batches(packs):
            old = self.policy.logprobs(pack)[0].cpu()
            ref = self.reference.logprobs(pack).cpu() if with_reference and self.reference else None
            for d in pack.documents:
                batch[d].old_logp = old[pack.sequence_P == d]
                batch[d].ref_logp = None if ref is None else ref[pack.sequence_P == d]

    def update(self, minibatch: list[Completion], log: GRPOLog) -> None:
        """One optimizer update. The denominator is global and known before the first micro-batch."""
        spec, recipe = self.recipe.grpo, self.recipe
        if self.collector is not None:
            self.collector.raise_failure()
        kept = [c for c in minibatch if not c.masked]
        totals = self.backend.sum(
            {
                "sequence": float(len(kept)),
                "token": float(sum(len(c.sample.token_ids) for c in kept)),
                "constant": float(len(minibatch) * recipe.rollout.max_tokens),
            }
        )
        denominator = max(totals[spec.loss.aggregation], 1.0)
        trained = [c for c in kept if self.contributes(c)]
        packs = self.policy.pack([c.document for c in trained], spec.tokens_per_microbatch, spec.share_prompts)
        for pack in self.backend.micro_batches(packs):
            self.backend.backward(self.loss(pack, trained, denominator, totals, log))
        rate = learning_rate(recipe.optimizer, self.updates, self.total_updates)
        norm, updated = self.backend.step(rate)
        self.updates += 1
        if self.experts is not None:
            log.experts = self.experts.updated(self.updates)
        log.update(norm, rate, updated)
        if self.reference is not None:
            self.reference.updated(self.updates)

    def contributes(self, completion: Completion) -> bool:
        """Whether the completion's gradient can be other than zero; if not, its forward is left out."""
        spec = self.recipe.grpo
        kl_in_loss = self.reference is not None and spec.kl.place == "loss"
        return not completion.masked and (completion.advantage != 0 or kl_in_loss or not spec.skip_uninformative)

    def loss(
        self, pack: Pack, trained: list[Completion], denominator: float, totals: dict[str, float], log: GRPOLog
    ) -> torch.Tensor:
        """The micro-batch's part of the loss; its parts over all micro-batches and processes add up.

        totals: completions and tokens of the whole mini-batch.
        """
        spec = self.recipe.grpo
        logp, entropy, auxiliary = self.policy.training_logprobs(pack)
        device = logp.device
        sampler_logp = pack.gather([c.sample.logprobs for c in trained]).to(device)
        if spec.old_logprobs == "sampler":
            old = sampler_logp
        elif trained and trained[0].old_logp is not None:
            old = pack.gather([c.old_logp for c in trained]).to(device)  # type: ignore[misc]
        else:
            old = logp.detach()  # a single update: pi_old is pi; that samples are older is seen by the correction alone
        advantages = torch.tensor([c.advantage for c in trained], device=device)[pack.sequence_P.to(device)]
        ids, mask = pack.sequence_P.to(device), torch.ones_like(logp, dtype=torch.bool)
        weights = None
        if spec.old_logprobs == "trainer":
            correction = spec.correction
            weights = correction_weights(
                old, sampler_logp, ids, kind=correction.kind, cap=correction.cap, low=correction.low,
                high=correction.high,
            )  # fmt: skip
        loss, metrics = policy_loss(
            logp,
            old,
            advantages,
            mask,
            ids,
            weights=weights,
            denominator=denominator,
            **spec.loss.model_dump(),
        )
        log.tokens(metrics, entropy)
        if spec.old_logprobs == "trainer" or self.updates == self.before:
            log.mismatch(mismatch(logp if spec.old_logprobs == "sampler" else old, sampler_logp), len(logp))
        if self.reference is not None and spec.kl.place == "loss":
            kl = kl_estimate(logp, self.reference.logprobs(pack), spec.kl.estimator)
            log.kl(kl)
            if spec.kl.unbiased:
                kl = kl * torch.exp(saturate(logp - old))
            loss = loss + spec.kl.coefficient * aggregate(
                kl, mask, ids, aggregation=spec.loss.aggregation, denominator=denominator
            )
        if self.experts and auxiliary:
            loss = loss + self.experts.loss(auxiliary, totals["token"], totals["sequence"])
            self.experts.log(log.sums, auxiliary, totals["token"], totals["sequence"])
        return loss

    # ---- the run -------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.recipe.grpo.steps

    @property
    def total_updates(self) -> int:
        return self.total_steps * self.updates_per_step

    @property
    def max_seconds(self) -> float | None:
        return self.recipe.grpo.max_seconds

    def describe(self) -> str:
        return f"{len(self.prompts)} prompts ({self.prompts.dropped} over-long dropped)"

    def line(self, index: int, metrics: Mapping[str, float]) -> str:
        return step_line(index, self.total_steps, metrics)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().tensors()
        if self.reference is not None:
            yield from self.reference.tensors()

    def load_state(self, state: dict[str, Any], read: Callable[[str], Any]) -> None:
        super().load_state(state, read)
        if self.reference is not None:
            self.reference.load(read)


def run_grpo(recipe: GRPORecipe, processes: Processes) -> dict[str, Any]:
    """`pipeline: grpo`."""
    return GRPO(recipe, processes).run()
