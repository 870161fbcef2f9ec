"""How the released files name a model's tensors, and which of them they hold in FP8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = "e_score_correction_bias"
SCALE = "_scale_inv"  # X.weight_scale_inv holds the scales of X.weight

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# The projections of attention, of dense and of expert networks. Embedding, head, router, norms and eh_proj stay in
# bfloat16: the file sizes of the release add up only so (see the tests).
_QUANTIZED = re.compile(
    r".*\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj)\.weight"
)


def released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors under their names in files, in order. One expert's are views of the stacked ones: what is
    written to a view is in the model."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            named[name] = tensor
            continue
        experts, what = stacked.groups()
        for expert, weight in enumerate(tensor):
            parts = zip(("gate", "up"), weight.chunk(2), strict=True) if what == "gate_up_proj" else [("down", weight)]
            named.update({f"{experts}.{expert}.{part}_proj.weight": view for part, view in parts})
    return named


def main_tensors(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """`released`, without a head that is the embedding."""
    return {name: t for name, t in released(state).items() if not (name == HEAD and config.tie_word_embeddings)}


def needed(named: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """What is written of `released`: not biases that the routing does not use, V2's files have none."""
    return {name: t for name, t in named.items() if not optional(name, config)}


def optional(name: str, config: Any) -> bool:
    """Only noaux_tc reads the balancing biases."""
    return name.endswith(BIAS) and config.topk_method != "noaux_tc"


def copies(config: Any) -> dict[str, str]:
    """Names that files may hold besides a model's own -> the tensor that they repeat.

    In the release each prediction module comes with the embedding and the head that it shares with the main model.
    """
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    repeated = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        repeated[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        repeated[f"model.layers.{layer}.shared_head.head.weight"] = head
    return repeated


def module_copies(config: Any) -> dict[str, str]:
    """The part of `copies` that belongs to prediction modules."""
    return {copy: main for copy, main in copies(config).items() if copy != HEAD}


def layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def is_quantized(name: str) -> bool:
    """Whether the release holds it in FP8."""
    return _QUANTIZED.fullmatch(name) is not None


def released_dtype(name: str) -> torch.dtype:
    """Of what is not in FP8."""
    return torch.float32 if name.endswith(BIAS) else torch.bfloat16
