"""Preallocated key/value slots: one row per running sequence, and the layout that decodes from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.policy.attention import Options, attention_core


class Slots:
    """Keys and values of up to `count` sequences of up to `capacity` tokens, per layer.

    Tensors are [count, G, capacity, D], allocated when a layer first writes: head counts and sizes may
    differ between layers, and keys and values may differ in size (multi-head latent attention).
    Running sequences always fill rows 0..B-1, so that a step reads a view, never a gather.
    """

    def __init__(self, count: int, capacity: int):
        self.count, self.capacity = count, capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, shaped after key and value [G, T, D]."""
        if index not in self.layers:
            k, v = (
                torch.zeros(self.count, x.shape[0], self.capacity, x.shape[-1], dtype=x.dtype, device=x.device)
                for x in (key, value)
            )
            self.layers[index] = (k, v)
        return self.layers[index]

    def fill(self, rows: list[int], recorded: dict[int, tuple[Tensor, Tensor]], start: int, length: int) -> None:
        """Copies tokens [start, start+length) of a prefilled pack into rows (one prompt, many samples)."""
        for index, (key, value) in recorded.items():
            for buffer, x in zip(self.layer(index, key, value), (key, value), strict=True):
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
    read: at least max(lengths)+1.
    """

    slots: Slots
    lengths_B: Tensor
    span: int

    def __post_init__(self) -> None:
        steps = torch.arange(self.span, device=self.lengths_B.device)
        self.distance_BK = self.lengths_B.unsqueeze(1) - steps
        self.visible_BK = self.distance_BK >= 0
        self.rows_B = torch.arange(len(self.lengths_B), device=self.lengths_B.device)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        heads, batch, size = q_HTD.shape
        groups = k_GTD.shape[0]
        k_cache, v_cache = self.slots.layer(layer, k_GTD, v_GTD)
        k_cache[self.rows_B, :, self.lengths_B] = k_GTD.transpose(0, 1)
        v_cache[self.rows_B, :, self.lengths_B] = v_GTD.transpose(0, 1)
        visible = self.visible_BK
        if options.window is not None and self.span > options.window:
            visible = visible & (self.distance_BK < options.window)
        # The H/G query heads of one key head stand as that head's query rows: no copy of keys is made.
        q = q_HTD.transpose(0, 1).reshape(batch, groups, heads // groups, size)
        k, v = k_cache[:batch, :, : self.span], v_cache[:batch, :, : self.span]
        out = attention_core(q, k, v, visible[:, None, None, :], options)
        return out.reshape(batch, heads, -1).transpose(0, 1)
