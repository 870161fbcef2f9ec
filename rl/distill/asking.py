"""What a teacher whose weights are at hand is asked, wherever it runs: token ids in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl.distill.journal import Received, Wanted
from rl.prompts import Prompt, sampling_params
from rl.recipe_distill import LocalTeacher
from rl.rollout import Sample, SamplingParams

# Engine options that a response does not depend on, but for rounding: how fast it comes, and what memory that takes.
_IRRELEVANT = frozenset(
    {
        "cpu_offload_gb", "device", "disable_log_stats", "distributed_executor_backend", "enable_chunked_prefill",
        "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len",
        "max_num_batched_tokens", "max_num_seqs", "max_slots", "pipeline_parallel_size", "prefill_tokens",
        "tensor_parallel_size", "threads",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Asking:
    """prompts: of the problems, by id. wanted: by problem, the traces that are asked for.

    All samples of a problem are drawn together, as they share its prompt's keys and values; a sample's random stream is
    that of (seed, problem, sample), so drawing some of them again changes nothing.
    """

    teacher: LocalTeacher
    tokenizer: Any
    prompts: dict[str, Prompt]
    prefill: str
    wanted: dict[str, dict[int, Wanted]]
    seed: int

    @property
    def params(self) -> SamplingParams:
        return sampling_params(self.teacher, self.teacher.samples, self.seed)

    def ids(self, problems: Sequence[str]) -> list[list[int]]:
        return [self.prompts[name].ids for name in problems]

    def received(self, problem: str, samples: Sequence[Sample]) -> list[Received]:
        """Those of a problem's samples that were wanted."""
        return [
            Received(
                **asdict(self.wanted[problem][number]),
                content=self.prefill + self.tokenizer.decode(sample.token_ids, skip_special_tokens=True),
                finish_reason=sample.finish_reason,
                prompt_tokens=len(self.prompts[problem].ids),
                completion_tokens=len(sample.token_ids),
            )
            for number, sample in enumerate(samples)
            if number in self.wanted[problem]
        ]


def by_problem(wanted: Sequence[Wanted]) -> dict[str, dict[int, Wanted]]:
    found: dict[str, dict[int, Wanted]] = {}
    for trace in wanted:
        found.setdefault(trace.id, {})[trace.sample] = trace
    return found


def stream_numbers(problems: Sequence[str]) -> list[int]:
    """A number for each problem that does not depend on its place in the data."""
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in problems]


def fingerprint(teacher: LocalTeacher) -> list[Any]:
    """What tells one teacher from another: its recipe, of a local folder the weight files as they are now, and what of
    the engine makes other responses. Not where it runs: our engine draws the same in this process and in workers."""
    folder = Path(teacher.model.path or "").expanduser()
    files = sorted(folder.glob("*.safetensors")) if teacher.model.path and folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    given = teacher.workers.options if teacher.workers else {}
    options = {name: value for name, value in given.items() if name not in _IRRELEVANT}
    ours = [] if teacher.engine == "local" and not options else [teacher.engine, options]
    return [teacher.model.model_dump(mode="json"), stats, *ours]
