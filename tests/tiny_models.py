"""Tiny causal LMs with random weights, one for each supported architecture, and documents to try them on.

The usual initialisation (deviation 0.02) makes distributions so flat that a wrong mask hardly shows; these
weights are large enough for attention, biases, norms, multipliers and soft caps to matter by 0.1 nats.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rl.policy.load import SUPPORTED_TYPES
from rl.policy.packing import Document

WINDOW = 5  # of sliding attention: shorter than the sequences
EOS = 2
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}

# What each architecture adds to the common shape: everything that makes it special must be switched on.
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"tie_word_embeddings": True},  # q, k and v have biases
    "qwen3": {"tie_word_embeddings": False},  # q and k are normalised
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 20},
    "granite": {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 2.5,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
    },
    "cohere": {"logit_scale": 0.6, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.6, "sliding_window": WINDOW, "layer_types": SLIDING},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "phi3": {"sliding_window": WINDOW},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "glm4": {"attention_bias": True},
    "ministral": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "seed_oss": {"attention_bias": True},
    "helium": {},
    "arcee": {},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**MOE, "num_experts": 4, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,  # of the rotated part
    },
}
FAMILIES = sorted(SUPPORTED_TYPES)
DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"]


def tiny_model(
    family: str,
    *,
    vocabulary: int = 101,
    layers: int = 3,
    seed: int = 0,
    attention: str = "eager",
    **config: Any,
) -> Any:
    """A float32 model in evaluation mode. `eager`: only there are gemma2's attention scores capped."""
    if family == "gpt2":
        shape: dict[str, Any] = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 128}
    else:
        special = dict(SPECIAL[family])
        if "layer_types" in special:
            special["layer_types"] = special["layer_types"][:layers]
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            **special,
        }
    shape = {
        **shape,
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        **config,
    }
    settings = AutoConfig.for_model(family, **shape)
    settings._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.3 * noise)  # norms (around 1, or around 0 in gemma) and biases
            elif "embed" in name or "lm_head" in name or "wte" in name:
                parameter.copy_(0.35 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def tokenizer(eos: int | None = EOS) -> Any:
    """All that a sampler asks of a tokenizer."""
    return SimpleNamespace(eos_token_id=eos)


def endless(model: Any) -> Any:
    """The same model, with no token that ends a completion."""
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def token_lists(lengths: list[int], *, vocabulary: int = 101, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def documents(*, vocabulary: int = 101, seed: int = 0, masks: bool = True) -> list[Document]:
    """Groups of 3, 1, 2, 1 and 2 completions, interleaved: prompts and completions of length 1, of more than
    twice the sliding window, and (with `masks`) tokens that are read but not trained on."""
    draw = random.Random(seed)
    prompts = token_lists([7, 1, 13, 4, 1], vocabulary=vocabulary, seed=seed + 1)
    shape = [(0, 9), (2, 1), (1, 11), (0, 1), (2, 14), (3, 6), (4, 8), (0, 12), (4, 1)]
    made = []
    for i, (group, length) in enumerate(shape):
        completion = [draw.randrange(vocabulary) for _ in range(length)]
        mask = None
        if masks and i % 3 == 0:
            mask = [draw.random() < 0.6 for _ in completion]
        made.append(Document(prompts[group], completion, mask, group=group))
    return made


def plain_logprobs(model: Any, document: Document, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, entropy) of each completion token by the model's own forward on this document."""
    ids = torch.tensor([[*document.prompt_ids, *document.completion_ids]])
    start = len(document.prompt_ids)
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
    full = (logits / temperature).log_softmax(-1)
    return full.gather(-1, ids[0, start:, None])[:, 0], -(full.exp() * full).sum(-1).detach()


def processed(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Probabilities of one position, written down anew: temperature, then top-k, then top-p, renormalised."""
    logits = logits.double() / (temperature or 1.0)
    order = torch.argsort(logits, descending=True).tolist()
    if top_k:
        order = order[:top_k]
    weight = torch.softmax(logits[order], -1).tolist()
    kept, mass = [], 0.0
    for token, probability in zip(order, weight, strict=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probability
    result = torch.zeros_like(logits)
    result[kept] = torch.softmax(logits[kept], -1)
    return result
