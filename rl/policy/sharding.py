"""What the accelerate configuration asks for: how the model is spread over the processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from rl.recipe_io import RecipeError


class LaunchError(RecipeError):
    """Launcher and process group disagree, or ask for what is not here."""


@dataclass(frozen=True)
class Sharding:
    """How the model is spread over the processes: what `recipes/accelerate/*.yaml` say, and nothing else does."""

    kind: Literal["none", "fsdp2", "zero"] = "none"
    stage: int = 0  # of ZeRO
    reshard: bool = True  # FSDP2: a layer's weights are dropped after its forward, gathered again for its backward
    offload_parameters: bool = False  # to CPU memory
    offload_optimizer: bool = False

    @classmethod
    def of_environment(cls) -> Sharding:
        """From the variables in which `accelerate launch` hands on its configuration."""
        if _flag("ACCELERATE_USE_MEGATRON_LM"):
            raise LaunchError(
                "the accelerate configuration asks for Megatron-LM, which is not supported: use distributed_type "
                "MULTI_GPU, FSDP or DEEPSPEED, as in recipes/accelerate/"
            )
        if _flag("ACCELERATE_USE_FSDP"):
            return cls._fsdp()
        if _flag("ACCELERATE_USE_DEEPSPEED"):
            return cls._deepspeed()
        return cls()

    @classmethod
    def _fsdp(cls) -> Sharding:
        if os.environ.get("FSDP_VERSION") != "2":
            raise LaunchError("fsdp_config.fsdp_version: only 2 is supported, as in recipes/accelerate/fsdp2.yaml")
        if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
            raise LaunchError(
                "fsdp_config.fsdp_activation_checkpointing: remove it; model.gradient_checkpointing decides"
            )
        offload = _flag("FSDP_OFFLOAD_PARAMS")
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        return cls("fsdp2", reshard=reshard, offload_parameters=offload, offload_optimizer=offload)

    @classmethod
    def _deepspeed(cls) -> Sharding:
        get = os.environ.get
        if get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise LaunchError(
                "deepspeed_config.deepspeed_config_file: remove it; optimizer, clipping and precision are the "
                "recipe's, stage and offloading stand beside it, as in recipes/accelerate/zero3.yaml"
            )
        for variable, field, advice in (
            ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "optimizer.clip in the recipe"),
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "the recipe's batch sizes"),
        ):
            if get(variable, "none").lower() not in ("none", "1"):
                raise LaunchError(f"deepspeed_config.{field}: remove it, {advice} decides")
        if _flag("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
            raise LaunchError(
                "deepspeed_config.zero3_init_flag: set it to false; models are loaded whole, then sharded"
            )
        stage = int(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        if stage not in (1, 2, 3):
            raise LaunchError(f"deepspeed_config.zero_stage: {stage} is not 1, 2 or 3; MULTI_GPU replicates the model")
        offload = {}
        for what, variable in (("optimizer", "OPTIMIZER"), ("param", "PARAM")):
            device = get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{variable}_DEVICE", "none").lower()
            if device not in ("none", "cpu"):
                raise LaunchError(f"deepspeed_config.offload_{what}_device: {device} is not supported; use none or cpu")
            offload[what] = device == "cpu"
        if offload["param"] and stage != 3:
            raise LaunchError("deepspeed_config.offload_param_device: cpu needs zero_stage 3")
        return cls("zero", stage, offload_parameters=offload["param"], offload_optimizer=offload["optimizer"])

    @property
    def whole(self) -> bool:
        """Whether every process holds the whole model in its compute type."""
        return self.kind == "none" or (self.kind == "zero" and self.stage < 3)

    def __str__(self) -> str:
        offloaded = " offloaded to CPU" if self.offload_parameters or self.offload_optimizer else ""
        return {"none": "replicated", "fsdp2": "FSDP2", "zero": f"ZeRO-{self.stage}"}[self.kind] + offloaded


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
