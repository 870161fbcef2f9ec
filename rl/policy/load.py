"""Loading a causal LM and its tokenizer: from a folder, the hub, or random weights of a named architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rl.policy.attention import recomputation_contexts
from rl.recipe_io import RecipeError, nearest
from rl.recipe_model import ModelSpec, ScratchModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Attention-only decoders whose layers go through transformers' attention interface in plain causal form.
# Others are served by padding and `generate`.
SUPPORTED_TYPES = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "cohere2",
        "olmo2", "olmo3", "phi3", "smollm3", "starcoder2", "glm4", "ministral", "seed_oss", "helium", "arcee",
        "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3",
    }
)  # fmt: skip


def load_tokenizer(spec: ModelSpec, field: str = "model") -> Any:
    """The tokenizer, with a padding token (EOS where it has none). field: the recipe's name of `spec`, for errors."""
    from transformers import AutoTokenizer

    source = spec.tokenizer or spec.path
    if source is None:
        assert spec.scratch is not None
        return character_tokenizer(spec.scratch.characters)
    with explained(f"{field}.tokenizer" if spec.tokenizer else f"{field}.path", source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision if source == spec.path else None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: ModelSpec, tokenizer: Any, *, seed: int = 0, dtype: torch.dtype, field: str = "model") -> Any:
    """The model with parameters in `dtype`, without dropout, in evaluation mode."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a shard is noise in a log
    config = model_config(spec, tokenizer, field)
    if spec.path is not None:
        with explained(f"{field}.path", spec.path):
            model = model_class(config).from_pretrained(
                spec.path, config=config, revision=spec.revision, dtype=dtype, attn_implementation=spec.attention
            )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the only use of torch's global stream: random initial weights
            model = model_from(config)
        cast_parameters(model, dtype)
    model.config.use_cache = False
    if getattr(model.config, "attention_dropout", 0.0):
        model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the policy that is trained must be the one that was sampled from
    if spec.gradient_checkpointing:
        # transformers 5.23 renamed it; the argument is the same.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": lambda: recomputation_contexts(model)})
    return model.eval()


@contextmanager
def explained(field: str, source: str) -> Iterator[None]:
    """transformers raises OSError or ValueError for what is not there or not a model: name the field."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(f"{field}: {source} cannot be loaded: {first}") from error


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Casts parameters in place; buffers (rotary frequencies) and what the model keeps in fp32 stay."""
    kept = set(kept_in_float32(model))
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(dtype)


def kept_in_float32(model: Any) -> list[str]:
    """Parameters that the model's class wants in float32 whatever its compute type."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return [name for name, _ in model.named_parameters() if kept & set(name.split("."))]


def model_config(spec: ModelSpec, tokenizer: Any, field: str = "model") -> Any:
    """The model's Hugging Face config with the recipe's changes; for a DeepSeek-V3 or V2 our own MoEConfig."""
    from transformers import AutoConfig

    if spec.path is None:
        assert spec.scratch is not None
        return scratch_config(spec.scratch, tokenizer)
    with explained(f"{field}.path", spec.path):
        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision)
    unknown = [name for name in spec.config if not hasattr(config, name)]
    ours = config.model_type in ("deepseek_v3", "deepseek_v2")
    if unknown and not ours:
        names = [n for n in config.to_dict() if not n.startswith("_")]
        raise RecipeError(
            f"{field}.config.{unknown[0]}: a {config.model_type} has no such field{nearest(unknown[0], names)}"
        )
    if ours:
        from model import MoEConfig

        try:
            return MoEConfig(**{**config.to_dict(), **spec.config})
        except ValueError as error:
            raise RecipeError(f"{field}.config.{error}") from error
    for name, value in spec.config.items():
        setattr(config, name, value)
    return config


def model_class(config: Any) -> Any:
    """Whose `from_pretrained` reads a checkpoint of this config."""
    if config.model_type == "deepseek_v3":
        from model import MoEForCausalLM

        return MoEForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def model_from(config: Any) -> Any:
    """A float32 model with random weights."""
    kind = model_class(config)
    return kind(config) if config.model_type == "deepseek_v3" else kind.from_config(config, dtype=torch.float32)


def scratch_config(scratch: ScratchModel, tokenizer: Any) -> Any:
    """The Hugging Face config of a model that starts from random weights."""
    from transformers import AutoConfig

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if scratch.preset is not None:
        from model import MoEConfig

        try:
            return MoEConfig.preset(scratch.preset, **{**special, **scratch.config})
        except ValueError as error:
            raise RecipeError(f"model.scratch.config.{error}") from error
    return AutoConfig.for_model(
        scratch.family,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.kv_heads,
        head_dim=scratch.hidden_size // scratch.heads,
        max_position_embeddings=scratch.max_positions,
        tie_word_embeddings=scratch.tie_embeddings,
        **special,
        **scratch.config,
    )


def character_tokenizer(characters: str | None = None) -> Any:
    """One token per character, plus <pad>, <s>, </s> and the think/answer tags as single tokens."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    characters = characters or "\n" + "".join(map(chr, range(32, 127)))
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    vocabulary = {token: i for i, token in enumerate([*special, *tags, *sorted(set(characters))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_tokens(tags)  # known to the vocabulary: matched whole before the split
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's EOS and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in [tokenizer.eos_token_id, *ids] if i is not None}))


def is_local(path: str) -> bool:
    """Whether a model path means a folder here, rather than a hub id such as `org/name`."""
    return Path(path).expanduser().is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1
