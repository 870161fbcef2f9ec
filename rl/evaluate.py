"""Evaluation: avg@k with its standard error, unbiased pass@k, maj@k; every completion is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rewards import Reward, load_reward
from rewards.math.exact import parse_number
from rewards.math.extract import extract_answer
from rl.experience import Completion, assign_rewards, completions_of, component_means, tally
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.precision import apply_precision
from rl.policy.processes import Processes
from rl.prompts import Prompts, load_prompts, sampling_params
from rl.recipe import EvalRecipe, EvaluateSpec, TrainSpec, TruncationSpec
from rl.rollout import LocalSampler
from rl.rollout.loaded import Served, loaded_workers
from rl.rollout.sampling import stream_key
from rl.run.folder import Run
from rl.run.progress import Progress


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k is correct) = 1 - C(n-c, k) / C(n, k) (Chen et al. 2107.03374)."""
    if not 0 < k <= samples:
        raise ValueError(f"k must lie in 1..{samples}, not {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error of the mean over problems); NaN error for fewer than two."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def majority(answers: Sequence[str | None], correct: Sequence[float]) -> float:
    """maj@k (cons@k): how right the most frequent answer is; ties share (the mean over the tied answers)."""
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return 0.0
    top = max(counts.values())
    tied = [a for a, n in counts.items() if n == top]
    return math.fsum(correct[answers.index(a)] for a in tied) / len(tied)


def summarise(correct: Sequence[Sequence[float]], answers: Sequence[Sequence[str | None]]) -> dict[str, float]:
    """Metrics from per-problem lists of k scores (1 = correct) and extracted answers."""
    k = len(correct[0])
    avg, error = mean_and_error([math.fsum(row) / k for row in correct])
    result = {"problems": float(len(correct)), "samples": float(k), "avg": avg, "avg_se": error}
    for n in [n for n in (2**i for i in range(20)) if 1 < n < k] + ([k] if k > 1 else []):
        estimate, error = mean_and_error([pass_at_k(k, sum(c >= 1 for c in row), n) for row in correct])
        result |= {f"pass@{n}": estimate, f"pass@{n}_se": error}
    if k > 1:
        estimate, error = mean_and_error([majority(a, row) for a, row in zip(answers, correct, strict=True)])
        result |= {f"maj@{k}": estimate, f"maj@{k}_se": error}
    return result


class Evaluator:
    """The recipe's problem sets, loaded and tokenised once."""

    def __init__(self, spec: EvaluateSpec, tokenizer: Any, processes: Processes, seed: int):
        self.spec, self.tokenizer, self.processes, self.seed = spec, tokenizer, processes, seed
        self.rewards: list[Reward] = [load_reward(r) for r in spec.rewards]
        self.sets: dict[str, Prompts] = {
            name: load_prompts(problems, tokenizer, max_tokens=1 << 20)
            for name, problems in spec.problem_sets().items()
        }
        for prompts in self.sets.values():
            for reward in self.rewards:
                reward.check_columns(prompts.items[0].row)

    @classmethod
    def of(cls, recipe: TrainSpec, tokenizer: Any, processes: Processes) -> Evaluator | None:
        """The evaluator that a training recipe asks for, if it does."""
        if recipe.evaluate is None:
            return None
        return cls(recipe.evaluate, tokenizer, processes, recipe.seed)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and the longest completion together."""
        return max(len(p.ids) for prompts in self.sets.values() for p in prompts.items) + self.spec.max_tokens

    def run(self, sampler: Any, folder: Run, step: int) -> dict[str, float]:
        """Samples every set with the same streams at every step; returns {"eval/SET/METRIC": value}.

        sampler: a `Sampler` for this process's share of the problems; what it shows of its progress is set here.
        """
        results: dict[str, float] = {}
        for name, prompts in self.sets.items():
            sampler.progress = partial(_show, folder.progress, name)
            with folder.progress.phase(f"evaluating {name}"):
                batch = self._sample(sampler, prompts)
            parts = self.processes.gather([(c.group, c.record(step), c.reward) for c in batch])
            rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
            if self.processes.rank == 0:
                folder.write_samples(f"evaluation/{name}_step_{step:08d}.parquet", [r[1] for r in rows])
            groups: dict[int, list[tuple[float, str | None]]] = {}
            for group, record, reward in rows:
                score = 0.0 if math.isnan(reward) else reward
                answer = canonical_answer(prompts.prefill + record["completion"])
                groups.setdefault(group, []).append((score, answer))
            metrics = summarise(
                [[score for score, _ in row] for row in groups.values()],
                [[answer for _, answer in row] for row in groups.values()],
            )
            metrics["length"] = sum(r[1]["tokens"] for r in rows) / len(rows)
            metrics["truncated"] = sum(r[1]["finish_reason"] == "length" for r in rows) / len(rows)
            tallies = self.processes.gather(tally(batch))
            names = sorted({n for part in tallies for n in part})
            sums = {n: math.fsum(part.get(n, 0.0) for part in tallies) for n in names}
            metrics |= component_means(sums) | sums
            results |= {f"eval/{name}/{k}": v for k, v in metrics.items()}
            folder.progress.line(f"step {step} {name}: {describe(metrics)}")
        return results

    def _sample(self, sampler: Any, prompts: Prompts) -> list[Completion]:
        spec = self.spec
        mine = range(self.processes.rank, len(prompts), self.processes.world)
        items = [prompts.items[i] for i in mine]
        params = sampling_params(spec, spec.samples, stream_key(self.seed, 0x6576616C))
        samples = sampler.generate([p.ids for p in items], params, streams=list(mine))
        batch = completions_of(items, list(mine), list(mine), samples, self.tokenizer)
        assign_rewards(batch, self.rewards, prompts, TruncationSpec(), spec.max_tokens)
        return batch


def _show(progress: Progress, name: str, done: int, all_: int) -> None:
    progress.update(f"evaluating {name}: {done}/{all_} completions")


def canonical_answer(response: str) -> str | None:
    """The extracted answer in a form in which equal numbers are equal strings."""
    answer = extract_answer(response)
    if answer is None:
        return None
    number = parse_number(answer)
    return answer.strip() if number is None else str(number)


def describe(metrics: dict[str, float]) -> str:
    """One line: avg@k +- s.e., pass@k, maj@k."""
    k = int(metrics["samples"])
    parts = [f"avg@{k} {metrics['avg']:.1%} ± {metrics['avg_se']:.1%} ({int(metrics['problems'])} problems)"]
    for name in (f"pass@{k}", f"maj@{k}"):
        if name in metrics:
            parts.append(f"{name} {metrics[name]:.1%} ± {metrics[f'{name}_se']:.1%}")
    parts.append(f"{metrics['length']:.0f} tokens, {metrics['truncated']:.0%} truncated")
    return ", ".join(parts)


@contextmanager
def _sampler(recipe: EvalRecipe, evaluator: Evaluator, folder: Run) -> Iterator[Any]:
    """In this process, or over workers that load the model."""
    tokenizer, processes, spec = evaluator.tokenizer, evaluator.processes, recipe.evaluate
    if recipe.workers is None:
        model = load_model(recipe.model, tokenizer, seed=recipe.seed, dtype=DTYPES[recipe.model.dtype])
        model.to(processes.device)
        apply_precision(model, recipe.precision, processes, folder.progress, whole=True)
        yield LocalSampler(model, tokenizer, max_slots=spec.max_slots, draft_tokens=spec.draft_tokens)
        return
    drafts = {"draft_tokens": spec.draft_tokens} if spec.draft_tokens else {}
    workers = recipe.workers.model_copy(update={"options": {**drafts, **recipe.workers.options}})
    served = Served(
        recipe.engine,
        recipe.model,
        tokenizer,
        max_slots=spec.max_slots,
        longest=evaluator.longest,
        seed=recipe.seed,
        threads=recipe.threads,
    )
    with loaded_workers(workers, served, folder.folder / "workers", processes, folder.progress.line) as sampler:
        yield sampler


def run_evaluation(recipe: EvalRecipe, processes: Processes) -> dict[str, Any]:
    """`pipeline: eval`."""
    folder = Run(recipe, processes.rank)
    tokenizer = load_tokenizer(recipe.model)
    evaluator = Evaluator(recipe.evaluate, tokenizer, processes, recipe.seed)
    with _sampler(recipe, evaluator, folder) as sampler:
        results = evaluator.run(sampler, folder, 0)
    summary = {"pipeline": "eval", "model": recipe.model.path, "evaluation": results}
    folder.finish(summary)
    return summary
