"""The recipe: strict typed models whose defaults are the vetted settings. Reading one is in `recipe_io.py`.

Batch sizes, once and for all:
    one step    = prompts_per_step prompts x samples_per_prompt completions are sampled and scored,
                  then cut into minibatches_per_step mini-batches;
    one update  = one mini-batch = one optimizer update, its gradient accumulated over micro-batches;
    micro-batch = one forward and backward of at most tokens_per_microbatch packed tokens on one process.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data.spec import ProblemSpec, TextSpec
from rewards.spec import RewardSpec
from rl.recipe_base import Fraction, Positive, Strict
from rl.recipe_model import ModelSpec, PrecisionSpec
from rl.recipe_workers import Engine, Mode, WorkersSpec, check_loaded, check_mode, check_weights


class SamplingSpec(Strict):
    max_tokens: Positive = Field(1024, description="longest completion, EOS included")
    min_tokens: int = Field(0, ge=0, description="EOS is not drawn before")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = all")
    stop_token_ids: tuple[int, ...] = Field((), description="besides the model's own EOS tokens")


class MismatchSpec(Strict):
    """Between the trainer's log-probabilities and the sampler's; what is beyond is warned of. None = never."""

    k3: float | None = Field(0.01, gt=0, description="mean estimate of KL(sampler || trainer), nats per token")
    max: float | None = Field(5.0, gt=0, description="largest difference of a token, nats")
    beyond_10pct: float | None = Field(0.2, gt=0, le=1, description="share of tokens off by over 10 %")


class RolloutSpec(SamplingSpec):
    engine: Engine = "local"
    mode: Mode = Field("inprocess", description="where sampling runs: docs/rollouts.md")
    workers: WorkersSpec | None = None
    max_slots: Positive = Field(64, description="sequences decoded at a time")
    draft_tokens: int = Field(0, ge=0, description="speculative decoding by the model's own prediction module")
    max_prompt_tokens: Positive = 1024
    over_long_prompts: Literal["drop", "error"] = "drop"

    @model_validator(mode="after")
    def _one_place(self) -> RolloutSpec:
        check_mode(self.engine, self.mode, self.workers)
        return self


class GRPORolloutSpec(RolloutSpec):
    """Rollouts of a trainer that can learn from samples of older weights."""

    ahead: int = Field(0, ge=0, description="steps sampled while others are trained; 0 = by the newest weights only")
    in_flight: bool = Field(False, description="new weights enter running rollouts instead of waiting for their end")
    warn_mismatch: MismatchSpec = MismatchSpec()

    @model_validator(mode="after")
    def _something_flies(self) -> GRPORolloutSpec:
        if self.in_flight and not self.ahead:
            raise ValueError("in_flight means nothing with ahead: 0, where no rollout runs when weights are sent")
        return self


class AdvantageSpec(Strict):
    scale: Literal["group", "batch", "none"] = "group"
    baseline: Literal["mean", "leave-one-out"] = "mean"
    eps: float = Field(1e-6, gt=0)


class LossSpec(Strict):
    kind: Literal["ppo", "gspo", "cispo"] = "ppo"
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    cap: float = Field(5.0, gt=0, description="largest ratio of cispo")
    aggregation: Literal["sequence", "token", "constant"] = "sequence"


class KLSpec(Strict):
    coefficient: float = Field(0.0, ge=0, description="0 loads no reference at all")
    place: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] = "k3"
    unbiased: bool = Field(False, description="multiply by the ratio with its gradient (DeepSeek-V3.2)")


class ReferenceSpec(Strict):
    """`replace_every` counts optimizer updates (R1: 400); `ema` moves it after each update."""

    replace_every: Positive | None = None
    ema: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_kind(self) -> ReferenceSpec:
        if self.replace_every is not None and self.ema is not None:
            raise ValueError("give at most one of reference.replace_every and reference.ema")
        return self


class TruncationSpec(Strict):
    """Completions that hit max_tokens: kept, left out of the loss, or penalised (DAPO 2503.14476 eq. 13)."""

    mode: Literal["keep", "mask", "penalty"] = "keep"
    buffer: Positive = Field(4096, description="penalty: tokens over which it grows from 0 to -1")


class DynamicSamplingSpec(Strict):
    """DAPO: replace groups whose rewards are all equal by fresh prompts, in at most `max_rounds` rounds."""

    max_rounds: int = Field(0, ge=0)


class CorrectionSpec(Strict):
    kind: Literal["none", "tis", "mis", "sequence-mask"] = "none"
    cap: float = Field(2.0, gt=0)
    low: float = Field(0.5, ge=0)
    high: float = Field(5.0, gt=0)


class GRPOSpec(Strict):
    steps: Positive = Field(100, description="rollouts; updates = steps * minibatches_per_step * epochs_per_step")
    prompts_per_step: Positive = 32
    samples_per_prompt: Positive = 8
    minibatches_per_step: Positive = 1
    epochs_per_step: Positive = 1
    tokens_per_microbatch: Positive = 8192
    share_prompts: bool = Field(True, description="compute a group's prompt once per micro-batch")
    skip_uninformative: bool = Field(True, description="no forward for completions whose gradient is zero")
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    max_seconds: float | None = Field(None, gt=0, description="stop after this much training time")
    advantage: AdvantageSpec = AdvantageSpec()
    loss: LossSpec = LossSpec()
    kl: KLSpec = KLSpec()
    reference: ReferenceSpec = ReferenceSpec()
    truncation: TruncationSpec = TruncationSpec()
    dynamic_sampling: DynamicSamplingSpec = DynamicSamplingSpec()
    correction: CorrectionSpec = CorrectionSpec()

    @model_validator(mode="after")
    def _batches(self) -> GRPOSpec:
        if self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt must be at least 2: advantages are relative to the group")
        if self.prompts_per_step % self.minibatches_per_step:
            raise ValueError(
                f"minibatches_per_step ({self.minibatches_per_step}) must divide prompts_per_step "
                f"({self.prompts_per_step}): groups are not split; nearest that does: "
                f"{_nearest_divisor(self.prompts_per_step, self.minibatches_per_step)}"
            )
        return self


class SFTSpec(Strict):
    epochs: float = Field(2.0, gt=0)
    steps: Positive | None = Field(None, description="updates; overrides epochs")
    batch_size: Positive = Field(128, description="documents per update, over all processes")
    tokens_per_microbatch: Positive = 8192
    max_tokens: Positive = Field(32768, description="documents longer than this are dropped, and counted")
    max_seconds: float | None = Field(None, gt=0, description="stop after this much training time")


class OptimizerSpec(Strict):
    learning_rate: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    warmup_updates: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_ratio: Fraction = Field(0.1, description="of the learning rate, at the end of cosine or linear")
    on_nonfinite: Literal["stop", "skip"] = "stop"
    moments: Literal["float32", "bfloat16"] = Field("float32", description="of Adam; with fp8 the default is bfloat16")


class EvaluateSpec(SamplingSpec):
    """avg@k with standard error, pass@k (unbiased) and maj@k; temperature and top-p as DeepSeek-R1 evaluates."""

    data: ProblemSpec | None = None
    sets: dict[str, ProblemSpec] = Field(default_factory=dict, description="name -> problems")
    rewards: list[RewardSpec] = Field(default_factory=lambda: [RewardSpec(name="math")])
    samples: Positive = 1
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_slots: Positive = 64
    draft_tokens: int = Field(0, ge=0, description="speculative decoding by the model's own prediction module")
    every: int = Field(0, ge=0, description="during training: every N steps; 0 = only at the end")
    at_start: bool = False

    def problem_sets(self) -> dict[str, ProblemSpec]:
        return {**({"held_out": self.data} if self.data else {}), **self.sets}


class CheckpointSpec(Strict):
    every: Positive = Field(50, description="steps")
    keep: Positive = Field(2, description="newest ones kept")


class LogSpec(Strict):
    samples_every: int = Field(10, ge=0, description="show a few completions every N steps; 0 = never")
    samples_shown: Positive = 2
    wandb: str | None = Field(None, description="project name")
    tensorboard: bool = False


class MoESpec(Strict):
    """Training a mixture of experts of our own (model type deepseek_v3); the values are the V3 report's."""

    bias_speed: float = Field(0.001, ge=0, description="γ: how far a balancing bias moves after each update")
    bias_until: Fraction = Field(0.97, description="part of the updates after which biases stay as they are")
    sequence_loss: float = Field(1e-4, ge=0, description="α of the sequence-wise balance loss")
    mtp_loss: float = Field(0.0, ge=0, description="λ of multi-token prediction (report: 0.3, at the end 0.1)")
    mtp_apart: bool = Field(False, description="the prediction modules learn, the main model not through them")


class RLMoESpec(MoESpec):
    """In reinforcement learning routing stays as it was trained: no bias moves, no balance loss."""

    bias_speed: float = Field(0.0, ge=0)
    sequence_loss: float = Field(0.0, ge=0)
    mtp_apart: bool = Field(True, description="keeps drafts good while the policy moves")
    replay_routing: bool = Field(True, description="training meets the experts that the rollout met (R3)")


class RunSpec(Strict):
    """What every pipeline has."""

    output_dir: str
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    threads: Positive | None = Field(None, description="CPU threads of torch; None = all cores over the processes here")
    model: ModelSpec
    precision: PrecisionSpec = PrecisionSpec()
    log: LogSpec = LogSpec()


class TrainSpec(RunSpec):
    optimizer: OptimizerSpec = OptimizerSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _moments_of_fp8(cls, given: Any) -> Any:
        """The report's: bfloat16 moments beside float32 masters."""
        precision = given.get("precision")
        fp8 = precision == "fp8" or (isinstance(precision, dict) and precision.get("kind") == "fp8")
        optimizer = given.get("optimizer") or {}
        if not fp8 or not isinstance(optimizer, dict):
            return given
        return {**given, "optimizer": {"moments": "bfloat16", **optimizer}}


class GRPORecipe(TrainSpec):
    pipeline: Literal["grpo"]
    data: ProblemSpec
    rewards: list[RewardSpec] = Field(min_length=1)
    rollout: GRPORolloutSpec = GRPORolloutSpec()
    grpo: GRPOSpec = GRPOSpec()
    moe: RLMoESpec = RLMoESpec()

    @model_validator(mode="after")
    def _consistent(self) -> GRPORecipe:
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature must be above 0: greedy groups are uniform")
        buffer, longest = self.grpo.truncation.buffer, self.rollout.max_tokens
        if self.grpo.truncation.mode == "penalty" and buffer > longest:
            raise ValueError(f"grpo.truncation.buffer ({buffer}) must be at most rollout.max_tokens ({longest})")
        narrowed = self.rollout.top_p < 1 or self.rollout.top_k > 0 or self.rollout.min_tokens > 0
        sampler_is_old = self.grpo.old_logprobs == "sampler"
        corrected = self.grpo.correction.kind != "none"
        if narrowed and (corrected or sampler_is_old):
            field = "grpo.correction" if corrected else "grpo.old_logprobs: sampler"
            raise ValueError(
                f"{field} needs rollout.top_p 1, top_k 0 and min_tokens 0: a narrowed sampler has another support"
            )
        moves = self.grpo.reference.replace_every or self.grpo.reference.ema
        if self.model.lora is not None and moves:
            raise ValueError("grpo.reference: with model.lora it is the model without adapters, and does not move")
        check_weights(self.rollout.workers, fp8=self.precision.kind == "fp8", adapters=self.model.lora is not None)
        if corrected and sampler_is_old:
            raise ValueError("grpo.correction: with grpo.old_logprobs: sampler the ratio itself carries the correction")
        return self


class SFTRecipe(TrainSpec):
    pipeline: Literal["sft"]
    data: ProblemSpec | None = Field(None, description="problems with worked solutions")
    texts: TextSpec | None = Field(None, description="whole texts instead: continued pre-training")
    sft: SFTSpec = SFTSpec()
    moe: MoESpec = MoESpec()

    @model_validator(mode="after")
    def _one_source(self) -> SFTRecipe:
        if (self.data is None) == (self.texts is None):
            raise ValueError("give exactly one of data and texts")
        return self


class EvalRecipe(RunSpec):
    pipeline: Literal["eval"]
    evaluate: EvaluateSpec
    engine: Engine = "local"
    workers: WorkersSpec | None = Field(None, description="that load the model: docs/rollouts.md; None = in here")

    @model_validator(mode="after")
    def _somewhere(self) -> EvalRecipe:
        check_loaded(self.engine, self.workers)
        if self.engine == "vllm" and self.evaluate.draft_tokens:
            raise ValueError("evaluate.draft_tokens: vLLM drafts by workers.options.speculative_config; set it to 0")
        if self.workers is not None and self.precision.kind == "fp8":
            raise ValueError("precision: workers have their own; give workers.options (vLLM's quantization) instead")
        return self

    @model_validator(mode="after")
    def _whole_model(self) -> EvalRecipe:
        if self.model.lora is not None:
            raise ValueError("model.lora is for training; to evaluate, give the merged model's folder as model.path")
        return self


class StagesRecipe(Strict):
    """Recipes run one after another; `${NAME.model}` in a later one is the model that stage NAME wrote.

    `values` are for sharing: `${values.NAME}` stands for one, and a mapping that says
    `extends: ${values.NAME}` is merged over it.
    """

    pipeline: Literal["stages"]
    output_dir: str
    seed: int = 0
    values: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _names(cls, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in stages:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{name!r}: a stage's name is of letters, digits, _ and -: ${{NAME.FIELD}} names it")
        return stages


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
