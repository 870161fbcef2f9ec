"""Generalized knowledge distillation (arXiv 2306.13649): a student learns the whole next-token distributions of a
teacher, on its own samples (on-policy) or on given solutions.

A step is: the student's samples of the step's prompts, or solutions of the data -> both models' hidden states -> their
divergence at every completion token -> one update. Samples are data: no gradient goes through how they were drawn.
The mathematics is in `objective/divergence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rl.documents import solved_problems
from rl.objective.divergence import token_divergence
from rl.policy.backend import Processes, learning_rate
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.packing import Document, Pack
from rl.policy.policy import Policy
from rl.policy.vocabulary import check_rows, restricted, shared_vocabulary
from rl.prompts import permuted
from rl.recipe_gkd import GKDRecipe
from rl.rollout.sampling import stream_key, uniform
from rl.run.progress import Timer
from rl.train_log import summed
from rl.training import SamplingTraining

_POLICY_STREAM = 0x676B64  # apart from the streams that tokens are drawn with


class GKD(SamplingTraining):
    """The state of a run and its step."""

    recipe: GKDRecipe
    name = "gkd"

    def __init__(self, recipe: GKDRecipe, processes: Processes):
        super().__init__(recipe, processes)
        theirs = load_tokenizer(recipe.teacher, "teacher")
        self.vocabulary = shared_vocabulary(self.tokenizer, theirs)
        if recipe.gkd.on_policy > 0:
            self.prompts = self.load_prompts()
        self.solutions: list[Document] = []
        self.too_long = 0
        if recipe.gkd.on_policy < 1:
            self.solutions, self.too_long = solved_problems(
                recipe.data, self.tokenizer, recipe.longest_document, "rollout.max_tokens"
            )
        self.load_policy(recipe.moe, recipe.rollout.temperature)
        self.teacher = self.load_teacher(theirs)
        for field, policy in (("model", self.policy), ("teacher", self.teacher)):
            check_rows(policy.head, self.vocabulary, field)
        # Both read the same packs: where the teacher cannot read packed documents, it cuts them.
        self.packer = self.policy if self.teacher.packed else self.teacher
        self.sampler = self.load_sampler()

    def load_teacher(self, tokenizer: Any) -> Policy:
        """Frozen, in the compute type of its own."""
        spec = self.recipe.teacher
        model = load_model(spec, tokenizer, dtype=DTYPES[spec.dtype], field="teacher").requires_grad_(False)
        teacher = Policy(model.to(self.processes.device))
        teacher.check_packing()
        return teacher

    # ---- one step --------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        timer, on_policy = Timer(), self.on_policy(index)
        with timer("rollout"), self.folder.progress.phase(f"step {index}: rollout"):
            documents, lengths = self.sampled(index) if on_policy else (self.given(index), {})
        with timer("train"), self.folder.progress.phase(f"step {index}: training"):
            metrics = self.update(documents)
        self.sampler.update_weights((), self.updates)  # the sampler shares the trainer's tensors
        return {
            **metrics,
            **lengths,
            "on_policy": float(on_policy),
            **{f"time/{k}": v for k, v in timer.seconds.items()},
        }

    def on_policy(self, index: int) -> bool:
        """Whether step `index` learns from the student's samples, by a random number of its own."""
        return uniform(stream_key(self.recipe.seed, _POLICY_STREAM), index) < self.recipe.gkd.on_policy

    def sampled(self, index: int) -> tuple[list[Document], dict[str, float]]:
        """The student's completions of this process's share of the step's prompts; how many of all were cut off."""
        spec = self.recipe.gkd
        groups = range(self.backend.rank, spec.prompts_per_step, self.backend.world)
        wanted = {g: (index - 1) * spec.prompts_per_step + g for g in groups}
        batch = self.draw(index, wanted, spec.samples_per_prompt)
        self.save_samples(index, batch)
        counts = self.backend.sum({"cut": float(sum(c.truncated for c in batch)), "all": float(len(batch))})
        documents = [d for c in batch if (d := self.readable(c.document)).completion_ids]
        return documents, {"length/truncated": counts["cut"] / counts["all"]}

    def readable(self, document: Document) -> Document:
        """The document up to where the student drew a padding row of its embedding, which the teacher may not have."""
        ids = document.completion_ids
        stop = next((i for i, token in enumerate(ids) if token >= self.vocabulary), len(ids))
        return document if stop == len(ids) else replace(document, completion_ids=ids[:stop])

    def given(self, index: int) -> list[Document]:
        """This process's share of as many solutions as a step on samples has completions."""
        spec, count = self.recipe.gkd, len(self.solutions)
        size = spec.prompts_per_step * spec.samples_per_prompt
        positions = range((index - 1) * size + self.backend.rank, index * size, self.backend.world)
        return [self.solutions[permuted(p, count, self.recipe.seed)] for p in positions]

    def update(self, documents: list[Document]) -> dict[str, float]:
        """One optimizer update on these and the other processes' documents; its metrics."""
        spec = self.recipe.gkd
        # Known before the first micro-batch, and the same for every split and number of processes.
        lengths = [len(d.completion_ids) for d in documents]
        totals = self.backend.sum({"tokens": float(sum(lengths)), "documents": float(len(documents))})
        longest = max(max(part, default=0) for part in self.backend.gather(lengths))
        sums: dict[str, float] = {}
        for pack in self.packer.pack(documents, spec.tokens_per_microbatch, spec.share_prompts):
            self.backend.backward(self.loss(pack, totals, sums))
        rate = learning_rate(self.recipe.optimizer, self.updates, self.total_updates)
        norm, updated = self.backend.step(rate)
        self.updates += 1
        return {
            **summed(sums, self.backend),
            **(self.experts.updated(self.updates) if self.experts else {}),
            "length/mean": totals["tokens"] / totals["documents"] if totals["documents"] else math.nan,
            "length/max": float(longest),
            "grad_norm": norm,
            "learning_rate": rate,
            "updates_skipped": float(not updated),
            "tokens_trained": totals["tokens"],
            "completions": totals["documents"],
        }

    def loss(self, pack: Pack, totals: Mapping[str, float], sums: dict[str, float]) -> torch.Tensor:
        """The micro-batch's part of the mean divergence over all completion tokens; the parts add up.

        totals: tokens and documents of the whole batch. sums: metrics, to which the pack's parts are added.
        """
        spec = self.recipe.gkd
        with torch.no_grad():
            teacher = self.teacher.states(pack)
        student, auxiliary = self.policy.training_states(pack)
        found = token_divergence(
            student, restricted(self.policy.head, self.vocabulary),
            teacher, restricted(self.teacher.head, self.vocabulary),
            kind=spec.divergence, beta=spec.beta, temperature=spec.temperature,
        )  # fmt: skip
        parts = {"divergence": found.value.detach(), "entropy": found.entropy, "agreement": found.agrees}
        for name, values in parts.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum()) / totals["tokens"]
        loss = found.value.sum() / totals["tokens"]
        if self.experts and auxiliary:
            loss = loss + self.experts.loss(auxiliary, totals["tokens"], totals["documents"])
            self.experts.log(sums, auxiliary, totals["tokens"], totals["documents"])
        return loss

    # ---- the run ---------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.recipe.gkd.steps

    @property
    def total_updates(self) -> int:
        return self.total_steps

    @property
    def max_seconds(self) -> float | None:
        return self.recipe.gkd.max_seconds

    def describe(self) -> str:
        parts = []
        if self.recipe.gkd.on_policy > 0:
            parts.append(f"{len(self.prompts)} prompts ({self.prompts.dropped} over-long dropped)")
        if self.recipe.gkd.on_policy < 1:
            parts.append(f"{len(self.solutions)} solutions ({self.too_long} over-long dropped)")
        return " and ".join(parts)

    def line(self, index: int, metrics: Mapping[str, float]) -> str:
        source = "samples" if metrics["on_policy"] else "solutions"
        timings = " ".join(f"{k.removeprefix('time/')} {v:.1f}" for k, v in metrics.items() if k.startswith("time/"))
        return (
            f"step {index}/{self.total_steps}, divergence {metrics['divergence']:.4f} on {source}, "
            f"agreement {metrics['agreement']:.1%}, entropy {metrics['entropy']:.3f}, "
            f"length {metrics['length/mean']:.0f}, grad {metrics['grad_norm']:.2g} | s: {timings}"
        )


def run_gkd(recipe: GKDRecipe, processes: Processes) -> dict[str, Any]:
    """`pipeline: gkd`."""
    return GKD(recipe, processes).run()
