"""Preallocated key/value slots: one row per running sequence, and the layout that decodes from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.policy.attention import Options, attention_core, mask_bias, product_attention

GROWTH = 64  # tokens


class Slots:
    """Keys and values of up to `count` sequences of up to `capacity` tokens, per layer.

    Tensors are [count, G, allocated, D], allocated when a layer first writes: head counts and sizes may
    differ between layers, and keys and values may differ in size (multi-head latent attention).
    Running sequences always fill rows 0..B-1, so that a step reads a view, never a gather.

    `fixed`: everything is allocated at once (a CUDA graph keeps the addresses). Otherwise buffers grow by GROWTH
    tokens as the longest sequence does, layer by layer: long limits cost nothing until they are used, and a
    step reads whole buffers, which batched products take twice as fast as slices of them.
    """

    def __init__(self, count: int, capacity: int, *, fixed: bool = True):
        self.count, self.capacity, self.fixed = count, capacity, fixed
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def room(self, tokens: int) -> int:
        """How long the buffers are that hold sequences of this length."""
        return self.capacity if self.fixed else min(-(-tokens // GROWTH) * GROWTH, self.capacity)

    def layer(self, index: int, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, shaped after key and value [G, T, D], with room for at least `tokens`."""
        have = self.layers.get(index)
        if have is None or have[0].shape[2] < tokens:
            size = self.room(tokens)
            k, v = (
                torch.zeros(self.count, x.shape[0], size, x.shape[-1], dtype=x.dtype, device=x.device)
                for x in (key, value)
            )
            if have is not None:
                for new, old in zip((k, v), have, strict=True):
                    new[:, :, : old.shape[2]] = old
            self.layers[index] = (k, v)
        return self.layers[index]

    def fill(self, rows: list[int], recorded: dict[int, tuple[Tensor, Tensor]], start: int, length: int) -> None:
        """Copies tokens [start, start+length) of a prefilled pack into rows (one prompt, many samples)."""
        for index, (key, value) in recorded.items():
            for buffer, x in zip(self.layer(index, key, value, length), (key, value), strict=True):
                for row in rows:
                    buffer[row, :, :length] = x[:, start : start + length]

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a sequence to another row (the last running one takes the place of a finished one)."""
        for key, value in self.layers.values():
            key[target, :, :length] = key[source, :, :length]
            value[target, :, :length] = value[source, :, :length]


@dataclass
class DecodeLayout:
    """B sequences, one new token each, packed as one row of B tokens.

    lengths_B: tokens already in each slot, which is also the new token's position. `span` bounds the keys
    written and read: at least max(lengths)+1. What lies beyond a sequence's length is masked.
    """

    slots: Slots
    lengths_B: Tensor
    span: int

    def __post_init__(self) -> None:
        if not self.slots.fixed:
            self.span = self.slots.room(self.span)
        steps = torch.arange(self.span, device=self.lengths_B.device)
        self.distance_BK = self.lengths_B.unsqueeze(1) - steps
        self.rows_B = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        self.masks: dict[int | None, Tensor] = {}  # by window: layers take turns with them

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        heads, batch, size = q_HTD.shape
        groups = k_GTD.shape[0]
        k_cache, v_cache = self.slots.layer(layer, k_GTD, v_GTD, self.span)
        k_cache[self.rows_B, :, self.lengths_B] = k_GTD.transpose(0, 1)
        v_cache[self.rows_B, :, self.lengths_B] = v_GTD.transpose(0, 1)
        # The H/G query heads of one key head stand as that head's query rows: no copy of keys is made.
        q = q_HTD.transpose(0, 1).reshape(batch, groups, heads // groups, size)
        k, v = k_cache[:batch, :, : self.span], v_cache[:batch, :, : self.span]
        core = attention_core if q.device.type == "cuda" else product_attention
        out = core(q, k, v, self._mask(options.window), options)
        return out.reshape(batch, heads, -1).transpose(0, 1)

    def _mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, K]: which keys are seen; as bool for fused kernels, to be added for products."""
        if window not in self.masks:
            visible = self.distance_BK >= 0
            if window is not None:
                visible &= self.distance_BK < window
            fused = self.lengths_B.device.type == "cuda"
            self.masks[window] = (visible if fused else mask_bias(visible))[:, None, None, :]
        return self.masks[window]
