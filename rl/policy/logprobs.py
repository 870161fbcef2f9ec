"""Token log-probabilities from hidden states, in chunks with their own backward: no full logits ever exist.

A 129k vocabulary makes 32k tokens of fp32 logits 17 GB, several times over in autograd. Here a chunk of
logits is computed and used; the backward pass turns it, in place, into its gradient. The first chunks wait for it in
the compute type, as far as KEPT_BYTES reach; the others are dropped and computed again. Only small pieces of a chunk
are ever in float32: they stay in the processor's caches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT_BYTES = 512 * 2**20  # products of hidden states and head that are kept for the backward pass
PIECE_ON_CPU = 64  # rows; on other devices a piece is the whole chunk


class Head(NamedTuple):
    """logits = softcap * tanh(scale (h W^T + b) / softcap), softcap and b being optional.

    weight [V, C] in the compute type. `temperature` divides the logits last: the policy that is trained is
    the one that was sampled from.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, product_NV: Tensor) -> Tensor:
        """From h W^T in the compute type to float32 logits [N, V] of their own memory."""
        logits = product_NV.to(torch.float32, copy=True)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_logprobs(
    hidden_PC: Tensor, target_P: Tensor, head: Head, *, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target [P], entropy of each distribution [P] without gradient), float32, nats.

    chunk: rows of logits that exist at a time, in the compute type.
    """
    kept = KEPT_BYTES if torch.is_grad_enabled() and (hidden_PC.requires_grad or head.weight.requires_grad) else 0
    return _TokenLogprobs.apply(hidden_PC, head.weight, head.bias, target_P, head, temperature, chunk, kept)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: Head,
        temperature: float,
        chunk: int,
        room: int,
    ) -> tuple[Tensor, Tensor]:
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logp)
        ctx.kept = {}
        for rows in slices_of(0, len(hidden), chunk):
            product = hidden[rows] @ weight.t()
            room -= product.nbytes
            if room >= 0:
                ctx.kept[rows.start] = product
            for piece in pieces_of(rows, hidden.device):
                logits = head.logits(product[piece.start - rows.start : piece.stop - rows.start])
                if temperature != 1.0:
                    logits /= temperature
                logp_NV = logits.log_softmax(-1)
                logp[piece] = logp_NV.gather(-1, target[piece, None])[:, 0]
                entropy[piece] = -logits.softmax(-1).mul_(logp_NV).sum(-1)
        ctx.save_for_backward(hidden, weight, target)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        head: Head = ctx.head
        grad_hidden = torch.empty_like(hidden)
        # float32: many small chunks are added up.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=torch.float32)
        for rows in slices_of(0, len(hidden), ctx.chunk):
            product = ctx.kept.pop(rows.start, None)  # it is overwritten: a second backward pass computes it again
            if product is None:
                product = hidden[rows] @ weight.t()
            for piece in pieces_of(rows, hidden.device):
                place = product[piece.start - rows.start : piece.stop - rows.start]
                logits = head.logits(place)
                # d logp / d z = (onehot - p) / temperature, then back through softcap and scale.
                slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
                grad = logits.div_(ctx.temperature).softmax(-1).neg_()
                grad.scatter_add_(-1, target[piece, None], torch.ones_like(grad[:, :1]))
                grad *= grad_logp[piece, None] * (head.scale / ctx.temperature)
                if slope is not None:
                    grad *= slope
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                place.copy_(grad)
            grad_hidden[rows] = product @ weight
            grad_weight += product.t() @ hidden[rows]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
            *[None] * 5,
        )


def pieces_of(rows: slice, device: torch.device) -> list[slice]:
    """The parts of a chunk that are in float32 at a time."""
    return slices_of(rows.start, rows.stop, PIECE_ON_CPU) if device.type == "cpu" else [rows]


def slices_of(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
