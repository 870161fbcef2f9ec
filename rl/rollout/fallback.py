"""Sampling through transformers' `generate`, for architectures whose key/value cache we cannot drive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rl.rollout.sampling import choose, stream_key, uniform
from rl.rollout.types import Sample, SamplingParams


class _Draw:
    """A logits processor that draws by our own streams and leaves only the drawn token possible.

    So seeds, log-probabilities and processing are the same as with slots.
    """

    def __init__(self, keys: list[int], params: SamplingParams, stops: frozenset[int], prompt_length: int):
        self.keys, self.params, self.stops, self.prompt_length = keys, params, stops, prompt_length
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.float()
        if step < self.params.min_tokens and self.stops:
            scores[:, sorted(self.stops)] = float("-inf")
        draws = torch.tensor([uniform(key, step) for key in self.keys], dtype=torch.float64)
        tokens, logps = choose(
            scores,
            draws.to(scores.device),
            temperature=self.params.temperature,
            top_k=self.params.top_k,
            top_p=self.params.top_p,
        )
        self.logprobs.append(logps)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)


@contextmanager
def plain_generation_config(model: Any) -> Iterator[None]:
    """The checkpoint's own generation config might penalise repetition or suppress tokens: not the policy."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def generate_with_transformers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    keys: list[int],
    stops: frozenset[int],
    version: int,
    batch_size: int,
) -> list[list[Sample]]:
    """Left-padded batches of at most batch_size sequences; results as `LocalSampler.generate` gives them."""
    jobs = [(i, j) for i in range(len(prompts)) for j in range(params.n)]
    jobs.sort(key=lambda job: (len(prompts[job[0]]), job))
    results: dict[tuple[int, int], Sample] = {}
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        width = max(len(prompts[i]) for i, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, (i, _) in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            attention[row, width - len(prompts[i]) :] = 1
        drawing = _Draw([stream_key(keys[i], j) for i, j in batch], params, stops, width)
        with plain_generation_config(model):
            output = model.generate(
                ids.to(model.device),
                attention_mask=attention.to(model.device),
                max_new_tokens=params.max_tokens,
                do_sample=False,
                eos_token_id=sorted(stops) or None,
                pad_token_id=0,
                logits_processor=[drawing],
                use_cache=True,
            )
        logprobs = torch.stack(drawing.logprobs, 1)
        for row, job in enumerate(batch):
            tokens = output[row, width:].tolist()
            length = next((t + 1 for t, token in enumerate(tokens) if token in stops), len(tokens))
            reason = "stop" if tokens[length - 1] in stops else "length"
            results[job] = Sample(tokens[:length], logprobs[row, :length].tolist(), reason, version)  # type: ignore[arg-type]
    return [[results[i, j] for j in range(params.n)] for i in range(len(prompts))]
