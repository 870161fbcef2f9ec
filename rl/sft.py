"""Supervised fine-tuning on worked solutions, on the same packing, log-probabilities and backend as GRPO."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from data.templates import render_completion, resolve_template
from rl.evaluate import Evaluator
from rl.policy.backend import Processes, Replicated, learning_rate
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.prompts import load_prompts, permuted
from rl.recipe import SFTRecipe
from rl.recipe_io import RecipeError
from rl.run.folder import Run


def load_documents(recipe: SFTRecipe, tokenizer: Any) -> tuple[list[Document], int]:
    """Prompt and worked solution of each problem, EOS included, and how many were too long.

    The completion is tokenised apart from the prompt, as sampling will continue it.
    """
    template = resolve_template(recipe.data.template)
    prompts = load_prompts(recipe.data, tokenizer, max_tokens=recipe.sft.max_tokens)
    documents, dropped = [], prompts.dropped
    for prompt in prompts.items:
        if not prompt.row.get("reasoning") and "{reasoning}" in template.completion:
            raise RecipeError(
                f"data: problem {prompt.row['id']} has no `reasoning` to learn from; map it with "
                "data.columns: {reasoning: COLUMN}, or use a template whose completion has no {reasoning}"
            )
        if not prompt.row.get("response") and "{response}" in template.completion:
            raise RecipeError(
                f"data: problem {prompt.row['id']} has no `response` to learn from, as the pool of a distillation has; "
                "map it with data.columns: {response: COLUMN}, or use a template whose completion has {answer}"
            )
        # A trace ends in its teacher's own answer, which need not be the right one.
        answer = prompt.row.get("solution_answer") or prompt.row["answer"]
        response = prompt.row.get("response") or ""
        text = render_completion(prompt.row.get("reasoning") or "", answer, template, response)
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(prompt.ids) + len(ids) > recipe.sft.max_tokens:
            dropped += 1
        else:
            documents.append(Document(prompt.ids, ids))
    if not documents:
        raise RecipeError(f"sft.max_tokens: no document is within {recipe.sft.max_tokens} tokens")
    return documents, dropped


class SFT:
    def __init__(self, recipe: SFTRecipe, processes: Processes):
        self.recipe, self.processes = recipe, processes
        self.folder = Run(recipe, processes.rank, recipe.checkpoint.keep)
        self.tokenizer = load_tokenizer(recipe.model)
        self.documents, self.dropped = load_documents(recipe, self.tokenizer)
        model = load_model(recipe.model, self.tokenizer, seed=recipe.seed, dtype=torch.float32).to(processes.device)
        self.backend = Replicated(model, DTYPES[recipe.model.dtype], recipe.optimizer, processes)
        self.policy = Policy(model)
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
        total = 0.0
        for pack in self.policy.pack(batch[self.backend.rank :: self.backend.world], spec.tokens_per_microbatch):
            logp, _ = self.policy.logprobs(pack)
            loss = -logp.sum() / tokens
            self.backend.backward(loss)
            total += float(loss.detach())
        rate = learning_rate(self.recipe.optimizer, self.updates, self.total_updates)
        norm, _ = self.backend.step(rate)
        self.updates += 1
        return {
            **self.backend.sum({"loss": total}),
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_trained": float(tokens),
            "epoch": index * spec.batch_size / len(self.documents),
        }

    def run(self) -> dict[str, Any]:
        recipe, folder = self.recipe, self.folder
        self.resume()
        folder.progress.line(
            f"sft: {len(self.documents)} documents ({self.dropped} over-long dropped), {self.total_updates} updates, "
            f"{sum(p.numel() for p in self.policy.model.parameters()):,} parameters"
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
