"""One decode step over the running slots: eager on CPU, a CUDA graph per batch bucket on GPU.

FP8 by the reference, as on GPUs without E4M3, is eager there too: it waits for the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.fp8.context import waits_for_host
from rl.rollout.slots import DecodeLayout, Slots

BATCH_BUCKET = 8  # CUDA graphs are captured for batches rounded up to this,
SPAN_BUCKET = 256  # and for key spans rounded up to this


class Decoded(NamedTuple):
    """Of B sequences with W new tokens each. state only where the model gives it (our MoE), routed if asked for."""

    logits_BWV: Tensor
    state_BWC: Tensor | None  # what the model's prediction module reads
    routed_BWLK: Tensor | None  # the experts that each token met in each layer with experts

    def rows(self, count: int) -> Decoded:
        state, routed = (None if x is None else x[:count] for x in self[1:])
        return Decoded(self.logits_BWV[:count], state, routed)


class DecodeStep:
    """Called with the newest `width` tokens of each running sequence and the tokens in its slot before them."""

    def __init__(self, model: Any, slots: Slots, width: int = 1, *, routed: bool = False):
        self.model, self.slots, self.width, self.routed = model, slots, width, routed
        self.device = model.device
        self.captured = self.device.type == "cuda" and not waits_for_host(model, self.device)
        self.graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, tokens: list[list[int]], lengths: list[int]) -> Decoded:
        span = max(lengths) + self.width
        if not self.captured:
            tokens_BW, lengths_B = (torch.tensor(given, device=self.device) for given in (tokens, lengths))
            return self._forward(tokens_BW, lengths_B, span)
        batch = min(-(-len(tokens) // BATCH_BUCKET) * BATCH_BUCKET, self.slots.count)
        span = min(-(-span // SPAN_BUCKET) * SPAN_BUCKET, self.slots.capacity)
        graph = self.graphs.get((batch, span))
        if graph is None:
            graph = self.graphs[batch, span] = _Graph(self, batch, span)
        return graph(tokens, lengths).rows(len(tokens))

    def _forward(self, tokens_BW: Tensor, lengths_B: Tensor, span: int) -> Decoded:
        layout = DecodeLayout(self.slots, lengths_B, span, self.width)
        out = self.model(
            input_ids=tokens_BW.reshape(1, -1),
            position_ids=layout.positions_BW.reshape(1, -1),
            use_cache=False,
            layout=layout,
        )
        shape = tokens_BW.shape
        state, routed = getattr(out, "mtp_state", None), routed_experts(out) if self.routed else None
        return Decoded(
            out.logits[0].unflatten(0, shape),
            None if state is None else state[0].unflatten(0, shape),
            None if routed is None else routed.unflatten(0, shape),
        )


def routed_experts(out: Any) -> Tensor | None:
    """Indices [T, L, K] of the experts that each token met in the layers that have experts, lowest layer first."""
    routing = getattr(out, "routing", None)
    return torch.stack([routing[layer] for layer in sorted(routing)], 1) if routing else None


class _Graph:
    """A captured decode step. Rows beyond the running ones write into their own, unused slots."""

    def __init__(self, step: DecodeStep, batch: int, span: int):
        self.tokens = torch.zeros(batch, step.width, dtype=torch.long, device=step.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=step.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Warm-up runs must not disturb the slots: they write at the last positions of the span, which are put back.
        start = span - step.width
        self.lengths.fill_(start)
        kept = {
            i: [buffer[:batch, :, start:span].clone() for buffer in buffers] for i, buffers in step.slots.layers.items()
        }
        with torch.cuda.stream(side):
            for _ in range(2):
                step._forward(self.tokens, self.lengths, span)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.decoded = step._forward(self.tokens, self.lengths, span)
        for i, copies in kept.items():
            for buffer, copy in zip(step.slots.layers[i], copies, strict=True):
                buffer[:batch, :, start:span] = copy

    def __call__(self, tokens: list[list[int]], lengths: list[int]) -> Decoded:
        count = len(tokens)
        self.tokens[:count] = torch.tensor(tokens, device=self.tokens.device)
        self.lengths[:count] = torch.tensor(lengths, device=self.lengths.device)
        self.lengths[count:] = 0
        self.graph.replay()
        return self.decoded
