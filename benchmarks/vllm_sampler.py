"""Tokens per second of r1forge's VLLMSampler against vLLM called directly, and against LocalSampler.

    VLLM_PYTHON benchmarks/vllm_sampler.py --model MODEL_FOLDER [--repeats 3] [--samples 8] [--json OUT]

To be run by the interpreter of vLLM's environment (`make vllm-env`: .venv-vllm/bin/python). One process, one engine of
vLLM, the same prompts, turn about (A B C A B C ...). "vLLM directly" gives the requests to the engine that VLLMSampler
wraps and asks for log-probabilities too, without seeds; "no log-probabilities" is the same without them. Temperature 1,
no top-k and no top-p, bfloat16; every completion has exactly --tokens tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import common
from sampler import measure

ENGINES = ("VLLMSampler", "vLLM directly", "vLLM, no log-probabilities", "LocalSampler")


class Engine(Protocol):
    def __call__(self, tokens: int, seed: int) -> list[int]:
        """Samples completions of exactly `tokens`; returns their lengths."""
        ...


class Ours:
    """Either of our samplers. suppress: EOS, for one that would stop at it."""

    def __init__(self, sampler: Any, prompts: list[list[int]], samples: int, suppress: bool):
        self.sampler, self.prompts, self.samples, self.suppress = sampler, prompts, samples, suppress

    def __call__(self, tokens: int, seed: int) -> list[int]:
        from rl.rollout import SamplingParams

        least = tokens if self.suppress else 0
        params = SamplingParams(n=self.samples, max_tokens=tokens, min_tokens=least, seed=seed)
        return [len(s.token_ids) for group in self.sampler.generate(self.prompts, params) for s in group]


class Direct:
    """vLLM's engine as its own offline interface uses it."""

    def __init__(self, engine: Any, prompts: list[list[int]], samples: int, logprobs: bool):
        self.engine, self.prompts, self.samples, self.logprobs = engine, prompts, samples, logprobs

    def __call__(self, tokens: int, seed: int) -> list[int]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=self.samples,
            temperature=1.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if self.logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for place, prompt in enumerate(self.prompts):
            self.engine.add_request(f"{seed}-{place}", {"type": "token", "prompt_token_ids": prompt}, params)
        lengths = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                lengths += [len(completion.token_ids) for completion in output.outputs]
        return lengths


def build(settings: dict[str, Any]) -> dict[str, Engine]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rl.rollout import LocalSampler, VLLMSampler
    from rl.rollout.vllm_engine import VLLMEngine

    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    prompts = [tokenizer(text)["input_ids"] for text in settings["texts"]]
    slots, samples = settings["slots"], settings["samples"]
    longest = max(map(len, prompts)) + settings["tokens"]
    engine = VLLMEngine(settings["model"], max_model_len=longest, max_slots=slots, stop_token_ids=())
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    local = LocalSampler(model, tokenizer, max_slots=slots)
    parts: list[Engine] = [
        Ours(VLLMSampler(engine), prompts, samples, suppress=False),
        Direct(engine._engine, prompts, samples, logprobs=True),
        Direct(engine._engine, prompts, samples, logprobs=False),
        Ours(local, prompts, samples, suppress=True),
    ]
    return dict(zip(ENGINES, parts, strict=True))


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    engines = build(settings)
    for engine in engines.values():
        engine(min(settings["warmup_tokens"], settings["tokens"]), 0)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for repeat in range(settings["repeats"]):
        for name, engine in engines.items():
            start = time.process_time()
            run = measure(engine, settings, repeat + 1)
            run["tokens_per_cpu_second"] = run["tokens"] / (time.process_time() - start)
            runs[name].append(run)
            speed = f"{run['tokens_per_second']:.1f} tok/s, {run['tokens_per_cpu_second']:.1f} a CPU-second"
            print(f"{name} {repeat + 1}/{settings['repeats']}: {speed}", flush=True)
    import vllm

    return {"runs": runs, "vllm": vllm.__version__}


def report(runs: dict[str, list[dict[str, float]]]) -> str:
    return "\n\n".join(
        compared(what, {name: [run[key] for run in runs[name]] for name in ENGINES})
        for what, key in (("tok/s", "tokens_per_second"), ("tok/CPU-second", "tokens_per_cpu_second"))
    )


def compared(what: str, speeds: dict[str, list[float]]) -> str:
    rows = [[n, f"{median(s):.0f}", f"{min(s):.0f}", f"{max(s):.0f}"] for n, s in speeds.items()]
    table = common.markdown_table(["engine", f"{what}, median", "min", "max"], rows)
    # A machine that slows down slows a whole turn: the ratio is taken within each.
    ratios = {
        other: median(a / b for a, b in zip(speeds[ENGINES[0]], speeds[other], strict=True)) for other in ENGINES[1:]
    }
    lines = [f"{ENGINES[0]} / {other}: {ratio:.2f}" for other, ratio in ratios.items()]
    return f"{table}\n\nMedian of the ratios within a turn:\n" + "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    settings = {
        "texts": common.load_texts(arguments.data, arguments.prompts),
        **{k: getattr(arguments, k) for k in ("model", "tokens", "repeats", "threads", "samples", "warmup_tokens")},
        "slots": arguments.slots or arguments.prompts * arguments.samples,
        "eos": False,
    }
    found = common.run_worker(__file__, settings)
    machine = common.machine(arguments.threads)
    print(
        f"{arguments.prompts} prompts, {arguments.samples} completion(s) of exactly {arguments.tokens} tokens each, "
        f"bfloat16, temperature 1; {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"vLLM {found['vllm']}\n"
    )
    print(report(found["runs"]))
    kept = {k: v for k, v in settings.items() if k != "texts"}
    common.write_json(arguments.json, {"settings": kept, "machine": machine, **found})


if __name__ == "__main__":
    parser = common.common_arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens for each completion")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each engine")
    parser.add_argument("--slots", type=int, help="sequences decoded at a time (default: all)")
    parser.add_argument("--warmup-tokens", type=int, default=16, help="length of the unmeasured first run")
    given = parser.parse_args()
    if given.worker:
        task = json.loads(Path(given.worker).read_text())
        Path(task["result"]).write_text(json.dumps(worker(task)))
    elif given.model is None:
        parser.error("--model is required")
    else:
        main(given)
