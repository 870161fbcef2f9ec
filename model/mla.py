"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3 report, equations 1 to 11).

Keys and values of all heads come from one latent of R = kv_lora_rank numbers per token, positions from one rotated key
of P = qk_rope_head_dim numbers that all heads share. A cache needs only these R + P.

B rows, S tokens, C channels, H heads; N = qk_nope_head_dim, P = qk_rope_head_dim, V = v_head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.config import MoEConfig
from model.fp8.linear import multiplied_input, multiplied_weight
from model.rope import rotate, softmax_scale

# Of the two norms of latents, whatever rms_norm_eps says (Moonlight's is 1e-5): so in DeepSeek's code.
LATENT_EPS = 1e-6


class LatentLayout(Protocol):
    """What the layout of a sampler's forward, one row of T packed tokens, does with latents [c, k_rope] of R + P."""

    keeps: bool  # whether tokens of this forward are seen again by a later one
    decodes: bool  # whether their queries see what was kept earlier: then the absorbed form is used

    def keep(self, layer: int, cache_TD: Tensor) -> None: ...

    def attend_latents(self, layer: int, q_HTD: Tensor, cache_TD: Tensor, latent: int, scale: float) -> Tensor:
        """[H, T, R]: latents mixed by softmax(scale q·[c, k_rope]) over what was kept and these tokens, then kept."""
        ...


class MultiHeadLatentAttention(nn.Module):
    """Training and prefill use the expanded form: per-head keys and values are computed from the latents. Decoding uses
    the absorbed form: the same products in another order, so that only latents are read.
    """

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, bias = config.num_attention_heads, config.attention_bias
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scaling = softmax_scale(self.nope + self.rope, config.rope_parameters)
        # What transformers' attention functions ask of a module.
        self.num_key_value_groups, self.is_causal = 1, True

        query = heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.latent, heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, config.hidden_size, bias=bias)

    def forward(
        self,
        x_BSC: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, C]. kwargs go to the attention function that `config._attn_implementation` names.

        A `layout` among them (a sampler's) may keep latents of its own, see `LatentLayout`.
        """
        q_nope, q_rope = self.queries(x_BSC, rotation)
        latent, k_rope = self.latents(x_BSC, rotation)
        layout: LatentLayout | None = kwargs.get("layout")
        if layout is not None and layout.keeps:
            # Latents as kv_b_proj would see them: the absorbed form does not pass through it.
            cache_TD = torch.cat([multiplied_input(self.kv_b_proj, latent), k_rope], -1)[0]
            if layout.decodes:
                q_HTD = self.absorb_query(q_nope, q_rope)[0].transpose(0, 1)
                mixed_HTR = layout.attend_latents(self.layer_idx, q_HTD, cache_TD, self.latent, self.scaling)
                return self.absorb_output(mixed_HTR.transpose(0, 1)[None])
            layout.keep(self.layer_idx, cache_TD)
        if past_key_values is not None:  # the cache holds latents, seen as keys and values of one head
            latent, k_rope = past_key_values.update(latent.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx)
            latent, k_rope = latent.squeeze(1), k_rope.squeeze(1)
        k_BSHD, v_BSHV = self.expand(latent, k_rope)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, _ = attention(
            self,
            torch.cat([q_nope, q_rope], -1).transpose(1, 2),
            k_BSHD.transpose(1, 2),
            v_BSHV.transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.flatten(2))

    def queries(self, x_BSC: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """([B, S, H, N] without position, [B, S, H, P] rotated) (eq. 6 to 9)."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BSC)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSC)))
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split([self.nope, self.rope], -1)
        return q_nope, rotate(q_rope, *rotation, interleaved=self.config.rope_interleave)

    def latents(self, x_BSC: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(c [B, S, R] normalised, the shared rotated key [B, S, P]) (eq. 1 and 3): all that a cache holds."""
        latent, k_rope = self.kv_a_proj_with_mqa(x_BSC).split([self.latent, self.rope], -1)
        k_rope = rotate(k_rope.unsqueeze(2), *rotation, interleaved=self.config.rope_interleave).squeeze(2)
        return self.kv_a_layernorm(latent), k_rope

    def expand(self, latent_BSR: Tensor, k_rope_BSP: Tensor) -> tuple[Tensor, Tensor]:
        """(keys [B, S, H, N+P], values [B, S, H, V]) (eq. 2, 4 and 5)."""
        kv = self.kv_b_proj(latent_BSR).unflatten(-1, (-1, self.nope + self.value))
        k_nope, v = kv.split([self.nope, self.value], -1)
        k_rope = k_rope_BSP.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)
        return torch.cat([k_nope, k_rope], -1), v

    def absorb_query(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries [B, S, H, R+P] whose products with [c, k_rope] are the expanded scores: q·(W_UK c) = (W_UKᵀ q)·c."""
        return torch.cat([torch.einsum("bshn,hnr->bshr", q_nope, self._up()[:, : self.nope]), q_rope], -1)

    def absorb_output(self, mixed_BSHR: Tensor) -> Tensor:
        """[B, S, C] from the attention-weighted latents: W_UV after the mixture instead of before it."""
        values = torch.einsum("bshr,hvr->bshv", mixed_BSHR, self._up()[:, self.nope :])
        return self.o_proj(values.flatten(2))

    def _up(self) -> Tensor:
        """kv_b_proj as [H, N+V, R]."""
        return multiplied_weight(self.kv_b_proj).unflatten(0, (-1, self.nope + self.value))


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """softmax(scaling q kᵀ + mask) v of [B, H, S, D] -> [B, S, H, V], written out; the softmax in float32."""
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, kwargs.get("dropout", 0.0), module.training)
    return (weights @ value).transpose(1, 2), weights
