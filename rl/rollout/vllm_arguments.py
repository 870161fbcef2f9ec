"""How vLLM is started: its environment variables, its arguments, and what it is not asked to do."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rl.policy.load import stop_token_ids
from rl.recipe_io import RecipeError, nearest

CPU_CACHE_BYTES = 1 << 30

# Arguments of vLLM that an engine's promises rest on.
OURS = {
    "skip_tokenizer_init": True,  # token ids in, token ids out
    "generation_config": "vllm",  # the checkpoint's own would add stop tokens and penalties
    "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
    "worker_extension_cls": "rl.rollout.vllm_weights.WeightsExtension",
    "scheduling_policy": "priority",  # what is scored goes before what waits to be sampled
}


def set_environment() -> None:
    """What vLLM reads from environment variables; before it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its core in this process: weights are handed to it directly
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def engine_arguments(given: dict[str, Any], extra: dict[str, Any], *, on_cpu: bool, sleeping: bool) -> dict[str, Any]:
    """All of vLLM's arguments: defaults, `given`, the user's `extra`, whose names are checked, and our own."""
    import vllm

    names = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
    for name in extra:
        if name not in names:
            raise RecipeError(f"engine option {name}: vLLM {vllm.__version__} has none{nearest(name, names)}")
        if name in OURS or name == "model":
            raise RecipeError(f"engine option {name}: the engine sets it itself")
    chosen = {"disable_log_stats": True, "enable_prefix_caching": True, **given, **extra}
    if chosen.get("data_parallel_size", 1) != 1:
        raise RecipeError(
            "engine option data_parallel_size: one engine is one replica; start that many workers. Experts are spread "
            "with tensor_parallel_size and enable_expert_parallel: true"
        )
    devices = chosen["tensor_parallel_size"] * chosen.get("pipeline_parallel_size", 1)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        if devices > 1:
            raise RecipeError(
                "engine option tensor_parallel_size: beside a trainer of several processes each engine is whole, and "
                "samples its process's prompts; for models that need several devices use mode: server"
            )
        chosen.setdefault("distributed_executor_backend", "external_launcher")
    elif devices == 1:
        chosen.setdefault("distributed_executor_backend", "uni")
    if on_cpu:
        chosen.setdefault("enforce_eager", True)
        # A prompt computed in parts draws a token for each part and takes it back, which a CPU's seeded stream cannot.
        if chosen.setdefault("enable_chunked_prefill", False):
            raise RecipeError("engine option enable_chunked_prefill: on CPU it cannot be had with seeded sampling")
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            chosen.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    elif sleeping:
        chosen.setdefault("enable_sleep_mode", True)
    return {**chosen, **OURS}


def engine_config(arguments: dict[str, Any], *, record_routing: bool) -> tuple[Any, bool]:
    """vLLM's configuration, and whether it records the experts that tokens meet.

    record_routing: it should if it can: not on CPU, nor with pipeline parallelism, and whatever else vLLM names.
    """
    import vllm

    option = "enable_return_routed_experts"
    if record_routing and option not in arguments:
        try:
            return vllm.EngineArgs(**arguments, **{option: True}).create_engine_config(), True
        except (TypeError, ValueError) as error:  # TypeError: a vLLM that does not know it
            plain = vllm.EngineArgs(**arguments).create_engine_config()  # may fail for the same reason, and then fails
            reason = " ".join(str(error).partition("[type=")[0].split())  # pydantic goes on with all it was given
            warnings.warn(f"vLLM does not record the experts that tokens meet: {reason}", stacklevel=2)
            return plain, False
    return vllm.EngineArgs(**arguments).create_engine_config(), bool(arguments.get(option))


def folder_stop_ids(model_path: str) -> tuple[int, ...]:
    """As `rl.policy.load.stop_token_ids`, of a model that is not loaded. A folder may have no tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except OSError:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_path))
    folder = Path(model_path).expanduser()
    if folder.is_dir() and not any(folder.glob("tokenizer*")):  # transformers would make up one, with an EOS of its own
        tokenizer = SimpleNamespace(eos_token_id=None)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    return stop_token_ids(SimpleNamespace(generation_config=generation), tokenizer)


def why_fixed(config: Any) -> str | None:
    """Models that vLLM's CPU backend cannot give new weights: it keeps them in another form, made once at the start."""
    if config.is_moe:
        what = "experts keep their old packed weights"
    elif config.use_mla:
        what = "latent attention does not reload"
    else:
        return None
    return f"on CPU vLLM cannot replace the weights of this model ({what}): restart the engine from a checkpoint"


def may_start_empty(config: Any, arguments: dict[str, Any]) -> bool:
    """Whether random weights may stand where the first update's will. config: vLLM's, of the model.

    Not where they are quantised: vLLM brings them into another form at the start, and its reload has not been tried on
    what it makes of random ones. Nor where the user says how weights are loaded.
    """
    return config.quantization is None and "load_format" not in arguments
