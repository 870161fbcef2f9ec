"""Supervised fine-tuning on worked solutions or whole texts, by the same packing, losses and backend as GRPO."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from rl.documents import training_documents
from rl.evaluate import Evaluator
from rl.policy.backend import Processes, Replicated, learning_rate
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.moe import ExpertTraining
from rl.policy.policy import Policy
from rl.policy.precision import apply_precision
from rl.prompts import permuted
from rl.recipe import SFTRecipe
from rl.run.folder import Run


class SFT:
    def __init__(self, recipe: SFTRecipe, processes: Processes):
        self.recipe, self.processes = recipe, processes
        self.folder = Run(recipe, processes.rank, recipe.checkpoint.keep)
        self.tokenizer = load_tokenizer(recipe.model)
        self.documents, self.dropped = training_documents(recipe, self.tokenizer)
        model = load_model(recipe.model, self.tokenizer, seed=recipe.seed, dtype=torch.float32).to(processes.device)
        apply_precision(model, recipe.precision, self.folder.progress)
        self.backend = Replicated(model, DTYPES[recipe.model.dtype], recipe.optimizer, processes)
        given = "moe" in recipe.model_fields_set
        self.experts = ExpertTraining.of(model, recipe.moe, self.total_updates, given)
        self.policy = Policy(model, experts=self.experts)
        self.policy.check_packing()
        self.evaluator = Evaluator.of(recipe, self.tokenizer, processes)
        self.updates, self.seconds = 0, 0.0

    @property
    def total_updates(self) -> int:
        spec = self.recipe.sft
        return spec.steps or max(1, math.ceil(len(self.documents) * spec.epochs / spec.batch_size))

    def step(self, index: int) -> dict[str, float]:
        """One update: the mean negative log-likelihood per token of a batch of documents, in nats."""
        spec = self.recipe.sft
        positions = range((index - 1) * spec.batch_size, index * spec.batch_size)
        batch = [self.documents[permuted(p, len(self.documents), self.recipe.seed)] for p in positions]
        tokens = sum(len(d.completion_ids) for d in batch)  # known to every process: the batch is global
        sums = {"loss": 0.0}
        for pack in self.policy.pack(batch[self.backend.rank :: self.backend.world], spec.tokens_per_microbatch):
            logp, _, auxiliary = self.policy.training_logprobs(pack)
            loss = -logp.sum() / tokens
            sums["loss"] += float(loss.detach())
            if self.experts and auxiliary:
                loss = loss + self.experts.loss(auxiliary, tokens, len(batch))
                self.experts.log(sums, auxiliary, tokens, len(batch))
            self.backend.backward(loss)
        rate = learning_rate(self.recipe.optimizer, self.updates, self.total_updates)
        norm, _ = self.backend.step(rate)
        self.updates += 1
        return {
            **self.backend.sum(sums),
            **(self.experts.updated(self.updates) if self.experts else {}),
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_trained": float(tokens),
            "epoch": index * spec.batch_size / len(self.documents),
        }

    def run(self) -> dict[str, Any]:
        recipe, folder = self.recipe, self.folder
        self.resume()
        folder.progress.line(
            f"sft: {len(self.documents)} documents ({self.dropped} left out for their length), "
            f"{self.total_updates} updates, {sum(p.numel() for p in self.policy.model.parameters()):,} parameters"
        )
        last = self.updates
        if recipe.evaluate and recipe.evaluate.at_start and not last:
            self.evaluate(0, write=True)
        for index in range(self.updates + 1, self.total_updates + 1):
            if recipe.sft.max_seconds and self.seconds >= recipe.sft.max_seconds:
                break
            start = time.perf_counter()
            with folder.progress.phase(f"update {index}"):
                metrics = self.step(index)
            metrics["time/step"] = time.perf_counter() - start
            self.seconds += self.backend.gather(metrics["time/step"])[0]
            last = index
            evaluation = recipe.evaluate
            if evaluation and evaluation.every and index % evaluation.every == 0 and index < self.total_updates:
                metrics |= self.evaluate(index)
            if folder.metrics:
                folder.metrics.write(index, metrics)
            if index % max(1, self.total_updates // 20) == 0 or index == self.total_updates:
                folder.progress.line(
                    f"update {index}/{self.total_updates}, loss {metrics['loss']:.4f}, "
                    f"grad {metrics['grad_norm']:.2g}, lr {metrics['learning_rate']:.2g}, "
                    f"{metrics['time/step']:.1f} s"
                )
            if index % recipe.checkpoint.every == 0:
                self.save(index)
        self.save(last)
        results = self.evaluate(last, write=True)
        model = folder.folder / "model"
        if self.processes.rank == 0:
            folder.write_model(self.policy.model, self.tokenizer)
        self.processes.barrier()
        summary = {
            "pipeline": "sft", "model": str(model), "updates": self.updates, "seconds": self.seconds,
            "evaluation": results,
        }  # fmt: skip
        folder.finish(summary)
        return summary

    def evaluate(self, step: int, write: bool = False) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        return self.evaluator.measure(self.policy, self.folder, step, version=self.updates, write=write)

    def save(self, step: int) -> None:
        if self.processes.rank == 0 and step:
            state = {"step": step, "updates": self.updates, "seconds": self.seconds, **self.backend.state()}
            self.folder.checkpoints.save(step, state)
        self.processes.barrier()

    def resume(self) -> None:
        state = self.folder.checkpoints.load_latest() if self.recipe.resume == "auto" else None
        if state is not None:
            self.backend.load_state(state)
            self.updates, self.seconds = state["updates"], state["seconds"]
            self.folder.progress.line(f"resumed after update {self.updates}")
        self.folder.rewind(self.updates if state is not None else -1)
        self.processes.barrier()


def run_sft(recipe: SFTRecipe, processes: Processes) -> dict[str, Any]:
    """`pipeline: sft`."""
    return SFT(recipe, processes).run()
