"""Multi-token prediction (V3 report, section 2.2, equations 21 to 25): modules that predict one token further each.

Depth k = 1 … D. Position i joins what the model knows of token i with the embedding of token i+k, passes one more
block, and predicts token i+k+1 through the shared output head. Embedding and head are the main model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.config import MoEConfig
from model.layer import Block
from model.moe import Routing


class SharedHead(nn.Module):
    """The norm before the output head, which itself is the main model's."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PredictionModule(Block):
    """Stands in the decoder's list of layers behind the main ones, as in the released files."""

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(  # type: ignore[override]
        self, hidden_BSC: Tensor, embedding_BSC: Tensor, routing: Routing, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        """(h^k [B, S, C] before its norm, the layer's sequence-wise loss) from h^{k-1} and the embeddings of i+k.

        eq. 21; the released projection takes the embedding's half first.
        """
        joined = self.eh_proj(torch.cat([self.enorm(embedding_BSC), self.hnorm(hidden_BSC)], -1))
        return super().forward(joined, routing, **attention)


def ahead(x_BS: Tensor, document_T: Tensor, offset: int, fill: int) -> Tensor:
    """x of `offset` tokens later [B, S], `fill` where that is another document, or padding, or past the row's end."""
    batch, length = x_BS.shape
    document = document_T.view(batch, length)
    out = torch.full_like(x_BS, fill)
    if offset < length:
        same = (document[:, offset:] == document[:, : length - offset]) & (document[:, : length - offset] >= 0)
        out[:, : length - offset] = torch.where(same, x_BS[:, offset:], fill)
    return out
