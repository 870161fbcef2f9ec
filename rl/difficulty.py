"""How hard problems are: the share of a model's samples that the rewards call correct.

Results are appended to a file, a line a chunk, keyed by what was asked: the problem, the model and the settings. A kill
loses at most the chunk that was being sampled. A problem's random numbers come from its own text, so its samples do
not depend on which other problems there are; chunks have fixed places, so that a run that was killed samples
the same batches as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.curation.output import records
from data.curation.problem import Problem, Rejected
from data.templates import encode_prompt, render_prompt, resolve_template, to_messages, uses_chat_template
from rewards import Reward, load_reward
from rl.experience import assign_rewards, completions_of
from rl.policy.load import DTYPES, load_model, load_tokenizer
from rl.policy.processes import Processes
from rl.prompts import Prompt, Prompts, sampling_params
from rl.recipe import TruncationSpec
from rl.recipe_data import DifficultySpec
from rl.rollout import LocalSampler, Sampler
from rl.run.checkpoint import write_file
from rl.run.progress import Progress

Scores = list[float | None]  # of a problem's samples, 1 = correct; None where no reward applies


class Difficulty:
    """Measures pass rates. Every process holds all problems and samples a part of each chunk."""

    def __init__(self, spec: DifficultySpec, seed: int, results: Path, processes: Processes):
        self.spec, self.seed, self.results, self.processes = spec, seed, results, processes
        self.tokenizer = load_tokenizer(spec.model)
        self.rewards: list[Reward] = [load_reward(reward) for reward in spec.rewards]
        self.settings = _settings(spec, seed)
        self._sampler: Sampler | None = None

    def outcomes(self, problems: Sequence[Problem], progress: Progress) -> list[float | Rejected]:
        """The pass rate of each problem, or why it has none."""
        prompts = self._prompts(problems)
        keys = [_key(self.settings, problem) for problem in problems]
        fits = [i for i, prompt in enumerate(prompts.items) if len(prompt.ids) <= self.spec.max_prompt_tokens]
        known = self._load()
        chunks = [fits[i : i + self.spec.chunk] for i in range(0, len(fits), self.spec.chunk)]
        if fits:
            for reward in self.rewards:
                reward.check_columns(prompts.items[fits[0]].row)
        with progress.bar("measuring difficulty", len(fits)) as advance:
            for number, chunk in enumerate(chunks, start=1):
                asked = [i for i in chunk if keys[i] not in known]
                if asked:
                    scores = self._sample(prompts, asked, [keys[i] for i in asked])
                    found = dict(zip((keys[i] for i in asked), scores, strict=True))
                    self._append(found)
                    known |= found
                    progress.line(f"difficulty: chunk {number} of {len(chunks)}")
                advance(len(chunk))
        return [
            pass_rate(known[key])
            if key in known
            else Rejected(
                "the prompt is longer than difficulty.max_prompt_tokens",
                f"{len(prompt.ids)} tokens",
            )
            for key, prompt in zip(keys, prompts.items, strict=True)
        ]

    def _prompts(self, problems: Sequence[Problem]) -> Prompts:
        template = resolve_template(self.spec.template)
        items = []
        for row in records(problems):
            tests = "\n".join(test["code"] for test in row.get("tests") or [] if test["code"])
            messages = to_messages(row["problem"], template, tests)
            ids = encode_prompt(messages, self.tokenizer, template)
            items.append(Prompt(ids, render_prompt(messages, self.tokenizer, template), {**row, "prompt": messages}))
        return Prompts(items, template.prefill, uses_chat_template(self.tokenizer, template), 0)

    def _sample(self, prompts: Prompts, asked: Sequence[int], keys: Sequence[str]) -> list[Scores]:
        """The scores of each problem asked for, sampled by all processes together."""
        if self._sampler is None:
            dtype = DTYPES[self.spec.model.dtype]
            model = load_model(self.spec.model, self.tokenizer, seed=self.seed, dtype=dtype)
            model = model.to(self.processes.device)
            self._sampler = LocalSampler(model, self.tokenizer, max_slots=self.spec.max_slots)
        mine = range(self.processes.rank, len(asked), self.processes.world)
        items = [prompts.items[asked[i]] for i in mine]
        params = sampling_params(self.spec, self.spec.samples, self.seed)
        streams = [int(keys[i][:15], 16) for i in mine]
        samples = self._sampler.generate([item.ids for item in items], params, streams=streams) if items else []
        batch = completions_of(items, list(mine), list(mine), samples, self.tokenizer)
        assign_rewards(batch, self.rewards, prompts, TruncationSpec(), self.spec.max_tokens)
        scores: list[Scores] = [[] for _ in asked]
        for part in self.processes.gather([(c.group, None if math.isnan(c.reward) else c.reward) for c in batch]):
            for group, reward in part:
                scores[group].append(reward)
        return scores

    def _load(self) -> dict[str, Scores]:
        """What earlier runs have measured. The first process reads for all; a line that a kill cut short is dropped."""
        known: dict[str, Scores] = {}
        if self.processes.rank == 0 and self.results.exists():
            text = self.results.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            for line in whole.splitlines():
                known |= json.loads(line)
            if whole != text:
                write_file(self.results, lambda path: path.write_text(whole, encoding="utf-8"))
        return dict(self.processes.gather(known)[0])

    def _append(self, found: dict[str, Scores]) -> None:
        if self.processes.rank:
            return
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
            file.flush()
            os.fsync(file.fileno())


def pass_rate(scores: Scores) -> float | Rejected:
    """The mean score of the samples that were scored."""
    scored = [score for score in scores if score is not None]
    if not scored:
        return Rejected("no reward applies", f"to any of {len(scores)} samples")
    return math.fsum(scored) / len(scored)


def in_band(problem: Problem, outcome: float | Rejected, spec: DifficultySpec) -> Problem | Rejected:
    """The problem, if its pass rate lies in the band."""
    if isinstance(outcome, Rejected):
        return outcome
    low, high = spec.band
    if low <= outcome <= high:
        return problem
    side = f"too hard: pass rate below {low:g}" if outcome < low else f"too easy: pass rate above {high:g}"
    return Rejected(side, f"{outcome:.3f} over {spec.samples} samples")


def _settings(spec: DifficultySpec, seed: int) -> dict[str, Any]:
    """What a result depends on. The band, the slots and the chunks are not part of the question."""
    asked = spec.model_dump(mode="json", exclude={"band", "max_slots", "chunk", "max_prompt_tokens"})
    folder = Path(spec.model.path).expanduser() if spec.model.path else None
    weights = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    # A model that is trained again lies at the same path.
    return {**asked, "seed": seed, "weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights]}


def _key(settings: dict[str, Any], problem: Problem) -> str:
    text = json.dumps([settings, problem.statement, problem.answer, problem.tests, problem.setup], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
