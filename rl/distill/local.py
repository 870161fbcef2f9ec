"""A teacher in this process: any causal LM that the sampler serves."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl.distill.journal import Received, Wanted
from rl.policy.load import DTYPES, load_model
from rl.policy.processes import Processes
from rl.prompts import Prompt, sampling_params
from rl.recipe_distill import LocalTeacher
from rl.rollout import LocalSampler


def sample_local(
    teacher: LocalTeacher,
    tokenizer: Any,
    prompts: dict[str, Prompt],
    prefill: str,
    wanted: Sequence[Wanted],
    *,
    seed: int,
    processes: Processes,
) -> Generator[list[Received], None, None]:
    """Responses in batches. All samples of a problem are drawn together, as they share its prompt's keys and values;
    a sample's random stream is that of (seed, problem, sample), so drawing some of them again changes nothing."""
    by_problem: dict[str, dict[int, Wanted]] = {}
    for trace in wanted:
        by_problem.setdefault(trace.id, {})[trace.sample] = trace
    if not by_problem:
        return
    model = load_model(teacher.model, tokenizer, seed=seed, dtype=DTYPES[teacher.model.dtype])
    sampler = LocalSampler(model.to(processes.device), tokenizer, max_slots=teacher.max_slots)
    params = sampling_params(teacher, teacher.samples, seed)
    ids = list(by_problem)
    # Some rounds of full slots between two writes: a batch ends when its longest sequence does.
    together = max(1, 4 * teacher.max_slots // teacher.samples)
    for start in range(0, len(ids), together):
        batch = ids[start : start + together]
        samples = sampler.generate([prompts[i].ids for i in batch], params, streams=[_stream(i) for i in batch])
        yield [
            Received(
                **asdict(by_problem[name][number]),
                content=prefill + tokenizer.decode(sample.token_ids, skip_special_tokens=True),
                finish_reason=sample.finish_reason,
                prompt_tokens=len(prompts[name].ids),
                completion_tokens=len(sample.token_ids),
            )
            for name, row in zip(batch, samples, strict=True)
            for number, sample in enumerate(row)
            if number in by_problem[name]
        ]


def _stream(problem: str) -> int:
    """A number for a problem that does not depend on its place in the data."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:7], "big")


def fingerprint(teacher: LocalTeacher) -> list[Any]:
    """What tells one teacher from another: its recipe, and of a local folder the weight files as they are now."""
    folder = Path(teacher.model.path or "").expanduser()
    files = sorted(folder.glob("*.safetensors")) if teacher.model.path and folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [teacher.model.model_dump(mode="json"), stats]
