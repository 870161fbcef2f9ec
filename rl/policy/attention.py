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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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


def recomputation_contexts(model: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing: (context of the forward, context in which the backward computes it again).

    The backward runs after `packed_attention` has been left, and must see the attention that the forward saw.
    """
    packed = model.config._attn_implementation == NAME
    return nullcontext(), packed_attention(model) if packed else nullcontext()


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Bool [..., Q, K]: True where the key is not after the query and inside its sliding window."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attention_core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """softmax(scale q k^T) v with mask None meaning causal; q [N, H, Q, D], k [N, H, K, D], v [N, H, K, E]."""
    if options.softcap is None:
        # The fused kernel on CPU wants D = E. Latent attention has fewer values than keys: zeros cost less than the
        # unfused path, which writes out all scores.
        values, missing = v.shape[-1], q.shape[-1] - v.shape[-1]
        if missing > 0 and q.device.type == "cpu":
            v = F.pad(v, (0, missing))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=options.scale)
        return out[..., :values]
    if mask is None:
        steps = torch.arange(q.shape[-2], device=q.device)
        mask = causal_mask(steps, steps, None)
    return product_attention(q, k, v, mask_bias(mask), options)


def mask_bias(mask: Tensor) -> Tensor:
    """What to add to float32 scores: 0 where the mask is True, -inf elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def product_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, options: Options) -> Tensor:
    """`attention_core` by two batched products and a softmax in float32.

    For softcaps, which fused kernels do not know, and for the few query rows of a decode step on CPU, where it
    is twice as fast as the fused kernel.
    """
    scores = torch.matmul(q, k.transpose(-1, -2)).float().mul_(options.scale)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return torch.matmul(scores.add_(bias).softmax(-1).to(q.dtype), v)


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

    Segments are brought into right-padded batches, one kernel call each. Right padding needs no mask under
    causal attention: a real query never sees a later key.
    """

    segments: list[Segment]
    # For prefill: layer -> what a sampler keeps of it, (k, v) or latents alone, [G, T, D] each.
    recorded: dict[int, tuple[Tensor, ...]] | None = None
    decodes = False  # see model.mla.LatentLayout

    def __post_init__(self) -> None:
        self.batches = _batches(self.segments)
        # source: for every place in the padded batches, the packed token (0 for padding);
        # place: for every packed token, its place in the padded batches.
        source: list[int] = []
        place = [0] * sum(s.length for s in self.segments)
        for batch in self.batches:
            for s in batch.segments:
                place[s.start : s.start + s.length] = range(len(source), len(source) + s.length)
                source += range(s.start, s.start + s.length)
                source += [0] * (batch.longest - s.length)
        self.identity = source == list(range(len(place)))  # already in place, nothing padded
        self.source, self.place = torch.tensor(source), torch.tensor(place)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        if self.recorded is not None:
            self.recorded.setdefault(layer, (k_GTD, v_GTD))  # unless the layer has kept latents instead
        if self.source.device != q_HTD.device:
            self.source, self.place = self.source.to(q_HTD.device), self.place.to(q_HTD.device)
        packed = [x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD)]  # [T, heads, D]
        padded = packed if self.identity else [_Pad.apply(x, self.source, self.place) for x in packed]
        pieces = [
            batch.attend(q, k, v, k_GTD, v_GTD, options)
            for batch, (q, k, v) in zip(self.batches, self._split(padded), strict=True)
        ]
        out = torch.cat(pieces) if len(pieces) > 1 else pieces[0]  # [padded places, H, D]
        if not self.identity:
            out = _Unpad.apply(out, self.source, self.place)
        return out.transpose(0, 1)

    @property
    def keeps(self) -> bool:
        return self.recorded is not None

    def keep(self, layer: int, cache_TD: Tensor) -> None:
        """Latents [T, D] that stand for the keys and values of all heads (multi-head latent attention)."""
        assert self.recorded is not None
        self.recorded[layer] = (cache_TD.unsqueeze(0),)

    def _split(self, padded: list[Tensor]) -> Iterator[list[Tensor]]:
        """Per batch: q, k, v as [rows, heads, longest, D]."""
        sizes = [len(b.segments) * b.longest for b in self.batches]
        for batch, *parts in zip(self.batches, *(x.split(sizes) for x in padded), strict=True):
            yield [x.unflatten(0, (len(batch.segments), batch.longest)).transpose(1, 2) for x in parts]


class _Pad(torch.autograd.Function):
    """x[source]. Each token has one place, so the gradient is a gather too (autograd would scatter-add)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x[source]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


class _Unpad(torch.autograd.Function):
    """x[place]: the inverse of `_Pad`; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.places = len(source)
        return x[place]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        padded = grad.new_zeros(ctx.places, *grad.shape[1:])
        padded[ctx.saved_tensors[0]] = grad
        return padded, None, None


@dataclass(frozen=True)
class _Batch:
    """Segments of one kernel call, padded on the right to the longest; all have the same prefix, or none."""

    segments: list[Segment]

    @property
    def longest(self) -> int:
        return max(s.length for s in self.segments)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        """q [rows, H, longest, D], k and v [rows, G, longest, D] -> [rows * longest, H, D]."""
        rows, heads, longest, _ = q.shape
        prefix = self.segments[0].prefix_length
        mask = None
        if prefix:
            start = self.segments[0].prefix_start
            k = torch.cat([k_GTD[:, start : start + prefix].expand(rows, -1, -1, -1), k], 2)
            v = torch.cat([v_GTD[:, start : start + prefix].expand(rows, -1, -1, -1), v], 2)
        if prefix or (options.window is not None and longest > options.window):
            positions = torch.arange(prefix + longest, device=q.device)
            mask = causal_mask(positions[prefix:], positions, options.window)
        repeat = heads // k.shape[1]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return attention_core(q, k, v, mask, options).transpose(1, 2).flatten(0, 1)


def _batches(segments: list[Segment], waste: float = 0.25) -> list[_Batch]:
    """Groups segments of one prefix; prefix-free ones by length, so that padding adds at most `waste`."""
    together: dict[tuple[int, int], list[Segment]] = defaultdict(list)
    for segment in segments:
        together[segment.prefix_start if segment.prefix_length else -1, segment.prefix_length].append(segment)
    batches: list[list[Segment]] = []
    for (_, prefix_length), members in together.items():
        members = members if prefix_length else sorted(members, key=lambda s: (-s.length, s.start))
        batch: list[Segment] = []
        for segment in members:
            if batch and not prefix_length and segment.length < (1 - waste) * batch[0].length:
                batches.append(batch)
                batch = []
            batch.append(segment)
        batches.append(batch)
    return [_Batch(batch) for batch in batches]
