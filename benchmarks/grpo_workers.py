"""The measured processes of `grpo_step.py`: r1forge's step, TRL's step, and the matmuls of a step alone.

Phases of a step, the same on both sides:
    rollout    from prompts to rewards; `generate` is the part of it spent in the sampler
    reference  log-probabilities of the completions by the reference policy
    train      everything else: forward, loss, backward, clipping, optimizer
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common


class Clock:
    """Seconds spent in methods, by wrapping them on one object."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, phase: str, when: Callable[..., bool] = lambda *a, **k: True) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not when(*args, **kwargs):
                return original(*args, **kwargs)
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        setattr(owner, method, timed)

    def step(self, total: float) -> dict[str, float]:
        """The phases of a step that took `total` seconds; starts the next one at zero."""
        found = {p: self.seconds.get(p, 0.0) for p in ("rollout", "generate", "reference")}
        self.seconds.clear()
        return {"total": total, **found, "train": total - found["rollout"] - found["reference"]}


def threads(settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(settings["threads"])


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """GRPO.step as a recipe runs it, its writing of samples included."""
    threads(settings)
    from rl.grpo import GRPO
    from rl.policy.processes import Processes
    from rl.recipe_io import validate
    from rl.run.allocator import keep_freed_memory

    keep_freed_memory()

    scratch = Path(settings["scratch"])
    problems = scratch / "problems.jsonl"
    rows = [json.dumps({"prompt": text, "answer": "0"}) for text in settings["texts"]]
    problems.write_text("\n".join(rows) + "\n", encoding="utf-8")
    recipe = {
        "pipeline": "grpo",
        "output_dir": str(scratch / "run"),
        "model": {"path": settings["model"], "dtype": "bfloat16"},
        "data": {"path": str(problems), "template": {"chat": settings["chat"]}},
        "rewards": [{"path": f"{Path(common.__file__).resolve()}:token_parity"}],
        "rollout": {
            "max_tokens": settings["tokens"],
            "min_tokens": settings["tokens"],
            "max_slots": settings["prompts"] * settings["samples"],
            "max_prompt_tokens": 100_000,
            "over_long_prompts": "error",
        },
        "optimizer": {"learning_rate": settings["learning_rate"]},
        "grpo": {
            "steps": settings["steps"] + 1,
            "prompts_per_step": settings["prompts"],
            "samples_per_prompt": settings["samples"],
            "tokens_per_microbatch": settings["pack"],
            "kl": {"coefficient": settings["beta"]},
        },
    }
    grpo = GRPO(validate(recipe), Processes())
    clock = Clock()
    lengths: set[int] = set()
    clock.wrap(grpo, "collect", "rollout")
    clock.wrap(grpo.sampler, "generate", "generate")
    if grpo.reference is not None:
        clock.wrap(grpo.reference, "logprobs", "reference")
    steps, phases = [], []
    for index in range(1, settings["steps"] + 2):
        start = time.perf_counter()
        metrics = grpo.step(index)
        measured = clock.step(time.perf_counter() - start)
        lengths |= {int(metrics["length/mean"]), int(metrics["length/max"])}
        phases.append({k: v for k, v in metrics.items() if k.startswith("time/")})
        steps.append(measured)
        print(f"{settings['name']}, step {index - 1}: {measured['total']:.1f} s", flush=True)
    return {
        "steps": steps[1:],
        "warm_up": steps[0],
        "timers": phases[1:],
        "lengths": sorted(lengths),
        "prompt_ids": sorted({tuple(prompt.ids) for prompt in grpo.prompts.items}),
        "peak": common.peak_memory(),
    }


def trl(settings: dict[str, Any]) -> dict[str, Any]:
    """GRPOTrainer.train; a step is the time from the end of one optimizer update to the end of the next."""
    threads(settings)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    completions = settings["prompts"] * settings["samples"]
    mixed = settings["precision"] == "mixed"
    config = GRPOConfig(
        output_dir=str(Path(settings["scratch"]) / "trl"),
        use_cpu=True,
        # The same step.
        num_generations=settings["samples"],
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=completions // settings["micro_batch"],
        max_completion_length=settings["tokens"],
        generation_kwargs={"min_new_tokens": settings["tokens"]},
        max_steps=settings["steps"] + 1,
        # The same objective and optimizer as ours.
        beta=settings["beta"],
        use_bias_correction_kl=False,
        loss_type="grpo",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        # What makes it fast here.
        bf16=settings["precision"] != "bf16",
        model_init_kwargs={"dtype": "float32" if mixed else "bfloat16"},
        gradient_checkpointing=settings["checkpointing"],
        optim="adamw_torch_fused",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        # Nothing besides the step.
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    prompts: list[Any] = settings["texts"]
    if settings["chat"]:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=common.token_parity,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
    )
    clock = Clock()
    lengths: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    generate = trainer._generate_single_turn

    def recording(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        output = generate(prompt_ids, *args, **kwargs)
        lengths.update(len(ids) for ids in output[0])
        seen.update(tuple(ids) for ids in prompt_ids)
        return output

    trainer._generate_single_turn = recording
    clock.wrap(trainer, "_generate_single_turn", "generate")
    clock.wrap(trainer, "_generate_and_score_completions", "rollout")
    by_reference = lambda model, *a, **k: trainer.ref_model is not None and model is trainer.ref_model  # noqa: E731
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", "reference", by_reference)
    steps: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            clock.seconds["rollout"] -= clock.seconds["reference"]  # TRL scores the reference inside it
            steps.append(clock.step(now - self.start))
            print(f"{settings['name']}, step {len(steps) - 1}: {steps[-1]['total']:.1f} s", flush=True)
            self.start = time.perf_counter()

    trainer.add_callback(Steps())
    trainer.train()
    return {
        "steps": steps[1:],
        "warm_up": steps[0],
        "lengths": sorted(lengths),
        "prompt_ids": sorted(seen),
        "peak": common.peak_memory(),
    }


def limit(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the step's matrix products alone, at this machine's measured rate for this model's shapes.

    Counted: 2 FLOPs per weight and token forward, 4 backward, 2 for the reference; the head only where a
    token is predicted; a prompt once for its whole group. Not counted: attention, softmax, norms, sampling,
    the optimizer, any recomputation. Dense models only.
    """
    threads(settings)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings["model"]))
    output = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output]
    body = [torch.randn(m.out_features, m.in_features, dtype=torch.bfloat16) for m in layers]
    head = [torch.randn(*output.weight.shape, dtype=torch.bfloat16)]

    completions = settings["prompts"] * settings["samples"]
    prompt_tokens, tokens = sum(settings["prompt_lengths"]), completions * settings["tokens"]
    inputs = prompt_tokens + tokens - completions  # a completion's last token is predicted, never read
    decoded = tokens - completions  # the first token of each comes from the prefill
    rows = min(2048, inputs)
    forward = seconds_per_row(body, rows, "forward"), seconds_per_row(head, min(1024, rows), "forward")
    both = [forward]
    for kind in ("input gradient", "weight gradient"):
        both.append((seconds_per_row(body, rows, kind), seconds_per_row(head, min(1024, rows), kind)))
    decode = seconds_per_row(body, completions, "forward"), seconds_per_row(head, completions, "forward")

    body_size, head_size = sum(w.numel() for w in body), head[0].numel()
    flops = 2.0 * (inputs * body_size + tokens * head_size)
    found = {
        "rollout": {
            "flops": 2.0 * (inputs * body_size + (settings["prompts"] + decoded) * head_size),
            "seconds": prompt_tokens * forward[0] + settings["prompts"] * forward[1] + decoded * sum(decode),
        },
        "reference": {
            "flops": flops if settings["beta"] else 0.0,
            "seconds": inputs * forward[0] + tokens * forward[1] if settings["beta"] else 0.0,
        },
        "train": {
            "flops": 3 * flops,
            "seconds": sum(inputs * part + tokens * last for part, last in both),
        },
    }
    return {**found, "total": sum(part["seconds"] for part in found.values())}


def seconds_per_row(weights: list[Any], rows: int, kind: str, repeats: int = 5) -> float:
    """Best time of one pass over all weights, per row. All of them, not one again and again: they must not
    come from a cache that the real model would not find them in."""
    import torch

    x = {n: torch.randn(rows, n, dtype=torch.bfloat16) for n in {n for w in weights for n in w.shape}}
    product = {
        "forward": lambda w: torch.nn.functional.linear(x[w.shape[1]], w),
        "input gradient": lambda w: x[w.shape[0]] @ w,
        "weight gradient": lambda w: x[w.shape[0]].t() @ x[w.shape[1]],
    }[kind]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for weight in weights:
                product(weight)
            best = min(best, time.perf_counter() - start)
    return best / rows


WORKERS = {"r1forge": ours, "trl": trl, "limit": limit}
