"""The recipe of `pipeline: data`: raw problem files to a clean problem set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data.curation.spec import ContaminationSpec, DuplicateSpec, FilterSpec, OnError, SourceSpec
from data.templates import TemplateSpec
from rewards.spec import RewardSpec
from rl.recipe import SamplingSpec
from rl.recipe_base import Fraction, Positive, Strict
from rl.recipe_model import ModelSpec


class DifficultySpec(SamplingSpec):
    """The pass rate of a model on each problem; what it nearly always or hardly ever solves is left out."""

    model: ModelSpec
    rewards: list[RewardSpec] = Field(default_factory=lambda: [RewardSpec(name="math")], min_length=1)
    template: str | TemplateSpec = "boxed"
    samples: Positive = 8
    band: tuple[Fraction, Fraction] = Field((0.1, 0.9), description="lowest and highest pass rate that is kept")
    max_slots: Positive = 64
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are dropped, and counted")
    chunk: Positive = Field(64, description="problems between two writes: what a kill costs at most")


class DataRecipe(Strict):
    """Raw problem files to a clean problem set with its data card (see docs/data.md)."""

    pipeline: Literal["data"]
    output_dir: str
    title: str = Field("Problems", description="of the data card")
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    threads: Positive | None = Field(None, description="CPU threads of torch; None = all cores over the processes here")
    sources: list[SourceSpec] = Field(min_length=1)
    filters: FilterSpec = FilterSpec()
    decontaminate: ContaminationSpec = ContaminationSpec()
    duplicates: DuplicateSpec = DuplicateSpec()
    difficulty: DifficultySpec | None = None
    on_error: OnError = Field("skip", description="a row that cannot be read: counted and listed, or the run stops")

    @model_validator(mode="after")
    def _named_once(self) -> DataRecipe:
        for field, names in (
            ("sources", [source.name for source in self.sources]),
            ("decontaminate.sets", [one.name for one in self.decontaminate.sets]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{field}: two are named {twice!r}; give each a name of its own")
        if self.difficulty is not None and self.difficulty.band[0] > self.difficulty.band[1]:
            raise ValueError("difficulty.band: the lowest pass rate comes first")
        return self
