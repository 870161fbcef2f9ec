"""One whole GRPO step: r1forge's `GRPO.step` against TRL's `GRPOTrainer`, beside what the arithmetic allows.

    python benchmarks/grpo_step.py --model MODEL_FOLDER [--steps 2] [--rounds 1] [--json OUT]

A step is: sample 8 x 8 completions of exactly 128 tokens, score them, log-probabilities by the reference
(beta 0.001), one optimizer update. Both sides get the same prompts, reward, loss, learning rate and AdamW,
all cores, and one unmeasured step first. Each setting runs in a process of its own, so that its peak memory
is its own. TRL is tried at every combination of --micro-batches, --trl-precision and --trl-checkpointing,
and the ratio is to its fastest. A model folder comes from `benchmarks/fetch_smollm2.py`, or take any causal
LM of the hub.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import common
from grpo_workers import WORKERS

PHASES = ("rollout", "generate", "reference", "train")


def variants(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings to measure, ours first."""
    found: list[dict[str, Any]] = []
    if "r1forge" in arguments.toolkits:
        for tokens in arguments.packs:
            found.append({"toolkit": "r1forge", "name": f"r1forge, packs of {tokens}", "pack": tokens})
    if "trl" in arguments.toolkits:
        completions = arguments.prompts * arguments.samples
        sizes = arguments.micro_batches or sorted({completions, max(1, completions // 8)}, reverse=True)
        grid = product(sizes, arguments.trl_precision, arguments.trl_checkpointing)
        for size, precision, checkpointing in grid:
            if completions % size:
                raise SystemExit(f"--micro-batches: {size} does not divide {completions} completions")
            found.append(
                {
                    "toolkit": "trl",
                    "name": f"TRL, {size} x {completions // size}, {precision}"
                    + (", checkpointing" if checkpointing == "on" else ""),
                    "micro_batch": size,
                    "precision": precision,
                    "checkpointing": checkpointing == "on",
                }
            )
    return found


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "prompts", "samples", "tokens", "steps", "beta", "learning_rate", "threads", "chat")
    return {
        **{name: getattr(arguments, name) for name in names},
        "texts": common.load_texts(arguments.data, arguments.prompts),
    }


def same_work(results: list[dict[str, Any]], tokens: int) -> None:
    """Every side must have seen the same prompt tokens and drawn completions of exactly `tokens` tokens."""
    for result in results:
        if result["lengths"] != [tokens]:
            raise SystemExit(f"{result['name']}: completions of {result['lengths']} tokens, not all of {tokens}")
        if result["prompt_ids"] != results[0]["prompt_ids"]:
            raise SystemExit(f"{result['name']} and {results[0]['name']} did not see the same prompt tokens")


def summarise(result: dict[str, Any]) -> dict[str, float]:
    """Medians over the measured steps."""
    return {phase: median(step[phase] for step in result["steps"]) for phase in ("total", *PHASES)}


def step_table(results: list[dict[str, Any]]) -> str:
    columns = ["setting", "step s", "min", "max", *(f"{p} s" for p in PHASES), "peak RSS, GiB"]
    rows = []
    for result in results:
        m, totals = summarise(result), [step["total"] for step in result["steps"]]
        seconds = [m["total"], min(totals), max(totals), *(m[p] for p in PHASES)]
        rows.append([result["name"], *(f"{s:.1f}" for s in seconds), f"{result['peak']:.2f}"])
    return common.markdown_table(columns, rows)


def comparison(results: list[dict[str, Any]]) -> list[str]:
    """The best of each toolkit against each other."""
    best = {}
    for toolkit in ("r1forge", "trl"):
        mine = [r for r in results if r["toolkit"] == toolkit]
        if not mine:
            return []
        best[toolkit] = min(mine, key=lambda r: summarise(r)["total"])
    ours, theirs = best["r1forge"], best["trl"]
    a, b = summarise(ours), summarise(theirs)
    parts = ", ".join(f"{p} {b[p] / a[p]:.2f}" for p in PHASES if a[p] > 0)
    lines = [
        f"Best of each ({ours['name']} | {theirs['name']}): step {b['total'] / a['total']:.2f} times as fast "
        f"({parts}), with {ours['peak'] / theirs['peak']:.2f} of the peak memory."
    ]
    frugal = min((r for r in results if r["toolkit"] == "trl"), key=lambda r: r["peak"])
    if frugal is not theirs:
        lines.append(
            f"Against TRL's smallest peak ({frugal['name']}): {ours['peak'] / frugal['peak']:.2f} of the "
            f"memory, step {summarise(frugal)['total'] / a['total']:.2f} times as fast."
        )
    return lines


def limit_table(limit: dict[str, Any]) -> str:
    columns = ["limit: matmuls alone", "TFLOP", "TFLOP/s measured", "s"]
    rows = []
    for phase in ("rollout", "reference", "train"):
        part = limit[phase]
        rate = part["flops"] / part["seconds"]
        rows.append([phase, f"{part['flops'] / 1e12:.2f}", f"{rate / 1e12:.2f}", f"{part['seconds']:.1f}"])
    flops = sum(limit[phase]["flops"] for phase in ("rollout", "reference", "train"))
    rows.append(["step", f"{flops / 1e12:.2f}", f"{flops / limit['total'] / 1e12:.2f}", f"{limit['total']:.1f}"])
    return common.markdown_table(columns, rows)


def main(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    chosen = variants(arguments)
    results: list[dict[str, Any]] = [{**v, "steps": [], "peak": 0.0} for v in chosen]
    for _ in range(arguments.rounds):
        for result, variant in zip(results, chosen, strict=True):
            try:
                found = common.run_worker(__file__, {**settings, **variant})
            except common.WorkerFailed as error:  # out of memory, say: the others are still worth having
                print(f"{variant['name']}: {error}", file=sys.stderr)
                continue
            result["steps"] += found.pop("steps")
            result["peak"] = max(result["peak"], found.pop("peak"))
            result |= found
    results = [result for result in results if result["steps"]]
    same_work(results, arguments.tokens)
    limit = {}
    if "limit" in arguments.toolkits:
        lengths = [len(ids) for ids in results[0]["prompt_ids"]] if results else [40] * arguments.prompts
        limit = common.run_worker(__file__, {**settings, "toolkit": "limit", "prompt_lengths": lengths})

    machine = common.machine(arguments.threads)
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "transformers", "trl") if n in machine)
    print(
        f"{arguments.prompts} prompts x {arguments.samples} completions x {arguments.tokens} tokens, beta "
        f"{arguments.beta}, one update; {machine['cpu']}, {machine['threads']} threads, {versions}\n"
    )
    if results:
        print(step_table(results), *comparison(results), sep="\n\n")
    if limit:
        print("\n" + limit_table(limit))
    kept = {k: v for k, v in settings.items() if k != "texts"}
    for result in results:
        del result["prompt_ids"]
    common.write_json(arguments.json, {"settings": kept, "machine": machine, "results": results, "limit": limit})


if __name__ == "__main__":
    parser = common.common_arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="prompts in a step")
    parser.add_argument("--samples", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each completion, exactly")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a process, after one more")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each setting, turn about")
    parser.add_argument("--beta", type=float, default=0.001)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--chat", action="store_true", help="prompts in the tokenizer's chat template")
    parser.add_argument("--packs", type=int, nargs="+", default=[8192], help="ours: grpo.tokens_per_microbatch")
    parser.add_argument("--micro-batches", type=int, nargs="+", help="TRL: per_device_train_batch_size")
    parser.add_argument(
        "--trl-precision", nargs="+", default=["bf16", "mixed"], choices=["bf16", "bf16-autocast", "mixed"],
        help="bf16: weights in bfloat16; mixed: float32 weights under bfloat16 autocast (TRL's default)",
    )  # fmt: skip
    parser.add_argument("--trl-checkpointing", nargs="+", default=["off"], choices=["off", "on"])
    parser.add_argument("--toolkits", nargs="+", default=list(WORKERS), choices=list(WORKERS))
    given = parser.parse_args()
    if given.worker:
        task = json.loads(Path(given.worker).read_text())
        Path(task["result"]).write_text(json.dumps(WORKERS[task["toolkit"]](task)))
    elif given.model is None:
        parser.error("--model is required")
    else:
        main(given)
