"""Sampling with and without drafts by the model's prediction module, on a model that was trained with one.

    python -m rl recipes/sft-moe-tiny.yaml
    python benchmarks/speculative.py --model runs/sft-moe-tiny/model [--slots 8] [--drafts 1 2] [--json OUT]

Same weights, prompts and limits, turn about in one process. The prompts are held-out problems of that recipe. Greedy
samples are compared token for token; at temperature 1 the samples differ, their distribution does not.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import common

PROBLEMS = {
    "generator": {"families": ["addition"], "levels": [2], "count": 6000, "seed": 1},
    "held_out": {"fraction": 0.1, "part": "held_out"},
    "template": "short-think",
}


def load(folder: str, threads: int, dtype: str) -> tuple[Any, Any]:
    import torch

    from rl.policy.load import DTYPES, load_model, load_tokenizer
    from rl.recipe_model import ModelSpec

    torch.set_num_threads(threads)
    spec = ModelSpec(path=folder, dtype=dtype)
    tokenizer = load_tokenizer(spec)
    return load_model(spec, tokenizer, dtype=DTYPES[dtype]), tokenizer


def main(arguments: argparse.Namespace) -> None:
    from data.spec import ProblemSpec
    from rl.prompts import load_prompts
    from rl.rollout import LocalSampler, SamplingParams
    from rl.rollout.speculative import acceptance_rates

    model, tokenizer = load(arguments.model, arguments.threads, arguments.dtype)
    spec = ProblemSpec(path=arguments.data) if arguments.data else ProblemSpec(**PROBLEMS)
    prompts = [p.ids for p in load_prompts(spec, tokenizer, max_tokens=1 << 20).items][: arguments.prompts]
    kept: dict[str, Any] = {"settings": vars(arguments), "machine": common.machine(arguments.threads)}
    rows = []
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=arguments.tokens, seed=0)
        samplers = {
            drafts: LocalSampler(model, tokenizer, max_slots=arguments.slots, draft_tokens=drafts)
            for drafts in (0, *arguments.drafts)
        }
        speeds: dict[int, list[float]] = {drafts: [] for drafts in samplers}
        found: dict[int, list[list[int]]] = {}
        for repeat in range(arguments.repeats + 1):
            for drafts, sampler in samplers.items():
                start = time.perf_counter()
                samples = sampler.generate(prompts, params)
                seconds = time.perf_counter() - start
                found[drafts] = [s[0].token_ids for s in samples]
                if repeat:  # the first is a warm-up
                    speeds[drafts].append(sum(map(len, found[drafts])) / seconds)
        for drafts, sampler in samplers.items():
            if temperature == 0 and found[drafts] != found[0]:
                raise SystemExit(f"greedy samples with {drafts} drafts are not those without")
            rates = acceptance_rates(sampler.acceptance.sums()) if drafts else {"tokens_per_step": 1.0}
            kept[f"T={temperature} drafts={drafts}"] = {"tokens_per_second": speeds[drafts], **rates}
            accepted = " ".join(f"{v:.2f}" for k, v in rates.items() if k.startswith("accepted/"))
            speed, ratio = median(speeds[drafts]), median(speeds[drafts]) / median(speeds[0])
            rows.append(
                [f"{temperature:g}", str(drafts), f"{speed:.0f}", f"{ratio:.2f}", accepted]
                + [f"{rates['tokens_per_step']:.2f}"]
            )
    machine = kept["machine"]
    print(
        f"{len(prompts)} prompts, at most {arguments.tokens} tokens each, {arguments.slots} at a time, "
        f"{arguments.dtype}; {machine['cpu']}, {arguments.threads} threads, torch {machine['torch']}\n"
    )
    columns = ["temperature", "drafts", "tok/s, median", "to none", "kept, by place", "tokens a step"]
    print(common.markdown_table(columns, rows))
    common.write_json(arguments.json, kept)


if __name__ == "__main__":
    parser = common.common_arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    if given.model is None:
        parser.error("--model is required")
    main(given)
