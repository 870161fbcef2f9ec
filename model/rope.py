"""Rotary positions of the decoupled key and query parts, with YaRN.

RoPE (arXiv 2104.09864) rotates the pair (x_{2i}, x_{2i+1}) at position p by the angle p·θ_i, θ_i = base^(-2i/D).
DeepSeek's weights store the pairs interleaved. Only qk_rope_head_dim of a head's dimensions are rotated (DeepSeek-V2,
arXiv 2405.04434, section 2.1.3), because the others are recovered from a latent that must not depend on position.

YaRN (arXiv 2309.00071, section 3.2) stretches the slow frequencies by `factor` and keeps the fast ones; the attention
temperature is DeepSeek's: softmax scale × (0.1 · mscale_all_dim · ln factor + 1)².
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def frequencies(dimensions: int, rope: dict[str, Any]) -> Tensor:
    """θ_i in radians per position, [dimensions / 2] float32."""
    base, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    exponent = torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions
    plain = 1.0 / base**exponent
    if kind == "default":
        return plain
    if kind != "yarn":
        raise ValueError(f"rope_parameters.rope_type: {kind!r} is not known; use default or yarn")
    original = float(rope["original_max_position_embeddings"])

    def dimension_of(rotations: float) -> float:
        """The (fractional) index i whose pair turns this many times within the original length."""
        return dimensions * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(float(rope.get("beta_fast") or 32))), 0)
    high = min(math.ceil(dimension_of(float(rope.get("beta_slow") or 1))), dimensions - 1)
    ramp = (torch.arange(dimensions // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)  # 0: turns often, kept; 1: turns less than once, stretched
    return plain * (1 - stretched) + plain / float(rope["factor"]) * stretched


def magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotation_scale(rope: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by: 1 for DeepSeek's checkpoints, whose mscale equals mscale_all_dim."""
    if rope.get("rope_type", "default") != "yarn":
        return 1.0
    factor = float(rope["factor"])
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return magnitude(factor, float(mscale)) / magnitude(factor, float(all_dim))
    return magnitude(factor, 1.0)


def softmax_scale(head_size: int, rope: dict[str, Any]) -> float:
    """1/√d, times YaRN's temperature where the checkpoint asks for it."""
    scale = head_size**-0.5
    if rope.get("rope_type", "default") == "yarn" and rope.get("mscale_all_dim"):
        scale *= magnitude(float(rope["factor"]), float(rope["mscale_all_dim"])) ** 2
    return scale


def angles(position_BS: Tensor, frequency_D2: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cosines, sines) [B, S, 1, D/2]: computed in float32, given in `dtype`."""
    phase = position_BS[..., None, None].float() * frequency_D2.float()
    return (phase.cos() * scale).to(dtype), (phase.sin() * scale).to(dtype)


def rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Rotated pairs, first all first components, then all second ones: dot products do not see the order."""
    first, second = (x_BSHD[..., 0::2], x_BSHD[..., 1::2]) if interleaved else x_BSHD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
