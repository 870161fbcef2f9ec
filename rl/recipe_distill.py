"""The recipe of a distillation: a teacher's traces, verified and selected into one pool that `sft` trains on."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data.spec import ProblemSpec
from data.trace_spec import SelectSpec, TraceSource
from rewards.http_json import check_url
from rewards.spec import RewardSpec
from rl.recipe import SamplingSpec
from rl.recipe_base import Positive, Strict
from rl.recipe_model import ModelSpec
from rl.recipe_workers import WorkersSpec, check_loaded


class TeacherSpec(SamplingSpec):
    """How each problem is put to the teacher; temperature, top-p and length as DeepSeek samples R1."""

    samples: Positive = Field(1, description="traces of each problem")
    max_tokens: Positive = 32768
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class LocalTeacher(TeacherSpec):
    """A model whose weights are at hand: sampled in this process, or in workers that load it (docs/rollouts.md)."""

    engine: Literal["local", "vllm"]
    model: ModelSpec
    workers: WorkersSpec | None = Field(None, description="None = in this process, which only engine: local can do")
    max_slots: Positive = Field(64, description="sequences decoded at a time")
    max_prompt_tokens: Positive = Field(2048, description="longer prompts are dropped, and counted")

    @model_validator(mode="after")
    def _somewhere(self) -> LocalTeacher:
        check_loaded(self.engine, self.workers)
        return self


class ApiTeacher(TeacherSpec):
    """Any server with OpenAI's /chat/completions. The key stands in an environment variable, never in a recipe."""

    engine: Literal["api"]
    base_url: str = Field(description="such as https://api.deepseek.com/v1; /chat/completions is added")
    model: str = Field(min_length=1, description="the server's name of the model")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    max_concurrency: Positive = Field(16, description="requests at a time")
    requests_per_minute: float | None = Field(None, gt=0, description="tries, retries among them; None = no limit")
    timeout_s: float = Field(1800.0, gt=0, description="of one request")
    retries: int = Field(8, ge=0, description="of a request that failed in a way that may pass")
    backoff_s: float = Field(2.0, ge=0, description="the k-th retry waits up to backoff_s * 2^k, or as asked for")
    send_seed: bool = Field(True, description="false for servers that refuse the field `seed`")
    body: dict[str, Any] = Field(default_factory=dict, description="further fields of a request; null removes one")
    input_price: float | None = Field(None, ge=0, description="of a million prompt tokens, for the summary")
    output_price: float | None = Field(None, ge=0, description="of a million completion tokens")

    @field_validator("base_url")
    @classmethod
    def _usable_url(cls, url: str) -> str:
        return check_url(url)

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise ValueError("must be the name of an environment variable, not the key itself")
        return name


class DistillRecipe(Strict):
    """Sampled from `teacher` on `data`, or imported from `traces` (with `data`, if that has the golds)."""

    pipeline: Literal["distill"]
    output_dir: str
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    threads: Positive | None = Field(None, description="CPU threads of torch; None = all cores over the processes here")
    data: ProblemSpec | None = None
    teacher: Annotated[LocalTeacher | ApiTeacher, Field(discriminator="engine")] | None = None
    traces: TraceSource | None = None
    tokenizer: str | None = Field(None, description="counts tokens; None = the local teacher's, else words and signs")
    rewards: list[RewardSpec] = Field(default_factory=lambda: [RewardSpec(name="math")])
    select: SelectSpec = SelectSpec()
    on_error: Literal["stop", "skip"] = Field("skip", description="a bad row, or a request that failed for good")

    @model_validator(mode="after")
    def _one_source(self) -> DistillRecipe:
        if (self.teacher is None) == (self.traces is None):
            raise ValueError("give exactly one of teacher (to sample) and traces (to import)")
        if self.teacher is not None and self.data is None:
            raise ValueError("data: required with a teacher: the problems that it is asked")
        if self.traces is not None and self.data is None and self.traces.join is not None:
            raise ValueError("traces.join: names a column of `data`; give data, or drop it")
        if not self.rewards and self.select.min_reward is not None:
            raise ValueError("select.min_reward: nothing is verified without rewards; set it to null, or give rewards")
        return self
