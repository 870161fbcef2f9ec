"""Token log-probabilities from hidden states, in chunks with their own backward: no full logits ever exist.

A 129k vocabulary makes 32k tokens of fp32 logits 17 GB, several times over in autograd. Here a chunk of
logits is computed, used and dropped; the backward pass computes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale (h W^T + b) / softcap), softcap and b being optional.

    weight [V, C] in the compute type. `temperature` divides the logits last: the policy that is trained is
    the one that was sampled from.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """float32 [N, V]."""
        logits = (hidden_NC @ self.weight.t()).float()
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

    chunk: rows of logits that exist at a time; memory is about 3 * 4 * chunk * V bytes.
    """
    return _TokenLogprobs.apply(hidden_PC, head.weight, head.bias, target_P, head, temperature, chunk)


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
    ) -> tuple[Tensor, Tensor]:
        count = len(hidden)
        logp = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy, lse = torch.empty_like(logp), torch.empty_like(logp)
        for rows in _chunks(count, chunk):
            logits = head.logits(hidden[rows])
            if temperature != 1.0:
                logits /= temperature
            lse[rows] = logits.logsumexp(-1)
            logp[rows] = logits.gather(-1, target[rows, None])[:, 0] - lse[rows]
            # H = lse - sum p z, without a second [N, V] buffer beyond p.
            probability = torch.exp(logits - lse[rows, None])
            entropy[rows] = lse[rows] - torch.einsum("nv,nv->n", probability, logits)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, lse = ctx.saved_tensors
        head: Head = ctx.head
        grad_hidden = torch.empty_like(hidden)
        # float32: many small chunks are added up.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=torch.float32)
        for rows in _chunks(len(hidden), ctx.chunk):
            logits = head.logits(hidden[rows])
            # d logp / d z = (onehot - p) / temperature, then back through softcap and scale.
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
            grad = torch.exp(logits.div_(ctx.temperature).sub_(lse[rows, None])).neg_()
            grad.scatter_add_(-1, target[rows, None], torch.ones_like(grad[:, :1]))
            grad *= grad_logp[rows, None] * (head.scale / ctx.temperature)
            if slope is not None:
                grad *= slope
            low = grad.to(weight.dtype)
            grad_hidden[rows] = low @ weight
            grad_weight += low.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
            None,
            None,
            None,
            None,
        )


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
