"""Do a checkpoint's names and shapes fit the model? If not: one error that lists them, with the fields to look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from model.checkpoint.files import CheckpointError
from model.checkpoint.names import BIAS, copies, layer_of, optional

Shapes = Mapping[str, tuple[int, ...]]
SHOWN = 20

# Which fields decide each dimension of a tensor; the first pattern that its name contains counts.
_DIMENSIONS: list[tuple[str, tuple[str, ...]]] = [
    (r"embed_tokens|lm_head|shared_head\.head", ("vocab_size", "hidden_size")),
    (r"\.q_a_proj\.", ("q_lora_rank", "hidden_size")),
    (r"\.q_a_layernorm\.", ("q_lora_rank",)),
    (r"\.q_b_proj\.", ("num_attention_heads, qk_nope_head_dim, qk_rope_head_dim", "q_lora_rank")),
    (r"\.q_proj\.", ("num_attention_heads, qk_nope_head_dim, qk_rope_head_dim", "hidden_size")),
    (r"\.kv_a_proj_with_mqa\.", ("kv_lora_rank, qk_rope_head_dim", "hidden_size")),
    (r"\.kv_a_layernorm\.", ("kv_lora_rank",)),
    (r"\.kv_b_proj\.", ("num_attention_heads, qk_nope_head_dim, v_head_dim", "kv_lora_rank")),
    (r"\.o_proj\.", ("hidden_size", "num_attention_heads, v_head_dim")),
    (r"\.mlp\.gate\.", ("n_routed_experts", "hidden_size")),
    (r"\.shared_experts\.(gate|up)_", ("n_shared_experts, moe_intermediate_size", "hidden_size")),
    (r"\.shared_experts\.down_", ("hidden_size", "n_shared_experts, moe_intermediate_size")),
    (r"\.experts\.\d+\.(gate|up)_", ("moe_intermediate_size", "hidden_size")),
    (r"\.experts\.\d+\.down_", ("hidden_size", "moe_intermediate_size")),
    (r"\.mlp\.(gate|up)_proj", ("intermediate_size", "hidden_size")),
    (r"\.mlp\.down_proj", ("hidden_size", "intermediate_size")),
    (r"", ("hidden_size", "hidden_size")),
]
# Which field decides whether a tensor exists.
_EXISTENCE = [
    (r"\.(enorm|hnorm|eh_proj|shared_head)\.", "num_hidden_layers"),  # a prediction module's, in a layer of both
    (r"\.bias$", "attention_bias"),
    (r"\.q_(a_|b_)?(proj|layernorm)", "q_lora_rank"),
    (BIAS, "topk_method"),
    (r"\.shared_experts\.", "n_shared_experts"),
    (r"\.experts\.", "n_routed_experts"),
    (r"\.mlp\.", "first_k_dense_replace"),
    (r"^lm_head", "tie_word_embeddings"),
]


def left_out(found: Shapes, config: Any) -> tuple[set[str], set[int]]:
    """(names in the files that are rightly not read, the layers among them of modules that the config has not).

    These are repeated tensors, rotary frequencies, and the prediction modules behind num_nextn_predict_layers.
    """
    end = config.num_hidden_layers + config.num_nextn_predict_layers
    surplus = {layer for layer in _modules(found) if layer >= end}
    repeated = copies(config)
    names = {
        name for name in found if name in repeated or name.endswith("rotary_emb.inv_freq") or layer_of(name) in surplus
    }
    return names, surplus


def check(wanted: Shapes, found: Shapes, config: Any, source: str) -> None:
    """Raises CheckpointError unless every wanted tensor is there in its shape, and nothing else is.

    found: without what is `left_out`. Biases that the routing does not use may be absent.
    """
    missing = [name for name in wanted if name not in found and not optional(name, config)]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [name for name in wanted if name in found and wanted[name] != found[name]]
    if not (missing or unexpected or misshapen):
        return
    fields = _suspects(wanted, found, missing, unexpected, misshapen, config)
    lines = [
        f"{source} does not fit its config: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
        f"{len(misshapen)} of another shape" + (f". Look at: {', '.join(fields)}" if fields else ""),
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
        *_listed("of another shape", [f"{n}: {found[n]} in the files, {wanted[n]} by the config" for n in misshapen]),
    ]
    raise CheckpointError("\n".join(lines))


def _modules(names: Iterable[str]) -> set[int]:
    """The layers that are prediction modules: only these have an eh_proj."""
    return {layer for name in names if name.endswith(".eh_proj.weight") and (layer := layer_of(name)) is not None}


def _listed(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title}:", *(f"  {name}" for name in names[:SHOWN]), *more]


def _suspects(
    wanted: Shapes, found: Shapes, missing: list[str], unexpected: list[str], misshapen: list[str], config: Any
) -> list[str]:
    """The fields that probably disagree."""
    suspects: dict[str, None] = {}
    modules = _modules(found)
    if modules and config.num_hidden_layers not in modules:
        return ["num_hidden_layers"]  # the rest follows from it
    shared_layers = {layer_of(name) for name in wanted} & {layer_of(name) for name in found}
    # Where one side has a dense network and the other experts, both sides show.
    swapped = {layer_of(n) for n in missing if ".mlp." in n} & {layer_of(n) for n in unexpected if ".mlp." in n}
    for name in missing + unexpected:
        layer = layer_of(name)
        if layer in shared_layers:
            field = "first_k_dense_replace" if ".mlp." in name and layer in swapped else _decides_existence(name)
        elif layer is not None and layer >= config.num_hidden_layers and name in wanted:
            field = f"num_nextn_predict_layers (the files hold {len(modules)} prediction modules: pass {len(modules)})"
        else:
            field = "num_hidden_layers"
        if field:
            suspects.setdefault(field)
    for name in misshapen:
        fields = next(fields for pattern, fields in _DIMENSIONS if re.search(pattern, name))
        for several, here, there in zip(fields, wanted[name], found[name], strict=False):
            if here != there:
                suspects.update(dict.fromkeys(several.split(", ")))
    return list(suspects)


def _decides_existence(name: str) -> str | None:
    return next((field for pattern, field in _EXISTENCE if re.search(pattern, name)), None)
