"""The recipe of generalized knowledge distillation: a student learns the distribution of a local teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data.spec import ProblemSpec
from rl.recipe import MoESpec, RolloutSpec, TrainSpec
from rl.recipe_base import Fraction, Positive, Strict
from rl.recipe_model import ModelSpec
from rl.recipe_workers import check_weights


class GKDSpec(Strict):
    """A step is one update: on the student's samples, or on as many given solutions."""

    steps: Positive = 100
    prompts_per_step: Positive = 32
    samples_per_prompt: Positive = 1
    tokens_per_microbatch: Positive = 8192
    share_prompts: bool = Field(True, description="compute a prompt once per micro-batch for all of its samples")
    on_policy: Fraction = Field(1.0, description="λ: share of steps on the student's samples, the others on solutions")
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    beta: float = Field(0.5, gt=0, lt=1, description="β of jsd: near 0 as the forward KL, near 1 as the reverse")
    temperature: float = Field(1.0, gt=0, description="of both distributions that are compared")
    max_seconds: float | None = Field(None, gt=0, description="stop after this much training time")


class GKDRecipe(TrainSpec):
    """`model` is the student. Solutions (`on_policy` below 1) come from the column `reasoning` of `data`."""

    pipeline: Literal["gkd"]
    teacher: ModelSpec
    data: ProblemSpec
    rollout: RolloutSpec = RolloutSpec()
    gkd: GKDSpec = GKDSpec()
    moe: MoESpec = MoESpec()

    @model_validator(mode="after")
    def _consistent(self) -> GKDRecipe:
        if self.teacher.path is None:
            raise ValueError("teacher: a model of random weights has nothing to teach; give teacher.path")
        if self.rollout.temperature == 0 and self.gkd.on_policy and self.gkd.samples_per_prompt > 1:
            raise ValueError(
                "rollout.temperature must be above 0, or gkd.samples_per_prompt 1: greedy samples of a prompt are equal"
            )
        check_weights(self.rollout.workers, fp8=self.precision.kind == "fp8", adapters=self.model.lora is not None)
        return self

    @property
    def longest_document(self) -> int:
        """Tokens of a prompt and its completion at most; longer solutions are dropped."""
        return self.rollout.max_prompt_tokens + self.rollout.max_tokens
