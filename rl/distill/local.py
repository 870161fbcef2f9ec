"""A teacher in this process: any causal LM that the sampler serves."""

from __future__ import annotations

from collections.abc import Generator

from rl.distill.asking import Asking, stream_numbers
from rl.distill.journal import Received
from rl.policy.load import DTYPES, load_model
from rl.policy.processes import Processes
from rl.rollout import LocalSampler


def sample_local(asking: Asking, processes: Processes) -> Generator[list[Received], None, None]:
    """Responses in batches."""
    problems = list(asking.wanted)
    if not problems:
        return
    teacher, dtype = asking.teacher, DTYPES[asking.teacher.model.dtype]
    model = load_model(teacher.model, asking.tokenizer, seed=asking.seed, dtype=dtype, field="teacher.model")
    sampler = LocalSampler(model.to(processes.device), asking.tokenizer, max_slots=teacher.max_slots)
    # Some rounds of full slots between two writes: a batch ends when its longest sequence does.
    together = max(1, 4 * teacher.max_slots // teacher.samples)
    for start in range(0, len(problems), together):
        batch = problems[start : start + together]
        samples = sampler.generate(asking.ids(batch), asking.params, streams=stream_numbers(batch))
        yield [answer for name, row in zip(batch, samples, strict=True) for answer in asking.received(name, row)]
