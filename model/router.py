"""Which experts see a token, and with what weight: pure functions on affinities.

T tokens, E routed experts, K chosen per token. DeepSeek-V3 report (arXiv 2412.19437), equations 12 to 16 and 20.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affinities(hidden_TC: Tensor, weight_EC: Tensor, scoring: str) -> Tensor:
    """s [T, E] float32 (eq. 15): sigmoid (V3) or softmax (V2) of float32 products. float64 stays float64."""
    dtype = torch.promote_types(hidden_TC.dtype, torch.float32)
    logits = torch.nn.functional.linear(hidden_TC.to(dtype), weight_EC.to(dtype))
    return logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)


@torch.no_grad()
def choose_experts(s_TE: Tensor, bias_E: Tensor, *, k: int, groups: int, kept_groups: int, method: str) -> Tensor:
    """Indices [T, K] int64 of the chosen experts (eq. 14 and 16); the bias acts here and nowhere else.

    "noaux_tc": a group's score is the sum of its two best s + b, only experts of the best `kept_groups` groups can be
    chosen. "group_limited_greedy" (V2): a group's score is its best s. "greedy": no groups. Of equal scores the lower
    index is not guaranteed.
    """
    choice = s_TE + bias_E if method == "noaux_tc" else s_TE
    if method != "greedy" and kept_groups < groups:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.topk(2, -1).values.sum(-1) if method == "noaux_tc" else grouped.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(kept_groups, -1).indices, True)
        # -inf, not 0: a negative bias makes choices negative, and 0 would win.
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice.topk(k, -1).indices


def gate_weights(s_TE: Tensor, index_TK: Tensor, *, normalise: bool, scale: float) -> Tensor:
    """g [T, K] float32 (eq. 13): the chosen affinities, without the bias, normalised over the chosen, times `scale`."""
    g = s_TE.gather(-1, index_TK)
    if normalise:
        g = g / (g.sum(-1, keepdim=True) + 1e-20)
    return g * scale


def loads(index_TK: Tensor, experts: int) -> Tensor:
    """Tokens per expert [E] int64; sums to T·K. (bincount would do, but makes the host wait for a GPU.)"""
    flat = index_TK.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


@torch.no_grad()
def router_entropy(s_TE: Tensor) -> Tensor:
    """Σ over tokens of the entropy of s / Σ_j s_j, in nats, float64: ln E a token where all affinities are equal."""
    share = s_TE.double() / s_TE.double().sum(-1, keepdim=True)
    return torch.special.entr(share).sum()


def updated_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> Tensor:
    """b + γ·sign(mean load − load) (arXiv 2408.15664, algorithm 1): the overloaded become less eligible."""
    load = load_E.double()
    return bias_E + speed * torch.sign(load.mean() - load).to(bias_E.dtype)


def sequence_balance(s_TE: Tensor, index_TK: Tensor, document_T: Tensor, documents: int, *, counts: str) -> Tensor:
    """Σ over documents of Σ_i f_i P_i (eq. 17 to 20), without α; uniform routing gives 1 a document.

    f_i = E/(K·T_d) · (tokens of document d that choose i), P_i = mean over its tokens of s_i / Σ_j s_j. Gradients flow
    through P only. counts: "affinity" counts the top-K of s itself, as the report does; "routed" the given indices.
    document_T: each token's document, 0 … documents-1; tokens of document -1 are not counted.
    """
    experts, k = s_TE.shape[-1], index_TK.shape[-1]
    chosen = index_TK if counts == "routed" else s_TE.detach().topk(k, -1).indices
    member = (document_T >= 0).to(s_TE.dtype)
    row = document_T.clamp(min=0)
    length = s_TE.new_zeros(documents).index_add(0, row, member).clamp(min=1)
    hits = s_TE.new_zeros(s_TE.shape).scatter_(-1, chosen, 1.0) * member[:, None]
    f = s_TE.new_zeros(documents, experts).index_add(0, row, hits) * (experts / k) / length[:, None]
    share = s_TE / s_TE.sum(-1, keepdim=True) * member[:, None]
    p = s_TE.new_zeros(documents, experts).index_add(0, row, share) / length[:, None]
    return (f * p).sum()
