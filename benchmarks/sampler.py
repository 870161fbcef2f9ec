"""Tokens per second of r1forge's LocalSampler against transformers' `generate`.

    python benchmarks/sampler.py --model MODEL_FOLDER [--repeats 3] [--eos] [--memory] [--json OUT]

The same model object in bfloat16, the same prompts, temperature 1 without top-k or top-p on both sides, in
one process and turn about (A B A B ...), so that a machine that slows down slows both. By default every
completion has exactly --tokens tokens; with --eos it may end earlier, and only the tokens up to the end
count. LocalSampler also returns each token's log-probability; `generate` is not asked for them.
A model folder comes from `benchmarks/fetch_smollm2.py` or any causal LM of the hub.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import common

ENGINES = ("r1forge", "transformers")


class Engine(Protocol):
    def __call__(self, tokens: int, seed: int) -> list[int]:
        """Samples one completion of at most `tokens` for each prompt; returns their lengths."""
        ...


class Ours:
    def __init__(self, model: Any, tokenizer: Any, prompts: list[list[int]], free: bool, slots: int):
        from rl.rollout import LocalSampler

        self.sampler = LocalSampler(model, tokenizer, max_slots=slots)
        self.prompts, self.free = prompts, free

    def __call__(self, tokens: int, seed: int) -> list[int]:
        from rl.rollout import SamplingParams

        params = SamplingParams(max_tokens=tokens, min_tokens=0 if self.free else tokens, seed=seed)
        return [len(samples[0].token_ids) for samples in self.sampler.generate(self.prompts, params)]


class Transformers:
    """Left-padded batches of at most `slots` prompts. (LocalSampler refills finished rows at once.)"""

    cache: str | None = None  # transformers' default, a cache that grows; or "static"

    def __init__(self, model: Any, tokenizer: Any, prompts: list[list[int]], free: bool, slots: int):
        from rl.policy.load import stop_token_ids

        self.model, self.prompts, self.free, self.slots = model, prompts, free, slots
        self.stops = list(stop_token_ids(model, tokenizer))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stops[0]

    def __call__(self, tokens: int, seed: int) -> list[int]:
        import torch
        from transformers import GenerationConfig

        # Every field that narrows the distribution is named: a field left out is filled from the model's own
        # generation_config, and after that from defaults such as top_k = 50.
        config = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=0 if self.free else tokens, do_sample=True, num_beams=1,
            temperature=1.0, top_k=0, top_p=1.0, min_p=None, typical_p=1.0, epsilon_cutoff=0.0,
            eta_cutoff=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0,
            eos_token_id=self.stops, pad_token_id=self.pad, use_cache=True,
            cache_implementation=self.cache, disable_compile=True,
        )  # fmt: skip
        own, self.model.generation_config = self.model.generation_config, config
        torch.manual_seed(seed)
        lengths: list[int] = []
        try:
            with torch.inference_mode():
                for start in range(0, len(self.prompts), self.slots):
                    lengths += self._batch(self.prompts[start : start + self.slots], config)
        finally:
            self.model.generation_config = own
        return lengths

    def _batch(self, prompts: list[list[int]], config: Any) -> list[int]:
        import torch

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        output = self.model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return [next((i + 1 for i, t in enumerate(row) if t in self.stops), len(row)) for row in output]


def build(engine: str, settings: dict[str, Any], model: Any, tokenizer: Any) -> Engine:
    prompts = [tokenizer(text)["input_ids"] for text in settings["texts"]]
    if engine == "r1forge":
        return Ours(model, tokenizer, prompts, settings["eos"], settings["slots"])
    theirs = Transformers(model, tokenizer, prompts, settings["eos"], settings["slots"])
    theirs.cache = settings["cache"]
    return theirs


def load(settings: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(settings["model"])


def measure(engine: Engine, settings: dict[str, Any], seed: int) -> dict[str, float]:
    start = time.perf_counter()
    lengths = engine(settings["tokens"], seed)
    seconds = time.perf_counter() - start
    if not settings["eos"] and set(lengths) != {settings["tokens"]}:
        raise RuntimeError(f"not every completion has {settings['tokens']} tokens: {sorted(set(lengths))}")
    return {"tokens": sum(lengths), "seconds": seconds, "tokens_per_second": sum(lengths) / seconds}


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Speed: both engines, turn about. Memory: one engine, whose peak is then this process's."""
    model, tokenizer = load(settings)
    if settings["task"] == "memory":
        loaded = common.peak_memory()
        measure(build(settings["engine"], settings, model, tokenizer), settings, 0)
        return {"loaded": loaded, "peak": common.peak_memory()}
    engines = {name: build(name, settings, model, tokenizer) for name in ENGINES}
    for engine in engines.values():
        engine(min(settings["warmup_tokens"], settings["tokens"]), 0)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for repeat in range(settings["repeats"]):
        for name, engine in engines.items():
            run = measure(engine, settings, repeat + 1)
            runs[name].append(run)
            print(f"{name} {repeat + 1}/{settings['repeats']}: {run['tokens_per_second']:.1f} tok/s")
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in settings["texts"])
    return {"runs": runs, "prompt_tokens": {"min": lengths[0], "max": lengths[-1], "sum": sum(lengths)}}


def report(found: dict[str, Any], memory: dict[str, Any]) -> str:
    columns = ["engine", "tok/s, median", "min", "max"] + (["peak RSS, GiB"] if memory else [])
    speeds = {n: [run["tokens_per_second"] for run in found["runs"][n]] for n in ENGINES}
    rows = [
        [name, f"{median(s):.0f}", f"{min(s):.0f}", f"{max(s):.0f}"]
        + ([f"{memory[name]['peak']:.2f}"] if memory else [])
        for name, s in speeds.items()
    ]
    ratio = median(speeds["r1forge"]) / median(speeds["transformers"])
    return common.markdown_table(columns, rows) + f"\n\nRatio of the medians: {ratio:.2f}"


def main(arguments: argparse.Namespace) -> None:
    settings = {
        "texts": common.load_texts(arguments.data, arguments.prompts),
        **{k: getattr(arguments, k) for k in ("model", "tokens", "repeats", "eos", "threads")},
        "warmup_tokens": arguments.warmup_tokens,
        "cache": None if arguments.cache == "dynamic" else arguments.cache,
        "slots": arguments.slots or arguments.prompts,
    }
    found = common.run_worker(__file__, {**settings, "task": "speed"})
    memory = {}
    if arguments.memory:
        for name in ENGINES:
            memory[name] = common.run_worker(__file__, {**settings, "task": "memory", "engine": name})
    machine = common.machine(arguments.threads)
    mode = "up to" if arguments.eos else "exactly"
    prompt = found["prompt_tokens"]
    print(
        f"{arguments.prompts} prompts of {prompt['min']} to {prompt['max']} tokens, {mode} "
        f"{arguments.tokens} new tokens each, bfloat16, temperature 1; {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}\n"
    )
    print(report(found, memory))
    kept = {k: v for k, v in settings.items() if k != "texts"}
    common.write_json(arguments.json, {"settings": kept, "machine": machine, **found, "memory": memory})


if __name__ == "__main__":
    parser = common.common_arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens for each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each engine")
    parser.add_argument("--slots", type=int, help="sequences decoded at a time (default: all prompts)")
    parser.add_argument("--warmup-tokens", type=int, default=16, help="length of the unmeasured first run")
    parser.add_argument(
        "--cache", default="dynamic", choices=["dynamic", "static"], help="of transformers (default: its own)"
    )
    parser.add_argument("--eos", action="store_true", help="let completions end at EOS: ragged lengths")
    parser.add_argument("--memory", action="store_true", help="also each engine's peak, in a process of its own")
    given = parser.parse_args()
    if given.worker:
        task = json.loads(Path(given.worker).read_text())
        Path(task["result"]).write_text(json.dumps(worker(task)))
    elif given.model is None:
        parser.error("--model is required")
    else:
        main(given)
