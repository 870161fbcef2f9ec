"""One decode step over the running slots: eager on CPU, a CUDA graph per batch bucket on GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl.rollout.slots import DecodeLayout, Slots

BATCH_BUCKET = 8  # CUDA graphs are captured for batches rounded up to this,
SPAN_BUCKET = 256  # and for key spans rounded up to this


class DecodeStep:
    """Called with the last token of each running sequence and the tokens in its slot; returns logits [B, V]."""

    def __init__(self, model: Any, slots: Slots):
        self.model, self.slots = model, slots
        self.device = model.device
        self.graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, tokens: list[int], lengths: list[int]) -> Tensor:
        span = max(lengths) + 1
        if self.device.type != "cuda":
            return self._forward(torch.tensor(tokens), torch.tensor(lengths), span)
        batch = min(-(-len(tokens) // BATCH_BUCKET) * BATCH_BUCKET, self.slots.count)
        span = min(-(-span // SPAN_BUCKET) * SPAN_BUCKET, self.slots.capacity)
        graph = self.graphs.get((batch, span))
        if graph is None:
            graph = self.graphs[batch, span] = _Graph(self, batch, span)
        return graph(tokens, lengths)[: len(tokens)]

    def _forward(self, tokens_B: Tensor, lengths_B: Tensor, span: int) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens_B[None],
            position_ids=lengths_B[None],
            use_cache=False,
            layout=DecodeLayout(self.slots, lengths_B, span),
        ).logits
        return logits[0]


class _Graph:
    """A captured decode step. Rows beyond the running ones write into their own, unused slots."""

    def __init__(self, step: DecodeStep, batch: int, span: int):
        self.tokens = torch.zeros(batch, dtype=torch.long, device=step.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=step.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Warm-up runs must not disturb the slots: they write the keys of token 0 at position 0 of each row,
        # so they run on positions past every real one.
        self.lengths.fill_(span - 1)
        kept = {
            i: (k[:batch, :, span - 1].clone(), v[:batch, :, span - 1].clone())
            for i, (k, v) in step.slots.layers.items()
        }
        with torch.cuda.stream(side):
            for _ in range(2):
                step._forward(self.tokens, self.lengths, span)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step._forward(self.tokens, self.lengths, span)
        for i, (k, v) in kept.items():
            step.slots.layers[i][0][:batch, :, span - 1] = k
            step.slots.layers[i][1][:batch, :, span - 1] = v

    def __call__(self, tokens: list[int], lengths: list[int]) -> Tensor:
        count = len(tokens)
        self.tokens[:count] = torch.tensor(tokens, device=self.tokens.device)
        self.lengths[:count] = torch.tensor(lengths, device=self.lengths.device)
        self.lengths[count:] = 0
        self.graph.replay()
        return self.logits
