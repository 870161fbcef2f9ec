"""The experts that vLLM's tokens met, in the form of `Sample.routed_experts`.

vLLM's record has a column for every layer, ours for those that have experts. Which these are follows from the model's
config, by the rules of vLLM's own models; a wrong one would replay experts in wrong layers, without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rl.recipe_io import RecipeError


def _deepseek(config: Any, layer: int) -> bool:
    return bool(layer >= config.first_k_dense_replace and layer % getattr(config, "moe_layer_freq", 1) == 0)


def _glm(config: Any, layer: int) -> bool:
    return bool(layer >= config.first_k_dense_replace)


def _qwen(config: Any, layer: int) -> bool:
    dense = getattr(config, "mlp_only_layers", None) or []
    return layer not in dense and (layer + 1) % config.decoder_sparse_step == 0


def _every(config: Any, layer: int) -> bool:
    return True


_RULES: dict[str, Callable[[Any, int], bool]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "deepseek_v32": _deepseek,
    "glm4_moe": _glm,
    "mixtral": _every,
    "olmoe": _every,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
}


def expert_layers(config: Any) -> list[int]:
    """Numbers of the layers that have experts. config: the text model's, as Hugging Face has it."""
    rule = _RULES.get(config.model_type)
    if rule is None:
        raise RecipeError(
            f"engine option enable_return_routed_experts: which layers of a {config.model_type} have experts is not "
            f"known here, only of {', '.join(sorted(_RULES))}; set it to false"
        )
    return [layer for layer in range(config.num_hidden_layers) if rule(config, layer)]


def of_expert_layers(routed: Any, layers: Sequence[int], tokens: int) -> Any:
    """[tokens, len(layers), K] in uint8 or int16, of vLLM's record [tokens, all layers, K].

    In vLLM's a layer without experts stays 0, and one that has them never is, as a token's experts differ. RuntimeError
    if the record says otherwise.
    """
    if routed is None:
        raise RuntimeError("vLLM was to record the experts that tokens met, and gave none")
    if routed.ndim != 3 or len(routed) != tokens or routed.shape[1] <= max(layers, default=-1):
        raise RuntimeError(
            f"vLLM recorded experts of the shape {routed.shape}; expected {tokens} tokens, and layers up to "
            f"{max(layers, default=-1)}"
        )
    kept = routed[:, layers]
    empty = routed.shape[2] > 1 and not kept[:1].any(axis=-1).all()
    if empty or np.delete(routed, layers, axis=1).any():
        found = np.flatnonzero(routed[0].any(axis=-1)).tolist()
        raise RuntimeError(
            f"vLLM recorded experts in the layers {found}; by the model's config {list(layers)} have some"
        )
    return kept if kept.dtype == np.uint8 else kept.astype(np.int16)
