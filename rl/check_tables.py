"""What `rl check` prints of batches and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.policy.sharding import Sharding
from rl.recipe import EvalRecipe, GRPORecipe, SFTRecipe, TrainSpec
from rl.recipe_gkd import GKDRecipe
from rl.recipe_model import LoRASpec, ModelSpec, PrecisionSpec

if TYPE_CHECKING:
    from model.fp8.convert import Conversion

GiB = 1024**3


def batch_table(recipe: TrainSpec) -> list[str]:
    if isinstance(recipe, GKDRecipe):
        from rl.check_gkd import distillation_batches

        return distillation_batches(recipe)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(recipe, SFTRecipe):
        sft = recipe.sft
        return [
            f"documents per update      {sft.batch_size} ({sft.batch_size / world:g} per process, {world} process(es))",
            f"tokens per micro-batch    {sft.tokens_per_microbatch} at most, per process",
        ]
    assert isinstance(recipe, GRPORecipe)
    spec, rollout = recipe.grpo, recipe.rollout
    rollouts = spec.prompts_per_step * spec.samples_per_prompt
    batch = rollouts // spec.minibatches_per_step
    updates = spec.minibatches_per_step * spec.epochs_per_step
    tokens = batch * (rollout.max_prompt_tokens + rollout.max_tokens)
    return [
        f"completions per step      {spec.prompts_per_step} prompts x {spec.samples_per_prompt} samples = {rollouts}"
        f" ({rollouts / world:g} per process, {world} process(es))",
        f"updates per step          {spec.minibatches_per_step} mini-batches x {spec.epochs_per_step} epoch(s) = "
        f"{updates}",
        f"completions per update    {batch} = {spec.prompts_per_step // spec.minibatches_per_step} prompts x "
        f"{spec.samples_per_prompt} samples",
        f"tokens per micro-batch    {spec.tokens_per_microbatch} at most, per process",
        f"micro-batches per update  {-(-tokens // (spec.tokens_per_microbatch * world))} per process at most "
        f"(every completion {rollout.max_tokens} tokens long)",
        f"in all                    {spec.steps} steps, {spec.steps * updates} updates, {spec.steps * rollouts} "
        "completions",
    ]


def memory_table(recipe: Any) -> list[str]:
    """Bytes per process. Weights and optimizer exactly; activations by a rule of thumb, said so."""
    spec: ModelSpec = recipe.model
    if isinstance(recipe, EvalRecipe) and recipe.workers is not None:
        return ["the workers hold the model"]
    config = config_of(spec)
    if config is None:
        return [f"{spec.path}: not here yet, so its size is not known"]
    count = parameter_count(config)
    text = config.get_text_config()
    low = 2 if spec.dtype == "bfloat16" else 4
    sharding = Sharding.of_environment()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows: dict[str, float] = {"weights": count * low}
    in_fp8 = fp8_layers(config, recipe.precision).parameters if recipe.precision.kind == "fp8" else 0
    rows["FP8 weights"] = in_fp8 * fp8_copies(recipe, sharding)
    notes = []
    if isinstance(recipe, TrainSpec):
        moments = 8 if recipe.optimizer.moments == "float32" else 4
        trained = count if spec.lora is None else adapter_count(config, spec.lora)
        masters = trained * 4 if low == 2 or sharding.kind == "zero" else 0
        rows |= {"float32 masters": masters, "float32 gradients": trained * 4, "Adam moments": trained * moments}
        if sharding.kind == "fsdp2":  # parameters stay float32: those that are trained are the masters
            rows["weights"] = 0 if masters and spec.lora is None else count * 4
        if sharding.kind != "none":
            rows |= sharded_rows(rows, sharding, world)
            if not sharding.whole and samples_here(recipe):
                rows["whole copy for the sampler"] = count * low
            notes.append(f"under {sharding} over {world} processes: docs/backends.md")
        tokens = getattr(recipe, recipe.pipeline).tokens_per_microbatch  # type: ignore[attr-defined]
        # Rule of thumb, per token and layer: about 16 values of the hidden size and 4 of the feed-forward
        # size are kept for the backward pass; with checkpointing one of the hidden size, and one layer whole.
        layer = 16 * text.hidden_size + 4 * getattr(text, "intermediate_size", 4 * text.hidden_size)
        if spec.gradient_checkpointing:
            rows["activations (rough)"] = tokens * (text.num_hidden_layers * text.hidden_size + layer) * low
        else:
            rows["activations (rough)"] = tokens * text.num_hidden_layers * layer * low
        rows["logits, one chunk"] = 3 * 4 * 1024 * text.vocab_size
    if isinstance(recipe, GRPORecipe):
        if recipe.grpo.kl.coefficient and spec.lora is None:
            whole = count * (low + 4 * (recipe.grpo.reference.ema is not None))
            rows["reference"] = whole if sharding.whole else whole / world
            # It has no backward pass, so no transposes; shards have no quantised copies at all.
            rows["reference's FP8 weights"] = in_fp8 if sharding.kind == "none" else 0
    if isinstance(recipe, GKDRecipe):
        teacher = config_of(recipe.teacher, "teacher")
        if teacher is None:
            notes.append(f"teacher {recipe.teacher.path}: not here yet, so it is not counted")
        else:
            rows["teacher"] = parameter_count(teacher) * (2 if recipe.teacher.dtype == "bfloat16" else 4)
        rows["teacher's logits"] = rows["logits, one chunk"]
    if isinstance(recipe, GRPORecipe | GKDRecipe) and samples_here(recipe):
        capacity = recipe.rollout.max_prompt_tokens + recipe.rollout.max_tokens
        per_layer = cached_values(text) * low * recipe.rollout.max_slots * capacity
        rows["key/value slots"] = text.num_hidden_layers * per_layer
    lines = [f"{name:<26} {size / GiB:8.2f} GiB" for name, size in rows.items() if size]
    return [f"parameters {count:,}", *lines, f"{'sum, at most':<26} {sum(rows.values()) / GiB:8.2f} GiB", *notes]


def samples_here(recipe: TrainSpec) -> bool:
    """Whether the policy is sampled from in the trainer's processes, by a sampler of ours."""
    if isinstance(recipe, GRPORecipe | GKDRecipe):
        return recipe.rollout.mode == "inprocess"
    return recipe.evaluate is not None


def fp8_copies(recipe: TrainSpec | EvalRecipe, sharding: Sharding) -> int:
    """Bytes of quantised weights that a process keeps for each parameter in FP8."""
    if isinstance(recipe, EvalRecipe):
        return 1
    if sharding.kind == "none":
        return 2  # transposed too
    return int(samples_here(recipe))  # shards have none, only the whole copy for the sampler


def sharded_rows(rows: dict[str, float], sharding: Sharding, world: int) -> dict[str, float]:
    """Of `rows` what a process holds of it. (A layer's gathered weights are left out: they come and go.)"""
    parts = {"float32 masters", "Adam moments"}
    if sharding.kind == "fsdp2" or sharding.stage >= 2:
        parts.add("float32 gradients")
    if not sharding.whole:
        parts.add("weights")
    return {name: size / world for name, size in rows.items() if name in parts}


def config_of(spec: ModelSpec, field: str = "model") -> Any:
    """The model's config, as far as it is here, or may be known by its preset; otherwise None."""
    from rl.policy.load import is_local, load_tokenizer, model_config

    if spec.scratch is not None:
        return model_config(spec, load_tokenizer(spec))
    if spec.path is not None and is_local(spec.path) and Path(spec.path).is_dir():
        return model_config(spec, None, field)
    if spec.preset is not None:
        from model import MoEConfig

        return MoEConfig.preset(spec.preset, **spec.config)
    return None


def precision_table(recipe: Any) -> list[str]:
    """Of a recipe with `precision: fp8`: what runs the products here, and which layers are in FP8."""
    import torch

    from model.fp8.backends import describe

    lines = [describe("cuda" if torch.cuda.is_available() else "cpu")]
    if recipe.precision.backend != "auto":
        lines = [f"FP8 by backend {recipe.precision.backend}, as the recipe asks"]
    config = config_of(recipe.model)
    if config is not None:
        found = fp8_layers(config, recipe.precision)
        share = found.parameters / parameter_count(config)
        lines.append(f"{len(found.converted)} layers with {share:.1%} of the parameters; in {recipe.model.dtype} stay")
        lines.append(", ".join(found.kept) + ", embeddings, norms and attention")
    return lines


def fp8_layers(config: Any, spec: PrecisionSpec) -> Conversion:
    """What `precision` does to a model of this config, found on the meta device."""
    from model.fp8.convert import to_fp8
    from rl.recipe_io import RecipeError

    try:
        return to_fp8(meta_model(config), skip=spec.skip)
    except ValueError as error:
        raise RecipeError(f"precision: {error}") from error


def cached_values(config: Any) -> int:
    """Numbers that a layer keeps of one token while sampling."""
    latent = getattr(config, "latent_values_per_token", None)
    if latent is not None:
        return int(latent)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * size)


def adapter_count(config: Any, spec: LoRASpec) -> int:
    """Parameters of the adapters of such a model; RecipeError if they cannot be as the recipe says."""
    import torch

    from rl.policy.load import model_from
    from rl.policy.lora import targets

    with torch.device("meta"):
        model = model_from(config)
    names = set(targets(model, spec))
    linear = [m for n, m in model.named_modules() if n.rpartition(".")[2] in names and isinstance(m, torch.nn.Linear)]
    return sum(spec.r * (m.in_features + m.out_features) for m in linear)


def parameter_count(config: Any) -> int:
    """Parameters of the causal LM of a config."""
    return sum(p.numel() for p in meta_model(config).parameters())


def meta_model(config: Any) -> Any:
    """The causal LM of a config without memory."""
    import torch

    from rl.policy.load import model_from

    with torch.device("meta"):
        return model_from(config)
