"""One attention function for packed training, prefill and slot decoding.

Hugging Face decoders hand every layer's query, key and value to a named attention function and pass extra
keyword arguments through to it. We register one name, `r1forge`, and pass a *layout* that says which tokens
may see which. So the same model code, unchanged, trains on packed documents, shares a prompt among the
completions of its group, prefills prompts and decodes a batch of ragged sequences from preallocated slots.

Why not `attention_mask` and restarting `position_ids`: transformers isolates documents that way only with
`attention_mask=None` *and* `use_cache=False`; otherwise it leaks silently, and a dense block mask costs 4-6x.

Shapes: T packed tokens, H query heads, G key/value heads (H a multiple of G), D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "r1forge"


class Options(NamedTuple):
    """What an architecture asks of its attention, besides the layout."""

    scale: float
    window: int | None = None  # a query sees keys at most window-1 positions back
    softcap: float | None = None  # scores = softcap * tanh(scores / softcap)


class Layout(Protocol):
    """Which of the packed tokens may see which."""

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        """Returns the attention output [H, T, D]."""
        ...


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers; query [1, H, T, D] -> output [1, T, H, D].

    Raises ValueError for anything that it would otherwise have to ignore.
    """
    if layout is None or attention_mask is not None:
        raise ValueError("r1forge attention needs a layout and no attention_mask; use `packed_attention(model)`")
    if dropout:
        raise ValueError("attention dropout is not supported: set attention_dropout to 0 in the model's config")
    if is_causal is False or other.get("s_aux") is not None or other.get("position_bias") is not None:
        raise ValueError("this model's attention is not plain causal attention (sinks, biases or bidirectional)")
    options = Options(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    out_HTD = layout.attend(module.layer_idx, query[0], key[0], value[0], options)  # type: ignore[arg-type]
    return out_HTD.transpose(0, 1).unsqueeze(0), None


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Within it the model's attention layers use layouts; afterwards they are as they were."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            # Not the public setter: it validates against the model class and recurses into loading kernels.
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Bool [..., Q, K]: True where the key is not after the query and inside its sliding window."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attention_core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """softmax(scale q k^T) v with mask None meaning causal; q [N, H, Q, D], k and v [N, H, K, D]."""
    if options.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=options.scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * options.scale
    scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        steps = torch.arange(q.shape[-2], device=q.device)
        mask = causal_mask(steps, steps, None)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v)


@dataclass(frozen=True)
class Segment:
    """Tokens [start, start+length) of the pack. They see themselves causally and all of the prefix segment."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass
class PackedLayout:
    """Documents in one row, isolated from each other; a completion may share its prompt with its group.

    The prompt of a group stands once in the pack, as a segment of its own; each completion is a segment
    whose prefix is the prompt. Exact: a completion's queries see the same keys as if the prompt stood
    before it, since position_ids go on from the prompt's.
    """

    segments: list[Segment]
    recorded: dict[int, tuple[Tensor, Tensor]] | None = None  # layer -> (k, v) [G, T, D], for prefill
    _batches: list[_Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        together = defaultdict(list)
        for segment in self.segments:
            # Segments of one prefix, and prefix-free ones of like length, go through one call of the kernel.
            # Right padding needs no mask under causal attention: a real query never sees a later key.
            key = (segment.prefix_start, segment.prefix_length, segment.length if not segment.prefix_length else 0)
            together[key].append(segment)
        self._batches = [_Batch(group) for group in together.values()]

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        if self.recorded is not None:
            self.recorded[layer] = (k_GTD, v_GTD)
        repeat = q_HTD.shape[0] // k_GTD.shape[0]
        if repeat > 1:
            k_GTD, v_GTD = k_GTD.repeat_interleave(repeat, 0), v_GTD.repeat_interleave(repeat, 0)
        pieces = [batch.attend(q_HTD, k_GTD, v_GTD, options) for batch in self._batches]
        order = [i for batch in self._batches for i in batch.indices]
        packed = torch.cat(pieces, 1)
        if order == list(range(len(order))):
            return packed
        return packed[:, torch.tensor(_inverse(order), device=packed.device)]


def _inverse(order: list[int]) -> list[int]:
    inverse = [0] * len(order)
    for position, token in enumerate(order):
        inverse[token] = position
    return inverse


class _Batch:
    """Segments that share one kernel call, padded on the right to the longest."""

    def __init__(self, segments: list[Segment]):
        self.segments = segments
        self.longest = max(s.length for s in segments)
        self.indices = [i for s in segments for i in range(s.start, s.start + s.length)]

    def attend(self, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, options: Options) -> Tensor:
        first = self.segments[0]
        q, k, v = (self._rows(x) for x in (q_HTD, k_HTD, v_HTD))
        mask = None
        if first.prefix_length:
            stop = first.prefix_start + first.prefix_length
            rows = len(self.segments)
            k = torch.cat([k_HTD[:, first.prefix_start : stop].expand(rows, -1, -1, -1), k], 2)
            v = torch.cat([v_HTD[:, first.prefix_start : stop].expand(rows, -1, -1, -1), v], 2)
        if first.prefix_length or (options.window is not None and self.longest > options.window):
            positions = torch.arange(first.prefix_length + self.longest, device=q.device)
            mask = causal_mask(positions[first.prefix_length :], positions, options.window)
        out = attention_core(q, k, v, mask, options)  # [rows, H, longest, D]
        return torch.cat([out[row, :, : s.length] for row, s in enumerate(self.segments)], 1)

    def _rows(self, x_HTD: Tensor) -> Tensor:
        rows = [
            F.pad(x_HTD[:, s.start : s.start + s.length], (0, 0, 0, self.longest - s.length))
            for s in self.segments
        ]
        return torch.stack(rows)
