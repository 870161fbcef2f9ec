"""What `rl check` says of quantised weights against what a run holds, and of launchers that cannot train in FP8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sharding import FSDP, ZERO, launched
from tiny_models import tiny_model

from model.fp8.weights import QuantizedWeight
from recipes import SCRATCH, grpo
from rl.check import check_launch
from rl.check_tables import memory_table
from rl.grpo import GRPO
from rl.policy.precision import apply_precision
from rl.policy.processes import Processes
from rl.policy.sharding import Sharding
from rl.recipe import GRPORecipe
from rl.recipe_io import RecipeError, validate
from rl.recipe_model import PrecisionSpec
from rl.run.progress import Progress

SMALL = {"grpo__steps": 1, "grpo__prompts_per_step": 2, "grpo__samples_per_prompt": 2, "rollout__max_tokens": 4}


def recipe_of(folder: Any, **changes: Any) -> GRPORecipe:
    made = grpo(folder, **{**SMALL, "model": {"scratch": SCRATCH}, "grpo__kl__coefficient": 0.01, **changes})
    recipe = validate({**made, "precision": "fp8"})
    assert isinstance(recipe, GRPORecipe)
    return recipe


def estimated(monkeypatch: pytest.MonkeyPatch, recipe: GRPORecipe) -> dict[str, float]:
    """Bytes by the name of the row."""
    monkeypatch.setattr("rl.check_tables.GiB", 1)
    lines = [line.rsplit(None, 2) for line in memory_table(recipe) if line.endswith("GiB")]
    return {name.strip(): float(size) for name, size, _ in lines}


def held(model: Any) -> int:
    """Bytes of quantised weights and their transposes; without scales, 4 bytes for 128 x 128 values."""
    found = [v for module in model.modules() for v in vars(module).values() if isinstance(v, QuantizedWeight)]
    return sum(q.values.nbytes for v in found for q in (v._copy, v._transpose) if q is not None)


def test_check_counts_what_policy_and_reference_hold(monkeypatch, tmp_path):
    trainer = GRPO(recipe_of(tmp_path), Processes())
    trainer.send_weights()
    trainer.step(1)
    rows = estimated(monkeypatch, trainer.recipe)
    assert held(trainer.policy.model) == rows["FP8 weights"] > 0  # with transposes
    assert held(trainer.reference.policy.model) == rows["reference's FP8 weights"] == rows["FP8 weights"] / 2


def test_a_reference_without_quantised_weights_counts_none(monkeypatch, tmp_path):
    name = "reference's FP8 weights"
    assert name not in estimated(monkeypatch, recipe_of(tmp_path, grpo__kl__coefficient=0.0))
    assert name not in estimated(monkeypatch, recipe_of(tmp_path, model__lora={"r": 2}))  # the policy without adapters
    launched(monkeypatch, WORLD_SIZE="4", **FSDP)
    assert name not in estimated(monkeypatch, recipe_of(tmp_path))


def test_check_refuses_a_launcher_that_the_run_would_refuse(monkeypatch, tmp_path):
    recipe = recipe_of(tmp_path)
    check_launch(recipe)
    launched(monkeypatch, WORLD_SIZE="2", **ZERO)
    with pytest.raises(RecipeError, match="not with DeepSpeed"):
        check_launch(recipe)


def test_what_stays_whole_runs_in_fp8_under_any_launcher():
    """An evaluation, which shards nothing."""
    processes: Any = SimpleNamespace(sharding=Sharding("zero", 3), device=torch.device("cpu"))
    progress = Progress(enabled=False)
    with pytest.raises(RecipeError, match="not with DeepSpeed"):
        apply_precision(tiny_model("llama", layers=1), PrecisionSpec(kind="fp8"), processes, progress)
    apply_precision(tiny_model("llama", layers=1), PrecisionSpec(kind="fp8"), processes, progress, whole=True)
