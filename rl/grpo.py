"""Group Relative Policy Optimization (DeepSeekMath 2402.03300), the step first.

sample -> score -> advantages -> for each mini-batch: log-probabilities, loss, gradient, update.
The mathematics is in `objective/`, the tokens in `policy/packing.py`, the weights in `policy/backend.py`.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from rewards import load_reward
from rl.evaluate import Evaluator
from rl.experience import (
    Completion,
    assign_advantages,
    assign_rewards,
    completions_of,
    subtract_kl,
    uninformative,
)
from rl.mismatch_advice import mismatch_advice
from rl.objective import aggregate, correction_weights, kl_estimate, mismatch, policy_loss
from rl.objective.kl import saturate
from rl.policy.backend import Processes, Replicated, learning_rate
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.moe import ExpertTraining
from rl.policy.packing import Pack
from rl.policy.policy import Policy
from rl.policy.reference import Reference
from rl.prompts import load_prompts, permuted, sampling_params
from rl.recipe import GRPORecipe
from rl.rollout.make import make_sampler
from rl.rollout.sampling import stream_key
from rl.run.folder import Run
from rl.run.progress import Timer
from rl.train_log import GRPOLog, step_line


class GRPO:
    """The state of a run and its step. `run()` is the whole of it."""

    def __init__(self, recipe: GRPORecipe, processes: Processes):
        self.recipe, self.processes = recipe, processes
        self.run_folder = Run(recipe, processes.rank, recipe.checkpoint.keep)
        self.rewards = [load_reward(spec) for spec in recipe.rewards]
        self.tokenizer = load_tokenizer(recipe.model)
        rollout = recipe.rollout
        self.prompts = load_prompts(
            recipe.data,
            self.tokenizer,
            max_tokens=rollout.max_prompt_tokens,
            over_long=rollout.over_long_prompts,
        )
        for reward in self.rewards:
            reward.check_columns(self.prompts.items[0].row)
        model = load_model(recipe.model, self.tokenizer, seed=recipe.seed, dtype=torch.float32).to(processes.device)
        self.backend = Replicated(model, DTYPES[recipe.model.dtype], recipe.optimizer, processes)
        given = "moe" in recipe.model_fields_set
        self.experts = ExpertTraining.of(model, recipe.moe, self.total_updates, given)
        self.policy = Policy(model, temperature=rollout.temperature, experts=self.experts)
        self.policy.check_packing()
        self.reference = Reference(self.policy, recipe.grpo.reference) if recipe.grpo.kl.coefficient else None
        routing = self.experts is not None and recipe.moe.replay_routing
        self.sync = make_sampler(
            recipe, self.policy, self.backend, self.tokenizer, processes, self.run_folder, record_routing=routing
        )
        self.sampler = self.sync.sampler
        self.evaluator = Evaluator.of(recipe, self.tokenizer, processes)
        self.updates = self.cursor = self.steps_done = 0
        self.seconds = 0.0

    # ---- one step ------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        """Samples prompts_per_step groups and makes minibatches_per_step * epochs_per_step updates."""
        spec, log, timer = self.recipe.grpo, GRPOLog(), Timer()
        with timer("rollout"), self.run_folder.progress.phase(f"step {index}: rollout"):
            batch = self.rollout(index, log, timer)
        self.sync.make_room()
        assign_advantages(batch, spec.advantage, self.backend.gather([(c.group, c.reward) for c in batch]))

        several = spec.minibatches_per_step * spec.epochs_per_step > 1
        kl_in_reward = self.reference is not None and spec.kl.place == "reward"
        if (several and spec.old_logprobs == "trainer") or kl_in_reward:
            with timer("old_logprobs"), self.run_folder.progress.phase(f"step {index}: log-probabilities"):
                self.score_old(batch, kl_in_reward)
            if kl_in_reward:
                subtract_kl(batch, spec.kl.coefficient)

        prompts_per_minibatch = spec.prompts_per_step // spec.minibatches_per_step
        with timer("train"), self.run_folder.progress.phase(f"step {index}: training"):
            for _ in range(spec.epochs_per_step):
                for number in range(spec.minibatches_per_step):
                    minibatch = [c for c in batch if c.group // prompts_per_minibatch == number]
                    self.update(minibatch, log)

        with timer("sync"):
            synced = self.sync.send(self.updates)
        self.cursor += spec.prompts_per_step
        self.steps_done = index
        self.save_samples(index, batch)
        log.batch(batch)
        return {**log.finish(self.backend), **synced, **{f"time/{k}": v for k, v in timer.seconds.items()}}

    def rollout(self, index: int, log: GRPOLog, timer: Timer) -> list[Completion]:
        """This process's share of the step's groups; with dynamic sampling, uniform ones are replaced."""
        spec = self.recipe.grpo
        wanted = {
            g: self.cursor + g for g in range(spec.prompts_per_step) if g % self.backend.world == self.backend.rank
        }
        batch = self.sample(index, wanted, log, timer)
        for _ in range(spec.dynamic_sampling.max_rounds):
            # Every process sees the same list, so the k-th replacement is the same prompt on any world size.
            flat = sorted(g for groups in self.backend.gather(uninformative(batch, task=True)) for g in groups)
            if not flat:
                break
            replaced = {g: self.cursor + spec.prompts_per_step + k for k, g in enumerate(flat)}
            self.cursor += len(flat)
            log.resampled += len(replaced.keys() & wanted.keys())
            mine = {g: position for g, position in replaced.items() if g in wanted}
            batch = [c for c in batch if c.group not in mine] + self.sample(index, mine, log, timer)
        return sorted(batch, key=lambda c: c.group)

    def sample(self, index: int, wanted: dict[int, int], log: GRPOLog, timer: Timer) -> list[Completion]:
        """Completions with rewards for groups {group: position in the stream of prompts}."""
        rollout = self.recipe.rollout
        positions = list(wanted.values())
        prompts = [self.prompts.items[permuted(p, len(self.prompts), self.recipe.seed)] for p in positions]
        seed = stream_key(self.recipe.seed, index)
        params = sampling_params(rollout, self.recipe.grpo.samples_per_prompt, seed)
        samples = self.sampler.generate([p.ids for p in prompts], params, streams=positions)
        log.drafts(self.sync.acceptance)
        batch = completions_of(prompts, list(wanted), positions, samples, self.tokenizer)
        with timer("reward"):
            assign_rewards(batch, self.rewards, self.prompts, self.recipe.grpo.truncation, rollout.max_tokens)
        return batch

    @torch.no_grad()
    def score_old(self, batch: list[Completion], with_reference: bool) -> None:
        """log pi_old by the trainer (and log pi_ref) of what will be trained on, before the first update."""
        spec = self.recipe.grpo
        if not with_reference:
            batch = [c for c in batch if self.contributes(c)]
        documents = [c.document for c in batch]
        for pack in self.policy.pack(documents, spec.tokens_per_microbatch, spec.share_prompts):
            old = self.policy.logprobs(pack)[0].cpu()
            ref = self.reference.logprobs(pack).cpu() if with_reference and self.reference else None
            for d in pack.documents:
                batch[d].old_logp = old[pack.sequence_P == d]
                batch[d].ref_logp = None if ref is None else ref[pack.sequence_P == d]

    def update(self, minibatch: list[Completion], log: GRPOLog) -> None:
        """One optimizer update. The denominator is global and known before the first micro-batch."""
        spec, recipe = self.recipe.grpo, self.recipe
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
        for pack in self.policy.pack([c.document for c in trained], spec.tokens_per_microbatch, spec.share_prompts):
            self.backend.backward(self.loss(pack, trained, denominator, totals, log))
        rate = learning_rate(recipe.optimizer, self.updates, self.total_updates)
        norm, updated = self.backend.step(rate)
        self.updates += 1
        if self.experts is not None:
            log.experts = self.experts.updated(self.updates)
        log.update(norm, rate, updated)
        if self.reference is not None:
            self.reference.updated(self.updates)

    @property
    def total_updates(self) -> int:
        spec = self.recipe.grpo
        return spec.steps * spec.minibatches_per_step * spec.epochs_per_step

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
        elif trained[pack.documents[0]].old_logp is not None:
            old = pack.gather([c.old_logp for c in trained]).to(device)  # type: ignore[misc]
        else:
            old = logp.detach()  # a single update on exactly on-policy data: pi_old is pi
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
        if spec.old_logprobs == "trainer" or self.updates == self.sampler.version:
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

    def run(self) -> dict[str, Any]:
        recipe, folder = self.recipe, self.run_folder
        self.resume()
        folder.progress.line(
            f"grpo: {len(self.prompts)} prompts ({self.prompts.dropped} over-long dropped), "
            f"{sum(p.numel() for p in self.policy.model.parameters()):,} parameters, {self.backend.world} process(es)"
        )
        evaluation = recipe.evaluate
        if evaluation and evaluation.at_start and self.steps_done == 0:
            self.evaluate(0)
        for index in range(self.steps_done + 1, recipe.grpo.steps + 1):
            if recipe.grpo.max_seconds and self.seconds >= recipe.grpo.max_seconds:
                break
            start = time.perf_counter()
            metrics = self.step(index)
            metrics["time/step"] = time.perf_counter() - start
            self.seconds += self.backend.gather(metrics["time/step"])[0]
            if evaluation and evaluation.every and index % evaluation.every == 0 and index < recipe.grpo.steps:
                metrics |= self.evaluate(index, write=False)
            if folder.metrics:
                folder.metrics.write(index, metrics)
            folder.progress.line(step_line(index, recipe.grpo.steps, metrics))
            corrected = recipe.grpo.correction.kind != "none"
            if warning := mismatch_advice(metrics, recipe.rollout.mismatch, corrected=corrected):
                folder.progress.line(warning)
            if index % recipe.checkpoint.every == 0 or index == recipe.grpo.steps:
                self.save(index)
        return self.finish()

    def finish(self) -> dict[str, Any]:
        results = self.evaluate(self.steps_done) if self.evaluator else {}
        model = self.run_folder.folder / "model"
        if self.processes.rank == 0:
            self.run_folder.write_model(self.policy.model, self.tokenizer)
        self.processes.barrier()
        summary = {
            "pipeline": "grpo", "model": str(model), "steps": self.steps_done, "updates": self.updates,
            "seconds": self.seconds, "evaluation": results,
        }  # fmt: skip
        self.run_folder.finish(summary)
        return summary

    def evaluate(self, step: int, write: bool = True) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        return self.evaluator.measure(self.policy, self.run_folder, step, version=self.updates, write=write)

    def save_samples(self, index: int, batch: list[Completion]) -> None:
        rows = [row for part in self.backend.gather([c.record(index) for c in batch]) for row in part]
        if self.processes.rank:
            return
        rows.sort(key=lambda row: row["group"])
        self.run_folder.write_samples(f"samples/step_{index:08d}.parquet", rows)
        every = self.recipe.log.samples_every
        if every and index % every == 0:
            self.run_folder.progress.samples(index, rows[: self.recipe.log.samples_shown])

    def save(self, step: int) -> None:
        """Everything that the next step depends on. Random streams are keyed by (seed, step, prompt, sample)."""
        if self.processes.rank == 0:
            state = {
                "step": step, "updates": self.updates, "cursor": self.cursor, "seconds": self.seconds,
                **self.backend.state(),
                **(self.reference.state() if self.reference and self.reference.moves else {}),
            }  # fmt: skip
            self.run_folder.checkpoints.save(step, state)
        self.processes.barrier()

    def resume(self) -> None:
        state = self.run_folder.checkpoints.load_latest() if self.recipe.resume == "auto" else None
        if state is not None:
            self.backend.load_state(state)
            if self.reference is not None and self.reference.moves:
                self.reference.load_state(state)
            self.steps_done, self.updates = state["step"], state["updates"]
            self.cursor, self.seconds = state["cursor"], state["seconds"]
            self.run_folder.progress.line(f"resumed after step {self.steps_done}")
        self.sync.send(self.updates)
        self.run_folder.rewind(self.steps_done if state is not None else -1)
        self.processes.barrier()


def run_grpo(recipe: GRPORecipe, processes: Processes) -> dict[str, Any]:
    """`pipeline: grpo`."""
    training = GRPO(recipe, processes)
    try:
        return training.run()
    finally:
        training.sync.close()
