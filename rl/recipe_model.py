"""What a recipe says of a model: where it comes from, what of it is trained, in which precision it computes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rl.recipe_base import Positive, Strict

Preset = Literal["671b", "16b", "tiny"]


class ScratchModel(Strict):
    """A model from random weights (quickstarts and tests): a family of transformers, or a preset of our own."""

    preset: Preset | None = Field(
        None, description="our DeepSeek-V3; its shape comes from the preset and `config`, not from the fields below"
    )
    family: str = Field("llama", description="a transformers model_type")
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    max_positions: Positive = 512
    tie_embeddings: bool = False
    characters: str | None = Field(None, description="alphabet of the tokenizer; None = printable ASCII")
    config: dict[str, Any] = Field(default_factory=dict, description="further fields of the model's config")

    @model_validator(mode="after")
    def _one_shape(self) -> ScratchModel:
        shape = self.model_fields_set - {"preset", "characters", "config"}
        if self.preset is not None and shape:
            raise ValueError(f"{min(shape)} means nothing beside preset: change the preset's shape under config")
        return self


class LoRASpec(Strict):
    """Adapters are trained in place of the model (PEFT). No dropout: what is trained must be what was sampled from."""

    r: Positive = Field(16, description="rank")
    alpha: float = Field(32.0, gt=0, description="the adapter's output is scaled by alpha / r")
    target_modules: list[str] | None = Field(
        None, min_length=1, description="names of linear layers, such as q_proj; None = all but the head"
    )


class ModelSpec(Strict):
    path: str | None = Field(None, description="folder or hub id of a causal LM")
    revision: str | None = None
    scratch: ScratchModel | None = None
    tokenizer: str | None = Field(None, description="folder or hub id; None = the model's own")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="compute type; masters are float32")
    attention: str | None = Field(None, description="attention of padded forwards; None = transformers' choice")
    gradient_checkpointing: bool = False
    config: dict[str, Any] = Field(default_factory=dict, description="fields of the loaded model's config to change")
    preset: Preset | None = Field(None, description="whose shape `path` has, for estimates before it is here")
    lora: LoRASpec | None = Field(None, description="train adapters; in training recipes only")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give exactly one of model.path and model.scratch")
        return self


class PrecisionSpec(Strict):
    """`precision: fp8` is short for `precision: {kind: fp8}`."""

    kind: Literal["bf16", "fp8"] = Field("bf16", description="of products: all in model.dtype, or linear layers in FP8")
    backend: str = Field("auto", description="which FP8 kernels; auto = the first that runs on the device")
    skip: tuple[str, ...] = Field((), description="patterns of layers that stay in model.dtype, as in '*.q_proj'")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fields_mean_something(self) -> PrecisionSpec:
        if self.kind != "fp8" and (self.backend != "auto" or self.skip):
            raise ValueError(f"{'skip' if self.skip else 'backend'} means nothing without kind: fp8")
        return self
