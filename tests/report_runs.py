"""Hand-made folders of runs for tests of the report: every kind of metric, and completions that try to break out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

VERDICTS = ("correct", "wrong", "unparsed", "timeout")
# What a model might write by chance or a poisoned data set on purpose. Each would set `window.broken`.
HOSTILE = (
    "</script><script>window.broken=1</script>",
    "<img src=x onerror='window.broken=1'>",
    "<!--<script>window.broken=1",
    "'\"><svg onload=window.broken=1>",
    "</pre></textarea></title></style><iframe srcdoc='<script>parent.broken=1</script>'></iframe>",
    "${window.broken=1} $data &lt;script&gt; \u2028 \u202e reversed \x00 \ud800",
    "<a href='javascript:window.broken=1'>73</a> https://example.org/x.png",
)


def sample(step: int, number: int, **other: Any) -> dict[str, Any]:
    """A row of a file of samples."""
    verdict = VERDICTS[min(number % 7, 3)]
    return {
        "step": step, "group": number // 4, "id": f"p{number}", "prompt_text": f"What is {number} + {step}?<think>",
        "completion": f"It is {number + step}.</think><answer>{number + step}</answer>", "answer": str(number + step),
        "reward": 1.0 if verdict == "correct" else 0.1 * (number % 5), "components": json.dumps({"math": 1.0}),
        "verdict": verdict, "advantage": 0.5, "finish_reason": "length" if verdict == "timeout" else "stop",
        "tokens": 10 + number, "token_ids": [1], "logprobs": [0.0], "weights_version": step, **other,
    }  # fmt: skip


def write_samples(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Parquet holds no lone surrogates; a tokenizer's decoder does not give them either.
    clean = [{k: v.replace("\ud800", "") if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(clean), path)


def grpo_line(step: int, layers: int = 3, experts: int = 8) -> dict[str, Any]:
    """A line of metrics with everything that a mixture of experts with drafts leaves."""
    right = 32.0 * (1 - math.exp(-step / 15))
    line: dict[str, Any] = {
        "step": step, "reward": right / 64 + 0.1, "reward/math": right / 64, "reward/format": min(1.0, step / 10),
        "reward_std": 0.4, "verdict/correct": right, "verdict/wrong": 40 - right, "verdict/unparsed": 20.0,
        "verdict/timeout": 4.0, "none/math": 0.0, "none/format": float(step % 3), "groups/uniform": 2.0,
        "groups/informative": 0.75, "groups/resampled": 0.0, "length/mean": 20 + step / 2, "length/truncated": 0.05,
        "length/max": 40.0 + step % 7, "entropy": 1 / (1 + step / 10), "kl": 0.001 * step, "ratio": 1.0,
        "ratio_max": 1.5, "clip_fraction": 0.01, "mismatch/k3": 1e-7 * step, "mismatch/max": 0.01,
        "mismatch/beyond_10pct": None,
        "grad_norm": 1 + 0.3 * math.sin(step), "learning_rate": 1e-4, "updates_skipped": 0.0, "tokens_trained": 1000.0,
        "completions": 64.0,"mtp_loss": 3 / step, "balance_loss": 1e-4, "drafts/accepted/1": 0.8,
        "drafts/accepted/2": 0.5, "drafts/tokens_per_step": 2.3, "something/new": float(step), "time/rollout": 2.0,
        "time/reward": 0.5, "time/train": 1.0, "time/sync": 0.01, "time/step": 3.2,
    }  # fmt: skip
    for layer in range(1, layers + 1):
        share = [(1 + 0.5 * math.sin(layer * 7 + e)) / experts for e in range(experts)]
        line |= {
            f"moe/max_over_mean/{layer}": max(share) * experts, f"moe/busiest/{layer}": max(share),
            f"moe/idlest/{layer}": min(share), f"moe/load_entropy/{layer}": 2.0, f"moe/router_entropy/{layer}": 1.5,
            f"moe/share/{layer}": share,
        }  # fmt: skip
    return line


def evaluation(name: str, average: float, k: int = 4) -> dict[str, float]:
    metrics = {"problems": 100.0, "samples": float(k), "avg": average, "avg_se": 0.02, f"pass@{k}": average + 0.1}
    metrics |= {f"pass@{k}_se": 0.03, f"maj@{k}": average + 0.05, f"maj@{k}_se": 0.04, "length": 20.0}
    return {f"eval/{name}/{metric}": value for metric, value in metrics.items()}


def write_run(
    folder: Path, recipe: dict[str, Any], lines: list[dict[str, Any]], summary: dict[str, Any] | None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "versions.json").write_text(json.dumps({"python": "3.11", "torch": "2.13"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def grpo_run(folder: Path, steps: int = 40, complete: bool = True, layers: int = 3) -> Path:
    """A GRPO run with two evaluated sets, samples of every step, and hostile completions."""
    lines = []
    for step in range(1, steps + 1):
        line = grpo_line(step, layers)
        if step % 10 == 0:
            line |= {**evaluation("held_out", 0.2 + step / 80), **evaluation("aime", step / 200)}
        lines.append(line)
        rows = [sample(step, n) for n in range(16)]
        if step == steps:
            rows += [sample(step, 20 + i, completion=text, prompt_text=text, id=text) for i, text in enumerate(HOSTILE)]
        write_samples(folder / "samples" / f"step_{step:08d}.parquet", rows)
    lines.insert(0, {"step": 0, "evaluation": True, **evaluation("held_out", 0.2), **evaluation("aime", 0.0)})
    write_samples(folder / "evaluation" / f"held_out_step_{steps:08d}.parquet", [sample(steps, n) for n in range(30)])
    recipe = {
        "pipeline": "grpo", "output_dir": str(folder), "seed": 3, "model": {"path": "models/<b>tiny</b>"},
        "data": {"generator": {"families": ["addition"]}}, "optimizer": {"learning_rate": 1e-4},
        "rewards": [{"name": "math", "weight": 1.0}, {"name": "format", "weight": 0.1}],
        "grpo": {"steps": 40, "prompts_per_step": 16, "samples_per_prompt": 4},
    }  # fmt: skip
    summary = {"pipeline": "grpo", "model": "m", "steps": steps, "updates": 2 * steps, "seconds": 128.0}
    return write_run(folder, recipe, lines, summary if complete else None)


def sft_run(folder: Path, updates: int = 1200) -> Path:
    lines: list[dict[str, Any]] = [
        {"step": n, "loss": 3 / n, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_trained": 500.0, "epoch": n / 600,
         "time/step": 0.25} for n in range(1, updates + 1)
    ]  # fmt: skip
    lines.append({"step": updates, "evaluation": True, **evaluation("held_out", 0.2)})
    recipe = {"pipeline": "sft", "model": {"scratch": {"family": "llama"}}, "sft": {"steps": updates, "batch_size": 8}}
    summary = {"pipeline": "sft", "model": "m", "updates": updates, "seconds": 300.0, "evaluation": lines[-1]}
    return write_run(folder, recipe, lines, summary)


def pipeline(folder: Path) -> Path:
    """Four stages: one complete, one killed in the middle of a line, one of a kind unknown here, one not begun."""
    sft_run(folder / "cold start")
    running = grpo_run(folder / "grpo", complete=False)
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    other = folder / "zz-pool"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps({"pipeline": "distill", "kept": 1234, "pool": "pool.parquet"}))
    (other / "report.md").write_text("# Traces\n\n<script>window.broken=1</script>\n")
    stages: dict[str, Any] = {name: {} for name in ("cold start", "grpo", "zz-pool", "student")}
    (folder / "stages.yaml").write_text(yaml.safe_dump({"pipeline": "stages", "stages": stages}, sort_keys=False))
    return folder
