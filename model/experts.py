"""Routed experts: every token's K products, sorted by expert, in one grouped product. No token is ever dropped.

T tokens of C channels, E experts of inner size I, K experts a token, R = T·K rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.router import loads

GROUPED = (torch.bfloat16, torch.float16, torch.float32)  # that grouped_mm has kernels for; float64 takes the loop


class Experts(nn.Module):
    """E SwiGLU networks: down_e(silu(gate_e x) · up_e x). Gate and up stand in one tensor [E, 2I, C]."""

    def __init__(self, experts: int, channels: int, inner: int, implementation: str = "grouped"):
        super().__init__()
        self.implementation = implementation
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, channels))
        self.down_proj = nn.Parameter(torch.empty(experts, channels, inner))

    def forward(self, x_TC: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Σ_k weight_k · expert_{index_k}(x), [T, C]."""
        order_R = index_TK.flatten().argsort(stable=True)  # rows by expert, then by token
        return self.products(x_TC, weight_TK, order_R, loads(index_TK, len(self.down_proj)))

    def products(self, x_TC: Tensor, weight_TK: Tensor, order_R: Tensor, count_E: Tensor) -> Tensor:
        """The same of rows in order: count_0 of expert 0 first, then those of expert 1. Row r is of token r // K."""
        x_RC = x_TC[order_R // weight_TK.shape[-1]]
        grouped = self.implementation == "grouped" and x_RC.dtype in GROUPED
        y_RC = self._grouped(x_RC, count_E) if grouped else self._loop(x_RC, count_E)
        y_TKC = y_RC[places(order_R)].unflatten(0, weight_TK.shape)
        return (y_TKC * weight_TK.unsqueeze(-1).to(y_TKC.dtype)).sum(1)

    def _grouped(self, x_RC: Tensor, count_E: Tensor) -> Tensor:
        ends_E = count_E.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x_RC, self.gate_up_proj.transpose(1, 2), offs=ends_E).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends_E)

    def _loop(self, x_RC: Tensor, count_E: Tensor) -> Tensor:
        pieces = []
        for expert, x in enumerate(x_RC.split(count_E.tolist())):
            gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
            pieces.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return torch.cat(pieces)


def places(order_R: Tensor) -> Tensor:
    """The inverse of a permutation: where each row stands in the order."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
