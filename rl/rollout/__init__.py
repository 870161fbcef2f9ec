"""Samplers: prompts in, completions with token log-probabilities out."""

from rl.rollout.local import LocalSampler
from rl.rollout.types import Sample, Sampler, SamplingParams, Streaming
from rl.rollout.vllm_sampler import VLLMSampler

__all__ = ["LocalSampler", "Sample", "Sampler", "SamplingParams", "Streaming", "VLLMSampler"]
