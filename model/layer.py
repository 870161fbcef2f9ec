"""One transformer layer: latent attention, then a dense or a mixture-of-experts feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from model.config import MoEConfig
from model.mla import MultiHeadLatentAttention
from model.moe import MixtureOfExperts, Routing, SwiGLU


class Block(GradientCheckpointingLayer):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = (
            SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config, layer_idx)
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BSC: Tensor, routing: Routing, **attention: Any) -> tuple[Tensor, Tensor]:
        """([B, S, C], this layer's part of the sequence-wise loss)."""
        x_BSC = x_BSC + self.self_attn(self.input_layernorm(x_BSC), **attention)
        normed = self.post_attention_layernorm(x_BSC)
        if isinstance(self.mlp, SwiGLU):
            return x_BSC + self.mlp(normed), x_BSC.new_zeros((), dtype=torch.float32)
        out_TC, balance = self.mlp(normed.flatten(0, 1), routing)
        return x_BSC + out_TC.view_as(x_BSC), balance
