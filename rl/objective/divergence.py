"""Divergence between two models' next-token distributions, from hidden states: no full logits ever exist.

Generalized knowledge distillation (arXiv 2306.13649) compares whole distributions at every token of a completion. As in
`rl/policy/logprobs.py`, a chunk of logits (here one of each model) is computed, used and dropped, and the backward pass
computes it again.

With the student's p = softmax(z / τ) and the teacher's q = softmax(u / τ), at one token, in nats:

    kind      value                                    gradient with respect to z, times τ
    forward   KL(q‖p) = Σ q (log q − log p)            p − q
    reverse   KL(p‖q) = Σ p (log p − log q)            p (log p − log q − KL(p‖q))
    jsd       β KL(q‖m) + (1 − β) KL(p‖m),             (1 − β) p (log p − log m − KL(p‖m))
              m = β q + (1 − β) p

No gradient reaches the teacher. jsd tends to β times the forward KL for small β, and to 1 − β times the reverse KL
for β near 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rl.policy.logprobs import Head, pieces_of, slices_of

Kind = Literal["reverse", "forward", "jsd"]


class Divergence(NamedTuple):
    value: Tensor  # [P] float32, nats, with gradient to the student's hidden states and head
    entropy: Tensor  # [P] float32, nats, of the student's distributions
    agrees: Tensor  # [P] bool: both models find the same token likeliest


def token_divergence(
    student_PC: Tensor,
    student_head: Head,
    teacher_PD: Tensor,
    teacher_head: Head,
    *,
    kind: Kind = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Divergence:
    """The divergence at each of P tokens, whose hidden states the models hand over ([P, C] and [P, D]).

    The heads must have a row for the same tokens in the same order: see `rl/policy/vocabulary.py`.
    beta: of jsd, in (0, 1). temperature: τ, divides both models' logits.
    chunk: rows of logits of each model that exist at a time, in the compute type.
    """
    if len(student_head.weight) != len(teacher_head.weight):
        raise ValueError(
            f"the heads have {len(student_head.weight)} and {len(teacher_head.weight)} tokens: restrict both to one "
            "vocabulary"
        )
    result = _TokenDivergence.apply(
        student_PC, student_head.weight, student_head.bias, student_head, teacher_PD, teacher_head,
        kind, beta, temperature, chunk,
    )  # fmt: skip
    return Divergence(*result)


def divergence(logp_NV: Tensor, logq_NV: Tensor, kind: Kind, beta: float) -> Tensor:
    """[N] from log-probabilities of the student and the teacher."""
    if kind == "forward":
        return _mean(logq_NV, logq_NV - logp_NV)
    if kind == "reverse":
        return _mean(logp_NV, logp_NV - logq_NV)
    logm_NV = _mixture(logp_NV, logq_NV, beta)
    return beta * _mean(logq_NV, logq_NV - logm_NV) + (1 - beta) * _mean(logp_NV, logp_NV - logm_NV)


def slope(logp_NV: Tensor, logq_NV: Tensor, kind: Kind, beta: float) -> Tensor:
    """Gradient [N, V] of `divergence` with respect to z / τ."""
    if kind == "forward":
        return logp_NV.exp() - logq_NV.exp()
    gap_NV = logp_NV - (logq_NV if kind == "reverse" else _mixture(logp_NV, logq_NV, beta))
    result = logp_NV.exp() * (gap_NV - _mean(logp_NV, gap_NV)[:, None])
    return result if kind == "reverse" else (1 - beta) * result


def _mean(log_weight_NV: Tensor, value_NV: Tensor) -> Tensor:
    return log_weight_NV.exp().mul_(value_NV).sum(-1)


def _mixture(logp_NV: Tensor, logq_NV: Tensor, beta: float) -> Tensor:
    """log(β q + (1 − β) p)."""
    return torch.logaddexp(logq_NV + math.log(beta), logp_NV + math.log1p(-beta))


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        kind: Kind,
        beta: float,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        value = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(value)
        agrees = torch.empty_like(value, dtype=torch.bool)
        for rows in slices_of(0, len(hidden), chunk):
            product, teacher_product = hidden[rows] @ weight.t(), teacher_hidden[rows] @ teacher_head.weight.t()
            for piece in pieces_of(rows, hidden.device):
                place = slice(piece.start - rows.start, piece.stop - rows.start)
                logp_NV = _log_softmax(head.logits(product[place]), temperature)
                logq_NV = _log_softmax(teacher_head.logits(teacher_product[place]), temperature)
                value[piece] = divergence(logp_NV, logq_NV, kind, beta)
                entropy[piece] = -_mean(logp_NV, logp_NV)
                agrees[piece] = logp_NV.argmax(-1) == logq_NV.argmax(-1)
        ctx.save_for_backward(hidden, weight, teacher_hidden)
        ctx.heads, ctx.measure, ctx.temperature, ctx.chunk = (head, teacher_head), (kind, beta), temperature, chunk
        ctx.mark_non_differentiable(entropy, agrees)
        return value, entropy, agrees

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden = ctx.saved_tensors
        head, teacher_head = ctx.heads
        grad_hidden = torch.empty_like(hidden)
        # float32: many small chunks are added up.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=torch.float32)
        for rows in slices_of(0, len(hidden), ctx.chunk):
            product, teacher_product = hidden[rows] @ weight.t(), teacher_hidden[rows] @ teacher_head.weight.t()
            for piece in pieces_of(rows, hidden.device):
                place = slice(piece.start - rows.start, piece.stop - rows.start)
                logits = head.logits(product[place])
                # Back through the temperature, the soft cap and the scale.
                factor = grad_value[piece, None] * (head.scale / ctx.temperature)
                capped = None if head.softcap is None else 1 - (logits / head.softcap).square()
                logp_NV = _log_softmax(logits, ctx.temperature)
                logq_NV = _log_softmax(teacher_head.logits(teacher_product[place]), ctx.temperature)
                grad = slope(logp_NV, logq_NV, *ctx.measure).mul_(factor)
                if capped is not None:
                    grad *= capped
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                product[place].copy_(grad)
            grad_hidden[rows] = product @ weight
            grad_weight += product.t() @ hidden[rows]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(head.bias.dtype),
            *[None] * 7,
        )


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """Overwrites the logits, which are of their own memory."""
    return logits_NV.div_(temperature).log_softmax(-1)
