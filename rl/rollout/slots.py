"""Preallocated key/value slots: one row per running sequence, and the layout that decodes from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.policy.attention import Options, attention_core, mask_bias, product_attention

GROWTH = 64  # tokens


class Slots:
    """What a layer keeps of up to `count` sequences of up to `capacity` tokens: keys and values, or latents alone.

    Each layer has one tensor [count, G, allocated, D] per thing it keeps, allocated when it first writes: head counts
    and sizes may differ between layers and between keys and values.
    Running sequences always fill rows 0..B-1, so that a step reads a view, never a gather.

    `fixed`: everything is allocated at once (a CUDA graph keeps the addresses). Otherwise buffers grow by GROWTH
    tokens as the longest sequence does, layer by layer: long limits cost nothing until they are used, and a
    step reads whole buffers, which batched products take twice as fast as slices of them.
    """

    def __init__(self, count: int, capacity: int, *, fixed: bool = True):
        self.count, self.capacity, self.fixed = count, capacity, fixed
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def room(self, tokens: int) -> int:
        """How long the buffers are that hold sequences of this length."""
        return self.capacity if self.fixed else min(-(-tokens // GROWTH) * GROWTH, self.capacity)

    def layer(self, index: int, kept: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
        """The buffers of a layer, shaped after what it keeps, [G, T, D] each, with room for at least `tokens`."""
        have = self.layers.get(index)
        if have is None or have[0].shape[2] < tokens:
            size = self.room(tokens)
            new = tuple(
                torch.zeros(self.count, x.shape[0], size, x.shape[-1], dtype=x.dtype, device=x.device) for x in kept
            )
            for buffer, old in zip(new, have or (), strict=False):
                buffer[:, :, : old.shape[2]] = old
            self.layers[index] = new
        return self.layers[index]

    def fill(self, rows: list[int], recorded: dict[int, tuple[Tensor, ...]], start: int, length: int) -> None:
        """Copies tokens [start, start+length) of a prefilled pack into rows (one prompt, many samples)."""
        for index, kept in recorded.items():
            for buffer, x in zip(self.layer(index, kept, length), kept, strict=True):
                for row in rows:
                    buffer[row, :, :length] = x[:, start : start + length]

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a sequence to another row (the last running one takes the place of a finished one)."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]


@dataclass
class DecodeLayout:
    """B sequences, `width` new tokens each, packed as one row of B·width tokens, sequence by sequence.

    lengths_B: tokens already in each slot, which is also the position of its first new token. `span` bounds the keys
    written and read: at least max(lengths) + width. What lies beyond a token's own position is masked.
    """

    slots: Slots
    lengths_B: Tensor
    span: int
    width: int = 1
    keeps = decodes = True  # see model.mla.LatentLayout

    def __post_init__(self) -> None:
        if not self.slots.fixed:
            self.span = self.slots.room(self.span)
        device = self.lengths_B.device
        self.positions_BW = self.lengths_B.unsqueeze(1) + torch.arange(self.width, device=device)
        self.distance_BWK = self.positions_BW.unsqueeze(2) - torch.arange(self.span, device=device)
        self.rows_B1 = torch.arange(len(self.lengths_B), device=device).unsqueeze(1)
        self.masks: dict[tuple[int | None, int], Tensor] = {}  # by window and repeats: layers take turns with them

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, options: Options) -> Tensor:
        k, v = self._keep(layer, k_GTD, v_GTD)
        return self._attend(q_HTD, k, v, options)

    def attend_latents(self, layer: int, q_HTD: Tensor, cache_TD: Tensor, latent: int, scale: float) -> Tensor:
        """See model.mla.LatentLayout: one key head for all query heads; its first numbers are the values."""
        (k,) = self._keep(layer, cache_TD.unsqueeze(0))
        return self._attend(q_HTD, k, k[..., :latent], Options(scale))

    def _keep(self, layer: int, *kept_GTD: Tensor) -> tuple[Tensor, ...]:
        """Writes the new tokens; returns views [B, G, span, D] of all there are."""
        batch = len(self.lengths_B)
        buffers = self.slots.layer(layer, kept_GTD, self.span)
        for buffer, x in zip(buffers, kept_GTD, strict=True):
            buffer[self.rows_B1, :, self.positions_BW] = x.unflatten(1, (batch, self.width)).permute(1, 2, 0, 3)
        return tuple(buffer[:batch, :, : self.span] for buffer in buffers)

    def _attend(self, q_HTD: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        heads, _, size = q_HTD.shape
        batch, groups = k.shape[:2]
        # The H/G query heads of one key head stand as that head's query rows: no copy of keys is made.
        repeat = heads // groups
        q = q_HTD.reshape(groups, repeat, batch, self.width, size).permute(2, 0, 1, 3, 4).flatten(2, 3)
        core = attention_core if q.device.type == "cuda" else product_attention
        out = core(q, k, v, self._mask(options.window, repeat), options)  # [B, G, repeat * width, D]
        return out.unflatten(2, (repeat, self.width)).permute(1, 2, 0, 3, 4).reshape(heads, batch * self.width, -1)

    def _mask(self, window: int | None, repeat: int) -> Tensor:
        """[B, 1, 1 or repeat·width, K]: which keys are seen; as bool for fused kernels, to be added for products."""
        repeat = repeat if self.width > 1 else 1  # one row for all of them broadcasts
        if (window, repeat) not in self.masks:
            visible = self.distance_BWK >= 0
            if window is not None:
                visible &= self.distance_BWK < window
            fused = self.lengths_B.device.type == "cuda"
            mask = visible if fused else mask_bias(visible)
            self.masks[window, repeat] = mask.repeat(1, repeat, 1).unsqueeze(1)
        return self.masks[window, repeat]
