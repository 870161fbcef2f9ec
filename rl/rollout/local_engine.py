"""`LocalEngine`: an `Engine` over `LocalSampler`, so that workers need nothing beyond this package."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.fp8.named import plain_weights
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.precision import convert
from rl.recipe_model import ModelSpec, PrecisionSpec
from rl.rollout.local import LocalSampler, evaluating
from rl.rollout.types import Sample, SamplingParams


@dataclass(frozen=True)
class _Request:
    key: str
    prompt: Sequence[int]
    params: SamplingParams
    stream: int


class LocalEngine:
    """Samples one batch at a time: what is submitted while a batch runs makes up the next one.

    A batch is everything waiting that was asked for with the same settings. `step` moves it by one token for every
    running sequence. Weights and scores have to wait for its end.
    """

    takes_weights_midway = False

    def __init__(self, sampler: LocalSampler):
        self.sampler = sampler
        self._waiting: dict[str, _Request] = {}
        self._running: dict[int, _Request] = {}  # unfinished ones, by their place in the batch
        self._batch: Generator[list[tuple[int, list[Sample]]], None, None] | None = None

    @classmethod
    def load(
        cls, model_path: str, *, dtype: str = "bfloat16", precision: str | dict[str, Any] = "bf16",
        device: str | None = None, threads: int | None = None, **options: Any,
    ) -> LocalEngine:  # fmt: skip
        """From a model folder or hub id. precision: as in a recipe. options: of `LocalSampler` (max_slots,
        prefill_tokens, draft_tokens, ...)."""
        if threads is not None:
            torch.set_num_threads(threads)
        spec = ModelSpec.model_validate({"path": model_path, "dtype": dtype})
        products = PrecisionSpec.model_validate(precision)
        tokenizer = load_tokenizer(spec)
        model = load_model(spec, tokenizer, dtype=DTYPES[spec.dtype])
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if products.kind == "fp8":
            print(convert(model, products, model.device), flush=True)
        return cls(LocalSampler(model, tokenizer, **options))

    @property
    def version(self) -> int:
        return self.sampler.version

    @version.setter
    def version(self, version: int) -> None:
        self.sampler.version = version

    def submit(self, key: str, prompt: Sequence[int], params: SamplingParams, stream: int) -> None:
        self._check(prompt)
        self._waiting[key] = _Request(key, prompt, params, stream)

    def step(self) -> list[tuple[str, list[Sample]]]:
        if self._batch is None:
            if not self._waiting:
                return []
            self._begin()
        assert self._batch is not None
        groups = [
            (self._running.pop(place).key, samples) for place, samples in next(self._batch) if place in self._running
        ]
        if not self._running:
            self._end()
        return groups

    def abort(self, key: str) -> None:
        self._waiting.pop(key, None)
        self._running = {place: r for place, r in self._running.items() if r.key != key}
        if not self._running:
            self._end()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._between_batches("weights cannot change")
        self.sampler.update_weights(plain_weights(named_tensors, self.sampler.model.device), version)

    @torch.inference_mode()
    def score(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        self._between_batches("nothing can be scored")
        for sequence in tokens:
            self._check(sequence)
        model, scores = self.sampler.model, []
        with evaluating(model):
            for sequence in tokens:
                ids = torch.tensor([list(sequence)], device=model.device)
                logp = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                scores.append(logp.gather(-1, ids[0, 1:, None])[:, 0].tolist())
        return scores

    def idle(self) -> bool:
        return self._batch is None and not self._waiting

    def close(self) -> None:
        self._waiting.clear()
        self._running.clear()
        self._end()
        self.sampler.release()

    def _begin(self) -> None:
        """Everything that is waiting with the settings of the first."""
        params = next(iter(self._waiting.values())).params
        batch = [r for r in self._waiting.values() if r.params == params]
        self._waiting = {key: r for key, r in self._waiting.items() if r.params != params}
        self._running = dict(enumerate(batch))
        self._batch = self.sampler.stream([r.prompt for r in batch], params, streams=[r.stream for r in batch])

    def _end(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def _check(self, tokens: Sequence[int]) -> None:
        """A token outside the embedding would end a CUDA process."""
        vocabulary = self.sampler.model.config.get_text_config().vocab_size
        if not tokens:
            raise ValueError("the prompt is empty")
        if not all(0 <= token < vocabulary for token in tokens):
            raise ValueError(f"there are tokens outside the model's vocabulary of {vocabulary}")

    def _between_batches(self, what: str) -> None:
        if self._batch is not None:
            raise RuntimeError(f"{what} while a batch is being sampled")
