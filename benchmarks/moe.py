"""Our mixture of experts against transformers' DeepseekV3: training steps and sampling, one run, the same weights.

    python benchmarks/moe.py [--scale 1] [--repeats 3] [--memory] [--device cuda] [--json OUT]

Training: forward, loss, backward and a fused AdamW step in bfloat16, on rows of equal length (nobody pads) and on
ragged documents (ours packs them; transformers is given the better of a padded batch and its own packing by
position_ids). transformers runs its grouped_mm experts and SDPA. Sampling: `LocalSampler` against `generate`, every
completion exactly --tokens long, temperature 1. Turn about in one process, medians. Memory: each engine in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import common
import sampler as sampling

ENGINES = ("r1forge", "transformers")
SHAPE = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 256,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "q_lora_rank": 256, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_nextn_predict_layers": 0,
    "seq_aux_alpha": 0.0, "max_position_embeddings": 4096,
}  # fmt: skip


def shape(scale: float) -> dict[str, Any]:
    """Channels and experts' sizes times `scale` (8 is near the 16b preset's width)."""
    grown = {"hidden_size", "intermediate_size", "moe_intermediate_size"}
    return {k: int(v * scale) if k in grown else v for k, v in SHAPE.items()}


def models(settings: dict[str, Any]) -> dict[str, Any]:
    """Both engines' models with the same weights, through a checkpoint."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    from model import MoEConfig, MoEForCausalLM

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    folder = Path(settings["scratch"], "model")
    MoEForCausalLM(MoEConfig.preset("tiny", **settings["shape"])).bfloat16().save_pretrained(folder)
    kinds = {"r1forge": MoEForCausalLM, "transformers": DeepseekV3ForCausalLM}
    found = {}
    for name in settings["engines"]:
        extra = {"experts_implementation": "grouped_mm"} if name == "transformers" else {}
        found[name] = kinds[name].from_pretrained(folder, dtype=torch.bfloat16, **extra).to(settings["device"])
    return found


class Training:
    """One optimizer step a call; returns the tokens that it learned from."""

    def __init__(self, model: Any, lengths: list[int], packing: str):
        import torch

        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in lengths]
        device = model.device
        if packing == "padded":
            pad = torch.nn.utils.rnn.pad_sequence
            self.inputs = {
                "input_ids": pad(rows, batch_first=True),
                "labels": pad(rows, batch_first=True, padding_value=-100),
            }
            if len(set(lengths)) > 1:
                self.inputs["attention_mask"] = pad([torch.ones_like(r) for r in rows], batch_first=True)
        else:
            ids = torch.cat(rows)[None]
            labels = torch.cat([torch.cat([torch.tensor([-100]), r[1:]]) for r in rows])[None]
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            self.inputs = {"input_ids": ids, "labels": labels, "position_ids": positions}
        self.inputs = {k: v.to(device) for k, v in self.inputs.items()}
        self.tokens = sum(lengths) - len(lengths)

    def __call__(self) -> int:
        loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        float(loss)  # waits for a GPU
        return self.tokens


class OurTraining(Training):
    """The trainers' own path: packed documents, log-probabilities in chunks."""

    def __init__(self, model: Any, lengths: list[int]):
        import torch

        from rl.policy.moe import ExpertTraining
        from rl.policy.packing import Document
        from rl.policy.policy import Policy
        from rl.recipe import MoESpec

        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
        experts = ExpertTraining(model, MoESpec(sequence_loss=0.0), 1)
        self.policy = Policy(model, experts=experts)
        self.packs = self.policy.pack([Document(r[:1], r[1:]) for r in rows], sum(lengths))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.tokens = sum(lengths) - len(lengths)

    def __call__(self) -> int:
        for pack in self.packs:
            logp, _, _ = self.policy.training_logprobs(pack)
            loss = -logp.sum() / self.tokens
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        float(loss)
        return self.tokens


def trainings(found: dict[str, Any], kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    length, rows = settings["length"], settings["rows"]
    lengths = [length] * rows if kind == "equal" else [max(8, length * (1 + i % 8) // 8) for i in range(rows)]
    made: dict[str, Any] = {}
    for name, model in found.items():
        if name == "r1forge":
            made[name] = OurTraining(model, lengths)
        elif kind == "equal":
            made[name] = Training(model, lengths, "padded")
        else:
            made["transformers, padded"] = Training(model, lengths, "padded")
            made["transformers, packed"] = Training(model, lengths, "packed")
    return made


def samplings(found: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, 32000, (40 + i % 24,), generator=generator).tolist() for i in range(settings["prompts"])
    ]
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    kinds = {"r1forge": sampling.Ours, "transformers": sampling.Transformers}
    for model in found.values():
        model.eval()
    return {name: kinds[name](model, tokenizer, prompts, False, len(prompts)) for name, model in found.items()}


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    found = models(settings)
    if settings["task"] == "sample":
        made = {
            name: (lambda engine=engine: sum(engine(settings["tokens"], 1)))
            for name, engine in samplings(found, settings).items()
        }
    else:
        made = trainings(found, settings["task"], settings)
    loaded = common.peak_memory()
    runs: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(settings["repeats"] + 1):
        for name, call in made.items():
            start = time.perf_counter()
            tokens = call()
            speed = tokens / (time.perf_counter() - start)
            if repeat:  # the first is a warm-up
                runs[name].append(speed)
                print(f"{settings['task']} {name} {repeat}/{settings['repeats']}: {speed:.1f} tok/s")
    return {"runs": runs, "loaded": loaded, "peak": peak(settings["device"])}


def peak(device: str) -> float:
    """GiB: of the card where there is one, else of the process."""
    if device == "cpu":
        return common.peak_memory()
    import torch

    return torch.cuda.max_memory_allocated() / 2**30


def main(arguments: argparse.Namespace) -> None:
    settings = {
        k: getattr(arguments, k)
        for k in ("repeats", "threads", "tokens", "prompts", "rows", "length", "device", "model")
    }
    settings |= {"shape": shape(arguments.scale), "engines": ENGINES}
    machine = common.machine(arguments.threads)
    kept: dict[str, Any] = {"settings": settings, "machine": machine}
    rows = []
    for task in ("equal", "ragged", "sample"):
        found = kept[task] = common.run_worker(__file__, {**settings, "task": task})
        speeds = {name: median(values) for name, values in found["runs"].items()}
        best = max(v for n, v in speeds.items() if n != "r1forge")
        memory = {}
        if arguments.memory:
            for name in ENGINES:
                one = {**settings, "task": task, "engines": [name], "repeats": 1}
                memory[name] = kept[f"{task} {name}"] = common.run_worker(__file__, one)
        for name, speed in speeds.items():
            values = found["runs"][name]
            cells = [task, name, f"{speed:.0f}", f"{min(values):.0f}", f"{max(values):.0f}", f"{speed / best:.2f}"]
            rows.append([*cells, f"{memory[name.split(',')[0]]['peak']:.2f}"] if memory else cells)
    columns = ["task", "engine", "tok/s, median", "min", "max", "to transformers' best"]
    print(
        f"bfloat16, {settings['shape']['hidden_size']} channels, 8 layers, 32 experts of which 4, "
        f"{arguments.rows} rows of {arguments.length} tokens, {arguments.prompts} prompts and {arguments.tokens} new "
        f"tokens each; {machine['cpu']}, {arguments.threads} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}\n"
    )
    print(common.markdown_table([*columns, *(["peak GiB"] if arguments.memory else [])], rows))
    common.write_json(arguments.json, kept)


if __name__ == "__main__":
    parser = common.common_arguments(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of channels and experts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="documents of a training step")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest of them")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", action="store_true", help="also each engine's peak, in a process of its own")
    given = parser.parse_args()
    if given.worker:
        task = json.loads(Path(given.worker).read_text())
        Path(task["result"]).write_text(json.dumps(worker(task)))
    else:
        main(given)
