"""LoRA adapters by PEFT: small matrices beside the linear layers learn, the model itself stays as it was loaded.

The reference of the KL term is then the same model with its adapters off, and costs no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl.policy.packing import Pack
from rl.policy.policy import Policy
from rl.recipe_io import RecipeError, nearest
from rl.recipe_model import LoRASpec

ADAPTER = "default"  # PEFT's name for the only one
_PARTS = re.compile(rf"\.(base_layer|lora_A\.{ADAPTER}|lora_B\.{ADAPTER})\.(weight|bias)$")
# Read as a matrix while decoding (the absorbed form of latent attention), past any adapter.
_UNADAPTED = frozenset({"kv_b_proj"})


def add_adapters(model: Any, spec: LoRASpec, seed: int) -> None:
    """Puts adapters into a model, in place; from here on nothing else is trained. The first change nothing."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=spec.r, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=targets(model, spec))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def targets(model: Any, spec: LoRASpec) -> list[str]:
    """The last parts of the names of linear layers that get an adapter."""
    head = model.get_output_embeddings()
    possible = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    } - _UNADAPTED
    wanted = sorted(possible) if spec.target_modules is None else spec.target_modules
    for name in wanted:
        if name not in possible:
            raise RecipeError(
                f"model.lora.target_modules: {name!r} is no linear layer that can be adapted"
                f"{nearest(name, possible)}; there are: {', '.join(sorted(possible))}"
            )
    return list(wanted)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within it the model is the one that was loaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would also change what is trained
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class AdapterReference:
    """The policy with its adapters off; it never moves, so there is nothing to save."""

    moves = False

    def __init__(self, policy: Policy):
        self.policy = policy

    @torch.no_grad()
    def logprobs(self, batch: Pack) -> Tensor:
        with adapters_off(self.policy.model):
            return self.policy.logprobs(batch)[0]

    def updated(self, updates_done: int) -> None:
        pass

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    def load(self, read: Any) -> None:
        pass


def merged(model: Any, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model with adapters as those of the model without: W + scaling · B A, summed in float32.

    named: (name, whole tensor), a layer's parts beside each other, as `named_parameters` gives them.
    """
    waiting: dict[str, Tensor] = {}
    for name, tensor in named:
        found = _PARTS.search(name)
        if found is None:
            yield name, tensor
            continue
        module = name[: found.start()]
        if found[2] == "bias":
            yield f"{module}.bias", tensor
            continue
        waiting[found[1].partition(".")[0]] = tensor
        if len(waiting) == 3:
            change = waiting["lora_B"].float() @ waiting["lora_A"].float()
            weight = waiting["base_layer"]
            scaling = model.get_submodule(module).scaling[ADAPTER]
            yield f"{module}.weight", (weight.float() + scaling * change).to(weight.dtype)
            waiting = {}


def block_of(name: str) -> str:
    """The module around the one that a weight belongs to (`...self_attn` of q_proj's), with or without adapters."""
    module = _PARTS.split(name)[0] if _PARTS.search(name) else name.rpartition(".")[0]
    return module.rpartition(".")[0]


def write_adapter(folder: Path, model: Any, named: Iterable[tuple[str, Tensor]], base: str | None) -> None:
    """The adapter alone, as `PeftModel.from_pretrained` reads it. base: what it was trained on."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.to("cpu", copy=True).contiguous()
        for name, tensor in named
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.save_pretrained(folder)
