"""The folder that an engine with weights of its own is started from, before it gets the trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from model.checkpoint.export import export_fp8
from model.checkpoint.files import CONFIG, read_json
from rl.policy.backend import Backend
from rl.policy.export import export_model
from rl.policy.load import is_local
from rl.policy.names import in_fp8
from rl.recipe import GRPORecipe
from rl.recipe_gkd import GKDRecipe
from rl.run.checkpoint import write_folder
from rl.run.folder import Run


def model_folder(recipe: GRPORecipe | GKDRecipe, run: Run) -> Path:
    """The recipe's folder if it is the policy as it is, else one that `write_starting_model` writes."""
    given = _given(recipe)
    written = run.folder / "workers"
    if not _loads_fp8(recipe):
        return given or written / "model"
    return given if given is not None and _holds_fp8(given) else written / "model-fp8"


def write_starting_model(recipe: GRPORecipe | GKDRecipe, backend: Backend, tokenizer: Any, run: Run) -> None:
    """Writes that folder, where it has to be. Called on every process of the trainer."""
    target, plain = model_folder(recipe, run), run.folder / "workers" / "model"
    given = _given(recipe)
    if target == given:
        return
    if given is None:
        export_model(plain, backend, tokenizer, adapters=recipe.model.lora is not None)
    if target != plain:
        if backend.rank == 0:
            weights = in_fp8(backend.model, as_in_files=True)
            kept = [name for name, module in backend.model.named_modules() if type(module) is nn.Linear]
            write_folder(target, lambda path: export_fp8(given or plain, path, weights=weights, kept=kept))
        backend.processes.barrier()


def _given(recipe: GRPORecipe | GKDRecipe) -> Path | None:
    spec = recipe.model
    if spec.path is None or not is_local(spec.path) or spec.config or spec.tokenizer is not None:
        return None
    return Path(spec.path).expanduser().resolve()


def _loads_fp8(recipe: GRPORecipe | GKDRecipe) -> bool:
    """vLLM takes weights in the form of the files that it was started from; a local engine in any."""
    workers = recipe.rollout.workers
    return recipe.rollout.engine == "vllm" and workers is not None and workers.weights == "fp8"


def _holds_fp8(folder: Path) -> bool:
    return "quantization_config" in read_json(folder / CONFIG)
