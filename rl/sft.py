"""Supervised fine-tuning on worked solutions or whole texts, by the same packing, losses and backend as GRPO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rl.documents import training_documents
from rl.policy.backend import learning_rate
from rl.policy.processes import Processes
from rl.prompts import permuted
from rl.recipe import SFTRecipe
from rl.training import Training


class SFT(Training):
    recipe: SFTRecipe
    name, unit = "sft", "update"

    def __init__(self, recipe: SFTRecipe, processes: Processes):
        super().__init__(recipe, processes)
        self.documents, self.dropped = training_documents(recipe, self.tokenizer)
        self.load_policy(recipe.moe)

    @property
    def total_steps(self) -> int:
        spec = self.recipe.sft
        return spec.steps or max(1, math.ceil(len(self.documents) * spec.epochs / spec.batch_size))

    @property
    def total_updates(self) -> int:
        return self.total_steps

    @property
    def max_seconds(self) -> float | None:
        return self.recipe.sft.max_seconds

    def describe(self) -> str:
        documents = f"{len(self.documents)} documents ({self.dropped} left out for their length)"
        return f"{documents}, {self.total_updates} updates"

    def step(self, index: int) -> dict[str, float]:
        """One update: the mean negative log-likelihood per token of a batch of documents, in nats."""
        with self.folder.progress.phase(f"update {index}"):
            return self.update(index)

    def update(self, index: int) -> dict[str, float]:
        spec = self.recipe.sft
        positions = range((index - 1) * spec.batch_size, index * spec.batch_size)
        batch = [self.documents[permuted(p, len(self.documents), self.recipe.seed)] for p in positions]
        tokens = sum(len(d.completion_ids) for d in batch)  # known to every process: the batch is global
        sums = {"loss": 0.0}
        packs = self.policy.pack(batch[self.backend.rank :: self.backend.world], spec.tokens_per_microbatch)
        for pack in self.backend.micro_batches(packs):
            logp, _, auxiliary = self.policy.training_logprobs(pack)
            loss = -logp.sum() / tokens
            sums["loss"] += float(loss.detach())
            if self.experts and auxiliary:
                loss = loss + self.experts.loss(auxiliary, tokens, len(batch))
                self.experts.log(sums, auxiliary, tokens, len(batch))
            self.backend.backward(loss)
        rate = learning_rate(self.recipe.optimizer, self.updates, self.total_updates)
        norm, updated = self.backend.step(rate)
        self.updates += 1
        return {
            **self.backend.sum(sums),
            **(self.experts.updated(self.updates) if self.experts else {}),
            "grad_norm": norm,
            "learning_rate": rate,
            "updates_skipped": float(not updated),
            "tokens_trained": float(tokens),
            "epoch": index * spec.batch_size / len(self.documents),
        }

    def line(self, index: int, metrics: Mapping[str, float]) -> str | None:
        if index % max(1, self.total_steps // 20) and index != self.total_steps:
            return None
        return (
            f"update {index}/{self.total_steps}, loss {metrics['loss']:.4f}, grad {metrics['grad_norm']:.2g}, "
            f"lr {metrics['learning_rate']:.2g}, {metrics['time/step']:.1f} s"
        )


def run_sft(recipe: SFTRecipe, processes: Processes) -> dict[str, Any]:
    """`pipeline: sft`."""
    return SFT(recipe, processes).run()
