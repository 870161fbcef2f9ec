"""What is to be asked of a teacher: every trace that is wanted, under a hash of all that its answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.problems import load_problems
from data.spec import ProblemSpec
from rl.distill.api import request_payload
from rl.distill.asking import Asking, by_problem, fingerprint
from rl.distill.journal import Received, Wanted
from rl.distill.local import sample_local
from rl.distill.workers import sample_in_workers
from rl.policy.load import load_tokenizer
from rl.policy.processes import Processes
from rl.prompts import load_prompts
from rl.recipe import SamplingSpec
from rl.recipe_distill import ApiTeacher, DistillRecipe, LocalTeacher
from rl.run.progress import Progress

Ask = Callable[[Sequence[Wanted]], Generator[list[Received], None, None]]


@dataclass(frozen=True)
class LocalPlan:
    """Problems by id, the traces wanted of them, and how to draw those of them that are this process's share."""

    rows: dict[str, Mapping[str, Any]]
    wanted: list[Wanted]
    over_long: int
    tokenizer: Any
    ask: Ask


def plan_local(recipe: DistillRecipe, teacher: LocalTeacher, processes: Processes, progress: Progress) -> LocalPlan:
    """teacher: the recipe's."""
    assert recipe.data is not None  # DistillRecipe: data comes with a teacher
    tokenizer, seed = load_tokenizer(teacher.model, "teacher.model"), recipe.seed
    prompts = load_prompts(recipe.data, tokenizer, max_tokens=teacher.max_prompt_tokens)
    items = {str(prompt.row["id"]): prompt for prompt in prompts.items}
    # All settings but the number of samples: the first four of eight are the four that were there before.
    settings = [fingerprint(teacher), {name: getattr(teacher, name) for name in SamplingSpec.model_fields}, seed]
    hashes = {name: _hash([*settings, prompt.ids]) for name, prompt in items.items()}
    share = set(list(items)[processes.rank :: processes.world])

    def ask(left: Sequence[Wanted]) -> Generator[list[Received], None, None]:
        if not left:  # for any process
            return
        mine = by_problem([trace for trace in left if trace.id in share])
        asking = Asking(teacher, tokenizer, items, prompts.prefill, mine, seed)
        if teacher.workers is None:
            yield from sample_local(asking, processes)
        else:
            yield from sample_in_workers(recipe, asking, processes, progress)

    wanted = [Wanted(name, number, hashes[name]) for name in items for number in range(teacher.samples)]
    return LocalPlan({name: prompt.row for name, prompt in items.items()}, wanted, prompts.dropped, tokenizer, ask)


@dataclass(frozen=True)
class ApiPlan:
    """Problems by id, the traces wanted of them, and the body of the request for each."""

    rows: dict[str, Mapping[str, Any]]
    wanted: list[Wanted]
    teacher: ApiTeacher
    seed: int

    def payload(self, trace: Wanted) -> dict[str, Any]:
        return _payload(self.teacher, self.rows[trace.id], trace.sample, self.seed)


def plan_api(data: ProblemSpec, teacher: ApiTeacher, seed: int) -> ApiPlan:
    rows: dict[str, Mapping[str, Any]] = {str(row["id"]): dict(row) for row in load_problems(data)}
    wanted = [
        Wanted(name, number, _hash([teacher.base_url, _payload(teacher, row, number, seed)]))
        for name, row in rows.items()
        for number in range(teacher.samples)
    ]
    return ApiPlan(rows, wanted, teacher, seed)


def _payload(teacher: ApiTeacher, row: Mapping[str, Any], sample: int, seed: int) -> dict[str, Any]:
    # 31 bits, as some servers read no more.
    drawn = hashlib.sha256(f"{seed}\0{row['id']}\0{sample}".encode()).digest()[:4]
    return request_payload(teacher, row["prompt"], int.from_bytes(drawn, "big") >> 1)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
