"""The loop that every trainer shares: resume, step, evaluate, log, save, and the model at the end.

A trainer says what its step is and how many it takes. A step that is killed is run again from the last checkpoint: all
that it depends on is in there, or keyed by the step's number.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from model.fp8.convert import in_high_precision
from rl.evaluate import Evaluator
from rl.experience import Completion, completions_of
from rl.policy.backend import load_backend
from rl.policy.export import exhaust, export_model
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.lora import add_adapters, write_adapter
from rl.policy.moe import ExpertTraining
from rl.policy.policy import Policy
from rl.policy.precision import apply_precision
from rl.policy.processes import Processes
from rl.prompts import Prompt, Prompts, load_prompts, permuted, sampling_params
from rl.recipe import GRPORecipe, MoESpec, TrainSpec
from rl.recipe_gkd import GKDRecipe
from rl.rollout import LocalSampler, Streaming
from rl.rollout.make import make_sampler
from rl.rollout.sampling import stream_key
from rl.run.checkpoint import write_folder
from rl.run.folder import Run


class Training(ABC):
    """The state of a run. Subclasses load their data, then call `load_policy`."""

    name: str  # of the pipeline
    unit = "step"  # what log and summary call a step; "update" where each is a single update

    def __init__(self, recipe: TrainSpec, processes: Processes):
        self.recipe, self.processes = recipe, processes
        self.folder = Run(recipe, processes.rank, recipe.checkpoint.keep)
        self.tokenizer = load_tokenizer(recipe.model)
        self.steps_done = self.updates = 0
        self.saved = 0  # the step of the newest checkpoint
        self.seconds = 0.0

    def load_policy(self, moe: MoESpec, temperature: float = 1.0) -> None:
        """The model to train, its optimizer, and what measures it. temperature: of its log-probabilities."""
        recipe = self.recipe
        model = load_model(recipe.model, self.tokenizer, seed=recipe.seed, dtype=torch.float32)
        if recipe.model.lora is not None:
            add_adapters(model, recipe.model.lora, recipe.seed)
        self.parameters = sum(p.numel() for p in model.parameters())
        apply_precision(model, recipe.precision, self.processes, self.folder.progress)
        self.backend = load_backend(
            model, DTYPES[recipe.model.dtype], recipe.optimizer, self.processes,
            samples=self.samples, reference=self.has_reference,
        )  # fmt: skip
        self.experts = ExpertTraining.of(model, moe, self.total_updates, "moe" in recipe.model_fields_set)
        execution = self.backend.execution
        self.policy = Policy(model, temperature=temperature, experts=self.experts, execution=execution)
        with in_high_precision(model):  # FP8 multiplies what the order of sums rounds
            self.policy.check_packing()
        self.evaluator = Evaluator.of(recipe, self.tokenizer, self.processes)

    @property
    def samples(self) -> bool:
        """Whether the policy is sampled from in this process."""
        return self.recipe.evaluate is not None

    @property
    def has_reference(self) -> bool:
        """Whether there will be a frozen copy of the policy."""
        return False

    # ---- what a trainer says of itself -----------------------------------------------------------------

    @property
    @abstractmethod
    def total_steps(self) -> int: ...

    @property
    @abstractmethod
    def total_updates(self) -> int: ...

    @property
    @abstractmethod
    def max_seconds(self) -> float | None: ...

    @abstractmethod
    def describe(self) -> str:
        """What it learns from, for the first line of the log."""

    @abstractmethod
    def step(self, index: int) -> dict[str, float]:
        """Step number `index`, from 1; returns its metrics."""

    @abstractmethod
    def line(self, index: int, metrics: Mapping[str, float]) -> str | None:
        """The step in the log; None leaves it out."""

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for `tensors`."""
        counts = {"step": self.steps_done, "updates": self.updates, "seconds": self.seconds}
        return {**counts, **self.backend.state()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments, one at a time; every process takes all of them, as each may be gathered from all."""
        return self.backend.tensors()

    def load_state(self, state: dict[str, Any], read: Callable[[str], Any]) -> None:
        """read: a tensor of `tensors` by its name."""
        self.backend.load(state, read)
        self.steps_done, self.updates, self.seconds = state["step"], state["updates"], state["seconds"]

    # ---- the run ---------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        recipe, folder, evaluation = self.recipe, self.folder, self.recipe.evaluate
        self.resume()
        folder.progress.line(
            f"{self.name}: {self.describe()}, {self.parameters:,} parameters, {self.backend.world} process(es), "
            f"{self.processes.sharding}"
        )
        if evaluation and evaluation.at_start and not self.steps_done:
            self.evaluate(write=True)
        for index in range(self.steps_done + 1, self.total_steps + 1):
            if self.max_seconds and self.seconds >= self.max_seconds:
                break
            start = time.perf_counter()
            metrics = self.step(index)
            metrics["time/step"] = time.perf_counter() - start
            self.seconds += self.backend.gather(metrics["time/step"])[0]
            self.steps_done = index
            if evaluation and evaluation.every and index % evaluation.every == 0 and index < self.total_steps:
                metrics |= self.evaluate(write=False)
            if folder.metrics:
                folder.metrics.write(index, metrics)
            line = self.line(index, metrics)
            if line:
                folder.progress.line(line)
            if index % recipe.checkpoint.every == 0:
                self.save()
        self.save()
        return self.finish()

    def finish(self) -> dict[str, Any]:
        results = self.evaluate(write=True)
        self.write_model()
        summary = {
            "pipeline": self.name,
            "model": str(self.folder.folder / "model"),
            f"{self.unit}s": self.steps_done,
            "updates": self.updates,
            "seconds": self.seconds,
            "evaluation": results,
        }
        self.folder.finish(summary)
        return summary

    def write_model(self) -> None:
        """The model as an ordinary Hugging Face folder, adapters merged; beside it the adapter, if one was trained."""
        lora, first = self.recipe.model.lora is not None, self.processes.rank == 0
        export_model(self.folder.folder / "model", self.backend, self.tokenizer, adapters=lora)
        if lora:
            trained = self.backend.trained_weights()
            if first:
                target, base = self.folder.folder / "adapter", self.recipe.model.path
                write_folder(target, lambda path: write_adapter(path, self.policy.model, trained, base))
            else:
                exhaust(trained)
        self.processes.barrier()

    def evaluate(self, write: bool) -> dict[str, float]:
        """Results on the recipe's problems, if it has any; `write`: as a line of their own among the metrics."""
        if self.evaluator is None:
            return {}
        results = self.evaluator.run(self.evaluation_sampler(), self.folder, self.steps_done)
        if write and self.folder.metrics:
            self.folder.metrics.write(self.steps_done, {"evaluation": True, **results})
        return results

    def evaluation_sampler(self) -> Any:
        """A sampler that has the present weights."""
        spec = self.recipe.evaluate
        assert spec is not None
        sampler = LocalSampler(
            self.backend.sampler_model(),
            self.tokenizer,
            max_slots=spec.max_slots,
            slots=self.policy.packed,
            draft_tokens=spec.draft_tokens,
        )
        sampler.update_weights(self.backend.sampler_weights(), self.updates)
        return sampler

    def save(self) -> None:
        """A checkpoint of the last step, unless there is one."""
        if self.steps_done == self.saved:
            return
        if self.processes.rank == 0:
            self.folder.checkpoints.save(self.steps_done, self.state(), self.tensors())
        else:
            exhaust(self.tensors())
        self.processes.barrier()
        self.saved = self.steps_done

    def resume(self) -> None:
        found = self.folder.checkpoints.load_latest() if self.recipe.resume == "auto" else None
        if found is not None:
            self.load_state(*found)
            self.saved = self.steps_done
            self.folder.progress.line(f"resumed after {self.unit} {self.steps_done}")
        self.folder.rewind(self.steps_done if found is not None else -1)
        self.processes.barrier()


class SamplingTraining(Training):
    """A trainer whose policy samples completions of the prompts that it learns from."""

    recipe: GRPORecipe | GKDRecipe
    prompts: Prompts
    sampler: Any  # a Sampler; see rollout/make.py

    def load_prompts(self) -> Prompts:
        rollout = self.recipe.rollout
        return load_prompts(
            self.recipe.data, self.tokenizer, max_tokens=rollout.max_prompt_tokens, over_long=rollout.over_long_prompts
        )

    @property
    def samples(self) -> bool:
        return self.recipe.rollout.mode == "inprocess"

    def evaluation_sampler(self) -> Any:
        """In other modes the run's own, which was sent the weights after the last step: no process needs a whole model
        for it. It may be sampling for another thread, too, so what it shows of its progress is another's."""
        return super().evaluation_sampler() if self.samples else copy.copy(self.sampler)

    def load_sampler(self, record_routing: bool = False, sampler: Any = None) -> None:
        """The sampler that the recipe asks for, or the given one, and what keeps it at the policy's weights."""
        self.link = make_sampler(
            self.recipe, self.policy, self.backend, self.tokenizer, self.folder,
            record_routing=record_routing, sampler=sampler, evaluated=self.evaluator.longest if self.evaluator else 0,
        )  # fmt: skip
        self.sampler = self.link.sampler

    def resume(self) -> None:
        super().resume()
        self.send_weights()

    def run(self) -> dict[str, Any]:
        try:
            with self.beside():
                return super().run()
        finally:
            self.link.close()

    def beside(self) -> AbstractContextManager[Any]:
        """What samples in another thread while the run lasts. It ends before the sampler does."""
        return nullcontext()

    @property
    def shares_weights(self) -> bool:
        """Whether the sampler runs the very model that is trained."""
        return getattr(self.sampler, "model", None) is self.policy.model

    def send_weights(self) -> dict[str, float]:
        """The sampler's weights become the trainer's; metrics of the update."""
        return self.link.send(self.updates)

    def prompt_at(self, position: int) -> Prompt:
        """The prompt at a place of the endless stream."""
        return self.prompts.items[permuted(position, len(self.prompts), self.recipe.seed)]

    def draw(
        self,
        index: int,
        wanted: Mapping[int, int],
        samples: int,
        arrived: Callable[[list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Completions for groups {group: position in the stream of prompts}, by random numbers of step `index`.

        arrived: called during the sampling with the groups that have become complete; needs a sampler that streams.
        """
        groups, positions = list(wanted), list(wanted.values())
        prompts = [self.prompt_at(p) for p in positions]
        params = sampling_params(self.recipe.rollout, samples, stream_key(self.recipe.seed, index))
        ids = [p.ids for p in prompts]
        if arrived is None:
            drawn = self.sampler.generate(ids, params, streams=positions)
            return completions_of(prompts, groups, positions, drawn, self.tokenizer)
        assert isinstance(self.sampler, Streaming)
        found: dict[int, list[Completion]] = {}
        for complete in self.sampler.stream(ids, params, streams=positions):
            fresh = []
            for i, drawn_i in complete:
                found[i] = completions_of([prompts[i]], [groups[i]], [positions[i]], [drawn_i], self.tokenizer)
                fresh += found[i]
            arrived(fresh)
        return [completion for i in range(len(prompts)) for completion in found[i]]

    def save_samples(self, index: int, batch: list[Completion]) -> None:
        rows = [row for part in self.backend.gather([c.record(index) for c in batch]) for row in part]
        if self.processes.rank:
            return
        rows.sort(key=lambda row: row["group"])
        self.folder.write_samples(f"samples/step_{index:08d}.parquet", rows)
        every = self.recipe.log.samples_every
        if every and index % every == 0:
            self.folder.progress.samples(index, rows[: self.recipe.log.samples_shown])
