"""Where a trainer's batches come from: sampled and scored when a step begins, or beforehand by a `Collector`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rewards import Reward
from rl.ahead import Collector
from rl.check_ahead import check_sampler
from rl.experience import Batch, Completion, assign_rewards, uninformative
from rl.pending import plain, restored
from rl.recipe import GRPORecipe
from rl.rollout import LocalSampler, Streaming
from rl.run.progress import Timer
from rl.scoring import EarlyScores
from rl.training import SamplingTraining


class CollectingTraining(SamplingTraining):
    """A trainer that learns from scored completions. Subclasses load prompts, rewards, policy and sampler, then call
    `load_collector`."""

    recipe: GRPORecipe
    rewards: list[Reward]
    collector: Collector | None = None
    cursor = 0  # place in the stream of prompts where the next step to be trained begins

    def load_collector(self) -> None:
        """What collects rollouts beside the training, if the recipe asks for it."""
        self.pending: list[list[dict[str, Any]]] = []  # of coming steps, by process, as the next checkpoint keeps them
        rollout, progress = self.recipe.rollout, self.folder.progress
        if not rollout.ahead:
            return
        midway = getattr(self.sampler, "takes_weights_midway", False)
        check_sampler(rollout, own_weights=not self.shares_weights, midway=midway)
        collector = Collector(
            self.collect, self.processes, ahead=rollout.ahead, in_flight=rollout.in_flight, last=self.total_steps
        )

        def show(done: int, all_: int) -> None:
            collector.check()
            progress.beside(f"next rollout {done}/{all_}")

        self.sampler.progress = show
        self.collector = collector

    @property
    def updates_per_step(self) -> int:
        return self.recipe.grpo.minibatches_per_step * self.recipe.grpo.epochs_per_step

    # ---- rollouts ----------------------------------------------------------------------------------------

    def rollout(self, index: int, timer: Timer) -> Batch:
        """What step `index` learns from."""
        if self.collector is None:
            return self.collect(index, self.cursor)
        with timer("wait"):
            return self.collector.take(index, self.cursor)

    def renew_sampler(self, index: int, timer: Timer) -> dict[str, float]:
        """The sampler gets the weights after step `index`; metrics of it."""
        with self.collector.new_weights(index, timer) if self.collector else nullcontext(), timer("sync"):
            return self.send_weights()

    def collect(self, index: int, cursor: int) -> Batch:
        """This process's share of the step's groups, from place `cursor` of the stream of prompts, with rewards.

        With dynamic sampling, uniform ones are replaced. Nothing in here may touch what training changes: with
        `rollout.ahead` it runs in another thread.
        """
        spec, timer = self.recipe.grpo, Timer()
        processes = self.collector.processes if self.collector else self.processes
        wanted = {g: cursor + g for g in range(spec.prompts_per_step) if g % processes.world == processes.rank}
        batch = Batch([], cursor + spec.prompts_per_step, seconds=timer.seconds)
        with timer("rollout"):
            completions = self.sample(index, wanted, batch, timer)
            for _ in range(spec.dynamic_sampling.max_rounds):
                # Every process sees the same list, so the k-th replacement is the same prompt on any world size.
                flat = sorted(g for groups in processes.gather(uninformative(completions, task=True)) for g in groups)
                if not flat:
                    break
                replaced = {g: batch.cursor + k for k, g in enumerate(flat)}
                batch.cursor += len(flat)
                mine = {g: position for g, position in replaced.items() if g in wanted}
                batch.resampled += len(mine)
                kept = [c for c in completions if c.group not in mine]
                completions = kept + self.sample(index, mine, batch, timer)
        batch.completions = sorted(completions, key=lambda c: c.group)
        return batch

    def sample(self, index: int, wanted: dict[int, int], batch: Batch, timer: Timer) -> list[Completion]:
        """Completions with rewards for groups {group: position in the stream of prompts}."""
        number = self.recipe.grpo.samples_per_prompt
        if not self.scores_early:
            completions = self.draw(index, wanted, number)
            with timer("reward"):
                self.score(completions)
        else:
            with EarlyScores(self.score) as scores:
                completions = self.draw(index, wanted, number, scores.add)
                with timer("reward"):  # what is left of it
                    scores.finish()
        acceptance = getattr(self.sampler, "acceptance", None)  # of drafts
        for name, count in acceptance.sums().items() if acceptance and acceptance.accepted else ():
            batch.drafts[name] = batch.drafts.get(name, 0.0) + count
        return completions

    def score(self, completions: list[Completion]) -> None:
        assign_rewards(
            completions, self.rewards, self.prompts, self.recipe.grpo.truncation, self.recipe.rollout.max_tokens
        )

    def staleness(self, batch: list[Completion]) -> list[int]:
        """Updates since the oldest weights that sampled each completion, at most those of `rollout.ahead` steps."""
        bound = self.recipe.rollout.ahead * self.updates_per_step
        ages = [self.updates - c.sample.weights_version for c in batch]
        if ages and not 0 <= min(ages) <= max(ages) <= bound:
            raise RuntimeError(
                f"samples are {min(ages)} to {max(ages)} updates old, with at most {bound} allowed: the sampler did "
                "not take the weights that it was sent, or tells a wrong version"
            )
        return ages

    @property
    def scores_early(self) -> bool:
        """Whether rewards of complete groups are computed while others are being sampled. Not where the sampler works
        in this thread: rewards would only take its time."""
        apart = self.collector is not None or not isinstance(self.sampler, LocalSampler)
        return apart and isinstance(self.sampler, Streaming) and all(reward.per_group for reward in self.rewards)

    # ---- the run -----------------------------------------------------------------------------------------

    def beside(self) -> AbstractContextManager[Any]:
        return self.collector or super().beside()

    def finish(self) -> dict[str, Any]:
        if self.collector is not None:
            self.collector.finish()
        return super().finish()

    def save(self) -> None:
        if self.collector is not None and self.steps_done != self.saved:
            steps = self.collector.pending(self.steps_done)
            parts = self.backend.gather([plain(batch) for batch in steps])
            self.pending = [list(part) for part in zip(*parts, strict=True)]  # by step, then by process
        super().save()

    def state(self) -> dict[str, Any]:
        pending = {} if self.collector is None else {"pending": self.pending}
        return {**super().state(), "cursor": self.cursor, **pending}

    def load_state(self, state: dict[str, Any], read: Callable[[str], Any]) -> None:
        super().load_state(state, read)
        self.cursor = state["cursor"]
        if self.collector is not None:
            rank, world = self.processes.rank, self.processes.world
            steps = [restored(parts, rank, world, self.prompt_at, self.tokenizer) for parts in state["pending"]]
            self.collector.restore(self.steps_done, steps)
