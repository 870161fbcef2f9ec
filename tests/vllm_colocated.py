"""Two trainer processes, each with a vLLM engine beside it; run by torchrun from test_vllm_engine.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import token_lists, tokenizer
from vllm_engine_cases import TOLERANCE, flat, llama, named, worst

from rl.rollout import LocalSampler, SamplingParams, VLLMSampler
from rl.rollout.vllm_engine import VLLMEngine


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        llama().save_pretrained(folder / "model")
    dist.barrier()
    engine = VLLMEngine(
        str(folder / "model"), dtype="float32", max_model_len=64, max_slots=8, extra={"kv_cache_memory_bytes": 1 << 26}
    )
    sampler = VLLMSampler(engine)
    prompts = token_lists([4, 9, 2, 7, 1][: 2 + 3 * rank], seed=rank)  # each process has its own, and another number
    for version, model in enumerate([llama(), llama(seed=5)]):
        if version:
            sampler.update_weights(named(model), version)
        params = SamplingParams(temperature=0, max_tokens=8 + 8 * rank)
        got = flat(sampler.generate(prompts, params))
        want = flat(LocalSampler(model, tokenizer(), version=version).generate(prompts, params))
        assert [(s.token_ids, s.weights_version) for s in got] == [(s.token_ids, s.weights_version) for s in want]
        assert worst([s.logprobs for s in got], [s.logprobs for s in want]) < TOLERANCE
    engine.close()
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)  # the trainer's group has outlived the engine
    assert total.item() == 3
    dist.destroy_process_group()
    (folder / f"ok-{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
