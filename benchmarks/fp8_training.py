"""A tiny mixture of experts from scratch, in bfloat16, FP8 and float32: losses paired by seed, and the seeds' spread.

    python benchmarks/fp8_training.py OUT_FOLDER --texts train.jsonl --column answer --batch 6 [--seeds 0 1 2]

Texts are learnt whole, character by character; any file of texts will do (the figures in docs/ are of GSM8K's
solutions). Their loss goes down smoothly and not to zero, so small differences can be seen. Without `--texts` it is
sums, made here: they can be learnt to the end, in leaps, and a leap that comes ten updates later is a difference of
many per cent.

The precisions see the same documents in the same order from the same initial weights. FP8 is one word of the recipe,
`precision: fp8`, and then also has bfloat16 Adam moments. How far float32 is from bfloat16 says how far apart runs come
that differ by far less rounding. Reported: the mean loss of the last 100 updates (of the last tenth, if there are fewer
than 1,000) of each run, the relative gap of each pair, its mean and standard error, how far apart seeds of bfloat16
are, and the losses of one set of weights in each precision on the same texts. Writes losses.csv, losses.png (needs the
extra `bench`) and summary.json. Runs are ordinary recipes; one that is complete is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import common
import learning

PRECISIONS = ("bf16", "fp8", "float32")  # the others are compared with the first
COLOURS = dict(zip(PRECISIONS, learning.COLOURS, strict=True))
Losses = dict[tuple[str, int], list[float]]  # (precision, seed) -> nats a token, by update


def recipe(precision: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sums = {"generator": {"levels": [1, 2], "count": 20000, "seed": seed}, "template": "short-think"}
    texts = {"path": str(options.texts), "column": options.column}
    scratch = {"preset": "tiny", "config": {"initializer_range": 0.02}}
    return {
        "pipeline": "sft",
        "output_dir": str(folder),
        "seed": seed,
        "threads": 1,
        "model": {"scratch": scratch, "dtype": "float32" if precision == "float32" else "bfloat16"},
        "precision": {"kind": "fp8", "backend": options.backend} if precision == "fp8" else "bf16",
        **({"data": sums} if options.texts is None else {"texts": texts}),
        "optimizer": {"learning_rate": 2e-3, "warmup_updates": 20, "schedule": "cosine"},
        "sft": {"steps": options.steps, "batch_size": options.batch},
        "moe": {"mtp_loss": 0.3},
        "checkpoint": {"every": 100},
    }


def averaged(steps: int) -> int:
    """Over how many of the last updates."""
    return min(100, max(1, steps // 10))


def summarise(losses: Losses, seeds: list[int]) -> dict[str, Any]:
    """Last losses, relative gaps of pairs and the relative spread of bfloat16's seeds."""
    steps = len(next(iter(losses.values())))
    last = averaged(steps)
    means = {precision: [mean(losses[precision, seed][-last:]) for seed in seeds] for precision in PRECISIONS}
    plain = means[PRECISIONS[0]]
    gaps = {p: [other / one - 1 for other, one in zip(means[p], plain, strict=True)] for p in PRECISIONS[1:]}
    return {
        "steps": steps,
        "averaged": last,
        "loss": means,
        "gap": gaps,
        "gap_mean": {precision: mean(values) for precision, values in gaps.items()},
        "gap_se": {precision: learning.standard_error(values) for precision, values in gaps.items()},
        "seed_spread": stdev(plain) / mean(plain) if len(plain) > 1 else None,
    }


def table(seeds: list[int], summary: dict[str, Any]) -> str:
    """Markdown: a line a seed; mean gaps and their standard errors; the spread of the first precision's seeds."""
    others = PRECISIONS[1:]
    rows = []
    for i, seed in enumerate(seeds):
        losses = [f"{summary['loss'][precision][i]:.5f}" for precision in PRECISIONS]
        rows.append([str(seed), *losses, *(f"{summary['gap'][other][i]:+.3%}" for other in others)])
    lines = [common.markdown_table(["seed", *PRECISIONS, *(f"{o} above {PRECISIONS[0]}" for o in others)], rows)]
    if len(seeds) > 1:
        for other in others:
            mean_gap, error = summary["gap_mean"][other], summary["gap_se"][other]
            lines.append(f"{other}: mean gap {mean_gap:+.3%} ± {error:.3%} (s.e. of {len(seeds)} pairs)")
        lines.append(f"spread of {PRECISIONS[0]} over seeds {summary['seed_spread']:.3%} (standard deviation)")
    return "\n\n".join(lines)


def scored(seed: int, options: argparse.Namespace) -> list[float]:
    """Losses by precision of the *same* weights, the last of the bfloat16 run, on the texts of its last 100 updates."""
    import torch

    from model.fp8.convert import to_fp8
    from rl.documents import training_documents
    from rl.policy.load import cast_parameters, load_model, load_tokenizer
    from rl.policy.policy import Policy
    from rl.prompts import permuted
    from rl.recipe_io import validate
    from rl.recipe_model import ModelSpec

    trained = validate(recipe(PRECISIONS[0], seed, options, options.out / f"{PRECISIONS[0]}-{seed}"))
    spec = ModelSpec(path=str(Path(trained.output_dir) / "model"))
    tokenizer = load_tokenizer(spec)
    documents, _ = training_documents(trained, tokenizer)
    last = range((options.steps - averaged(options.steps)) * options.batch, options.steps * options.batch)
    texts = [documents[permuted(place, len(documents), seed)] for place in last]
    found = []
    for precision in PRECISIONS:
        model = load_model(spec, tokenizer, dtype=torch.float32)
        if precision != "float32":
            cast_parameters(model, torch.bfloat16)
        if precision == "fp8":
            to_fp8(model, backend=options.backend)
        policy = Policy(model)
        with torch.inference_mode():
            logps = [policy.logprobs(pack)[0].double().sum() for pack in policy.pack(texts, 8192)]
        found.append(-float(sum(logps)) / sum(len(text.completion_ids) for text in texts))
    return found


def write_curves(losses: Losses, out: Path) -> None:
    keys = sorted(losses)
    with (out / "losses.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["update", *(f"{precision}-{seed}" for precision, seed in keys)])
        for i, values in enumerate(zip(*(losses[key] for key in keys), strict=True), start=1):
            table.writerow([i, *(f"{value:.6f}" for value in values)])


def draw(plt: Any, losses: Losses, window: int = 20) -> Any:
    """Running means, and the relative gap of each pair below them."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    smooth = {key: learning.running_mean(values, window) for key, values in sorted(losses.items())}
    for (precision, seed), values in smooth.items():
        label = precision if seed == min(s for _, s in losses) else None
        top.plot(values, color=COLOURS[precision], alpha=0.7, linewidth=1, label=label)
        if precision != PRECISIONS[0]:
            pairs = zip(values, smooth[PRECISIONS[0], seed], strict=True)
            bottom.plot([100 * (a / b - 1) for a, b in pairs], color=COLOURS[precision], alpha=0.7, linewidth=1)
    top.set(ylabel="loss, nats a token", yscale="log")
    bottom.set(xlabel="update", ylabel=f"above {PRECISIONS[0]}, %")
    bottom.axhline(0, color="grey", linewidth=0.5)
    top.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, help="file of texts; without it, sums")
    parser.add_argument("--column", default="text", help="of the texts")
    parser.add_argument("--batch", type=int, default=32, help="texts or sums an update")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=common.cores())
    parser.add_argument("--backend", default="auto", help="of FP8")
    options = parser.parse_args()
    names = {(precision, seed): f"{precision}-{seed}" for seed in options.seeds for precision in PRECISIONS}
    recipes = {name: recipe(*run, options, options.out / name) for run, name in names.items()}
    learning.run_recipes(recipes, options.out, options.workers)
    rows = {run: learning.rows_of(options.out / name) for run, name in names.items()}
    losses: Losses = {key: [row["loss"] for row in found] for key, found in rows.items()}
    write_curves(losses, options.out)
    summary = summarise(losses, options.seeds)
    summary["seconds_per_step"] = {
        precision: median(row["time/step"] for seed in options.seeds for row in rows[precision, seed])
        for precision in PRECISIONS
    }
    summary["same_weights"] = [scored(seed, options) for seed in options.seeds]
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"mean loss of the last {summary['averaged']} of {summary['steps']} updates, nats a token\n")
    print(table(options.seeds, summary))
    print("\nthe same weights (of bf16), scored in each")
    for seed, values in zip(options.seeds, summary["same_weights"], strict=True):
        gaps = (f"{p} {value / values[0] - 1:+.4%}" for p, value in zip(PRECISIONS[1:], values[1:], strict=True))
        print(f"seed {seed}: " + ", ".join(gaps))
    print("seconds a step: " + ", ".join(f"{p} {s:.2f}" for p, s in summary["seconds_per_step"].items()))
    learning.save_plot(lambda plt: draw(plt, losses), options.out / "losses.png")


if __name__ == "__main__":
    main()
