"""Weights in FP8 on their way to a sampler, named as in released files: X in E4M3, and X_scale_inv with its scales.

What is rounded here is rounded as the trainer's own products see it, so a sampler with these weights has no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.names import SCALE
from model.fp8.blocks import AMAX_FLOOR, BLOCK, block_scales, dequantize_blocks
from model.fp8.context import Fp8Context, Fp8Module

FLOOR_SCALE = block_scales(torch.zeros(()), AMAX_FLOOR, power_of_two=False)


def fp8_weights(model: Any) -> dict[str, Fp8Context]:
    """Names of the parameters that products of a converted model read in FP8, in the model's order, and what rounds
    them. Empty for a model that is not converted."""
    return {
        f"{name}.{parameter}": module.context
        for name, module in model.named_modules()
        if isinstance(module, Fp8Module)
        for parameter in module.in_fp8
    }


def quantized_weights(
    named: Iterable[tuple[str, Tensor]], contexts: Mapping[str, Fp8Context]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, those named in `contexts` in FP8, scales first."""
    for name, tensor in named:
        if name not in contexts:
            yield name, tensor
            continue
        rounded = contexts[name].quantize(tensor)
        yield name + SCALE, rounded.scales
        yield name, rounded.values


def plain_weights(
    named: Iterable[tuple[str, Tensor]], device: torch.device | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, those in FP8 in bfloat16 instead, made on `device`. Quantising them gives the same bits.

    A weight and its scales may come in either order, and apart. ValueError if one comes without the other.
    """
    waiting: dict[str, Tensor] = {}
    for name, tensor in named:
        weight = name.removesuffix(SCALE)
        if weight == name and tensor.dtype != torch.float8_e4m3fn:
            yield name, tensor
            continue
        waiting[name] = tensor
        if weight in waiting and weight + SCALE in waiting:
            values, scales = waiting.pop(weight), waiting.pop(weight + SCALE)
            yield weight, restored(values.to(device), scales.to(device))
    if waiting:
        name = min(waiting)
        lacking = name.removesuffix(SCALE) if name.endswith(SCALE) else name + SCALE
        raise ValueError(f"{name} came without {lacking}: in FP8 a weight and its scales belong together")


def restored(values: Tensor, scales: Tensor) -> Tensor:
    """A weight in bfloat16 that is quantised to these values and scales.

    bfloat16 has 4 bits more than E4M3, so values come back. A block's largest comes out as the bfloat16 that its scale
    was made of, so the scale comes back. Blocks below the floor are quantised as if they held 1e-4, which is no
    bfloat16: 448 scales would become a larger one, with a scale of its own. So these blocks come out 0.4 % smaller.
    """
    below_floor = scales == FLOOR_SCALE.to(scales.device)
    return dequantize_blocks(values, torch.where(below_floor, scales * (1 - 2**-8), scales), BLOCK, torch.bfloat16)
