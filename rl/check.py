"""`rl check`: everything that can be known about a recipe before a model is loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from data.problems import describe_problems
from data.spec import ProblemSpec
from data.texts import load_texts
from rewards import RewardError, load_reward
from rewards.spec import RewardSpec
from rl.check_ahead import check_ahead
from rl.check_rollout import check_sampling, rollout_table
from rl.check_tables import adapter_count, batch_table, config_of, memory_table, precision_table
from rl.recipe import EvaluateSpec, GRPORecipe, LogSpec, RolloutSpec, RunSpec, SFTRecipe, StagesRecipe, TrainSpec
from rl.recipe_data import DataRecipe
from rl.recipe_distill import DistillRecipe, LocalTeacher
from rl.recipe_gkd import GKDRecipe
from rl.recipe_io import RecipeError, dump, nearest
from rl.recipe_model import ModelSpec
from rl.stages import stage_recipes


def preflight(recipe: Any) -> list[str]:
    """Checks files, columns, rewards, model and batches of a recipe; raises RecipeError, returns warnings."""
    if isinstance(recipe, StagesRecipe):
        warnings: list[str] = []
        made: list[str] = []
        for name, stage in stage_recipes(recipe).items():
            try:
                warnings += [f"stages.{name}: {w}" for w in _preflight_one(stage, made)]
            except ValueError as error:
                raise RecipeError(f"stages.{name}.{error}") from error
            files = ("model", "problems.parquet", "pool.parquet", "traces.parquet")
            made += [str(Path(stage.output_dir) / name) for name in files]
        return warnings
    return _preflight_one(recipe, [])


def _preflight_one(recipe: Any, made: list[str]) -> list[str]:
    if isinstance(recipe, DistillRecipe):
        return _check_distillation(recipe, made)
    if isinstance(recipe, DataRecipe):
        from rl.check_data import check_curation

        _check_writable(recipe.output_dir)
        return check_curation(recipe, made)
    warnings = check_model("model", recipe.model, made)
    _check_log(recipe.log)
    if recipe.model.lora is not None:
        _check_adapters(recipe.model, made)
    warnings += check_precision(recipe)
    if isinstance(recipe, TrainSpec):
        check_launch(recipe)
    _check_experts(recipe, made)
    if isinstance(recipe, GRPORecipe):
        columns = _check_data("data", recipe.data, made)
        check_rewards("rewards", recipe.rewards, columns)
        warnings += _check_batches(recipe) + check_ahead(recipe)
        warnings += check_positions("model", recipe.model, recipe.rollout, made)
    if isinstance(recipe, GKDRecipe):
        from rl.check_gkd import check_distillation

        columns = _check_data("data", recipe.data, made)
        if recipe.gkd.on_policy < 1:
            _check_reasoning(recipe.data, columns)
        warnings += check_distillation(recipe, made)
    warnings += check_sampling(recipe)
    if isinstance(recipe, SFTRecipe) and recipe.texts is not None and recipe.texts.path is not None:
        try:
            next(load_texts(recipe.texts))
        except ValueError as error:
            raise RecipeError(f"texts: {error}") from error
    if isinstance(recipe, SFTRecipe) and recipe.data is not None:
        _check_reasoning(recipe.data, _check_data("data", recipe.data, made))
    evaluation = recipe.evaluate
    if isinstance(evaluation, EvaluateSpec):
        sets = evaluation.problem_sets()
        if not sets:
            raise RecipeError("evaluate: give evaluate.data or evaluate.sets")
        for name, spec in sets.items():
            field = "evaluate.data" if name == "held_out" else f"evaluate.sets.{name}"
            check_rewards("evaluate.rewards", evaluation.rewards, _check_data(field, spec, made))
    if isinstance(recipe, TrainSpec):
        _check_writable(recipe.output_dir)
    return warnings


def check_model(field: str, spec: ModelSpec, made: list[str]) -> list[str]:
    from rl.policy.load import is_local

    if spec.path is None or spec.path in made:
        return []
    if not is_local(spec.path):
        return [f"{field}.path: {spec.path} is a hub id; it is fetched when the run starts"]
    folder = Path(spec.path).expanduser()
    if not (folder / "config.json").is_file():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        reason = "has no config.json" if folder.is_dir() else "does not exist"
        raise RecipeError(
            f"{field}.path: folder {spec.path} {reason}; give a Hugging Face model folder or a hub id such as "
            f"Qwen/Qwen2.5-1.5B{nearest(folder.name, siblings)}"
        )
    return []


def _check_log(spec: LogSpec) -> None:
    for name in ("wandb", "tensorboard"):
        if getattr(spec, name) and importlib.util.find_spec(name) is None:
            raise RecipeError(f"log.{name}: {name} is not installed; pip install 'r1forge[{name}]'")


def _check_adapters(spec: ModelSpec, made: list[str]) -> None:
    """PEFT is here, and, as far as the model is, so are the layers that are to be adapted."""
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("model.lora: PEFT is not installed; pip install 'r1forge[peft]'")
    config = None if spec.path in made else config_of(spec)
    if config is not None and spec.lora is not None:
        adapter_count(config, spec.lora)


def check_precision(recipe: RunSpec) -> list[str]:
    """That the FP8 backend runs on this machine; a warning where moments could stand still."""
    if recipe.precision.kind == "fp8":
        import torch

        from rl.policy.precision import backend_for

        backend_for(recipe.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(recipe, TrainSpec) and recipe.optimizer.moments == "bfloat16" and recipe.optimizer.betas[1] > 0.99:
        return [
            f"optimizer.betas: with {recipe.optimizer.betas[1]} a bfloat16 second moment misses small changes; "
            "0.95 is usual, or set optimizer.moments: float32"
        ]
    return []


def check_launch(recipe: TrainSpec) -> None:
    """What the launcher's configuration asks for is here, and trains in this precision."""
    from rl.policy.precision import check_sharding
    from rl.policy.sharding import LaunchError, Sharding

    sharding = Sharding.of_environment()
    check_sharding(recipe.precision, sharding)
    if sharding.kind == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise LaunchError(f"{sharding} needs DeepSpeed: pip install 'r1forge[deepspeed]'")


def _check_experts(recipe: Any, made: list[str]) -> None:
    """Settings of mixtures of experts that the model, as far as it is here, cannot follow."""
    from rl.policy.load import is_local, load_tokenizer, model_config

    spec: ModelSpec = recipe.model
    if spec.path is not None and (spec.path in made or not is_local(spec.path)):
        return
    config = model_config(spec, load_tokenizer(spec) if spec.scratch is not None else None)
    ours = config.model_type == "deepseek_v3"
    if "moe" in recipe.model_fields_set and not ours:
        raise RecipeError(
            f"moe: the model is a {config.model_type}, not a deepseek_v3, so these settings mean nothing; remove them"
        )
    modules = config.num_nextn_predict_layers if ours else 0
    wanted = {
        "moe.mtp_loss": getattr(recipe, "moe", None) and recipe.moe.mtp_loss,
        "rollout.draft_tokens": getattr(recipe, "rollout", None) and recipe.rollout.draft_tokens,
        "evaluate.draft_tokens": recipe.evaluate and recipe.evaluate.draft_tokens,
    }
    for field, value in wanted.items():
        if value and not modules:
            raise RecipeError(
                f"{field}: the model has no multi-token prediction module (num_nextn_predict_layers): set it to 0"
            )


def _check_distillation(recipe: DistillRecipe, made: list[str]) -> list[str]:
    from rl.distill.check import TRACE_COLUMNS, check_settings, check_source, check_teacher

    warnings: list[str] = []
    columns = _check_data("data", recipe.data, made) if recipe.data is not None else list(TRACE_COLUMNS)
    if recipe.traces is not None and recipe.traces.path not in made:
        warnings += check_source(recipe.traces)
    if isinstance(recipe.teacher, LocalTeacher):
        warnings += check_teacher(recipe.teacher, made)
    check_rewards("rewards", recipe.rewards, columns)
    warnings += check_settings(recipe)
    _check_writable(recipe.output_dir)
    return warnings


def _check_data(field: str, spec: ProblemSpec, made: list[str]) -> list[str]:
    """The columns of a data set; empty for one on the hub or of an earlier stage, which is not read before the run."""
    paths = [spec.path] if isinstance(spec.path, str) else spec.path or []
    if spec.hub is not None or any(path in made for path in paths):
        return []
    try:
        return describe_problems(spec)[0]
    except ValueError as error:
        raise RecipeError(f"{field}: {error}") from error


def _check_reasoning(spec: ProblemSpec, columns: list[str]) -> None:
    """Worked solutions need a column that has them, where the columns are known."""
    from data.templates import resolve_template

    if columns and "reasoning" not in columns and "{reasoning}" in resolve_template(spec.template).completion:
        raise RecipeError(
            "data.columns: no column `reasoning` to learn from"
            f"{nearest('reasoning', columns)}; the data has {', '.join(columns)}: map one with "
            "data.columns: {reasoning: COLUMN}"
        )


def check_rewards(field: str, specs: list[RewardSpec], columns: list[str]) -> None:
    for i, spec in enumerate(specs):
        try:
            reward = load_reward(spec)
            if columns:
                reward.check_columns(c for c in columns if c != "prompt")  # passed as `prompts`
        except RewardError as error:
            raise RecipeError(f"{field}.{i}: {error}") from error


def _check_writable(folder: str) -> None:
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise RecipeError(f"output_dir: {folder} is a file; give a folder")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"output_dir: {folder} cannot be created: {parent} is not writable")


def _check_batches(recipe: GRPORecipe) -> list[str]:
    spec, warnings = recipe.grpo, []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_minibatch = spec.prompts_per_step // spec.minibatches_per_step
    if per_minibatch < world:
        raise RecipeError(
            f"grpo.prompts_per_step: a mini-batch has {per_minibatch} prompts, fewer than the {world} processes; "
            f"raise prompts_per_step to at least {world * spec.minibatches_per_step} or lower minibatches_per_step"
        )
    if per_minibatch % world:
        warnings.append(f"grpo: {per_minibatch} prompts a mini-batch do not divide evenly over {world} processes")
    warnings += check_longest("grpo", spec.tokens_per_microbatch, recipe.rollout)
    if recipe.rollout.top_p < 1 or recipe.rollout.top_k:
        warnings.append(
            "rollout: top_p or top_k narrows what is sampled; log-probabilities of sampler and trainer then "
            "differ by the cut tail"
        )
    if spec.loss.kind == "gspo" and spec.loss.clip_high > 0.01:
        warnings.append("grpo.loss: gspo's clip is usually 3e-4 / 4e-4, as its ratio is a mean over the sequence")
    if recipe.evaluate is None:
        warnings.append("evaluate: not given; nothing will be measured on held-out problems")
    return warnings


def check_longest(block: str, budget: int, rollout: RolloutSpec) -> list[str]:
    """A document that is longer than a micro-batch should be."""
    longest = rollout.max_prompt_tokens + rollout.max_tokens
    if longest <= budget:
        return []
    return [
        f"{block}.tokens_per_microbatch ({budget}) is below the longest possible document ({longest}): such a document "
        "is a micro-batch of its own, larger than the budget"
    ]


def check_positions(field: str, model: ModelSpec, rollout: RolloutSpec, made: list[str]) -> list[str]:
    """A model whose positions end before the longest document does."""
    limit = None
    if model.scratch is not None and model.scratch.preset is None:
        limit = model.scratch.max_positions
    elif model.path not in made:
        limit = getattr(config_of(model, field), "max_position_embeddings", None)
    need = rollout.max_prompt_tokens + rollout.max_tokens
    if limit is not None and need > limit:
        return [
            f"rollout: max_prompt_tokens + max_tokens = {need}, beyond the {limit} positions of `{field}`; quality may "
            "fall off there"
        ]
    return []


# ---- what `rl check` prints --------------------------------------------------------------------------


def check(recipe: Any) -> str:
    """The resolved recipe, the batch table, the memory estimate and warnings, as text."""
    warnings = preflight(recipe)
    parts = ["# resolved recipe", dump(recipe)]
    stages = stage_recipes(recipe) if isinstance(recipe, StagesRecipe) else {"": recipe}
    for name, stage in stages.items():
        title = f" of stage {name}" if name else ""
        if isinstance(stage, TrainSpec):
            parts += [f"# batches{title}", *batch_table(stage), ""]
        if isinstance(stage, GRPORecipe | GKDRecipe):
            parts += [f"# rollouts{title}", *rollout_table(stage), ""]
        if isinstance(stage, DistillRecipe):
            from rl.distill.check import sampling_table

            parts += [f"# sampling{title}", *sampling_table(stage), ""]
        elif isinstance(stage, DataRecipe):
            from rl.check_data import source_table

            parts += [f"# sources{title}", *source_table(stage), ""]
        elif not isinstance(stage, StagesRecipe):
            if stage.precision.kind == "fp8":
                parts += [f"# precision{title}", *precision_table(stage), ""]
            parts += [f"# memory{title} (estimate)", *memory_table(stage), ""]
    parts += [f"warning: {w}" for w in warnings] or ["no warnings"]
    return "\n".join(parts)
