"""A teacher in worker processes, here or on other hosts, with the weights that they loaded."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from rl.distill.asking import Asking, stream_numbers
from rl.distill.journal import Received
from rl.policy.processes import Processes
from rl.recipe_distill import DistillRecipe
from rl.recipe_io import RecipeError
from rl.rollout.loaded import Served, loaded_workers
from rl.run.progress import Progress


def sample_in_workers(
    recipe: DistillRecipe, asking: Asking, processes: Processes, progress: Progress
) -> Generator[list[Received], None, None]:
    """Responses as they come, a problem's together. Called on every process, each of which asks for its own share."""
    teacher, problems = asking.teacher, list(asking.wanted)
    assert teacher.workers is not None  # else it is sampled in this process
    served = Served(
        teacher.engine,
        teacher.model,
        asking.tokenizer,
        max_slots=teacher.max_slots,
        longest=teacher.max_prompt_tokens + teacher.max_tokens,
        seed=recipe.seed,
        threads=recipe.threads,
        field="teacher.",
    )
    with loaded_workers(
        teacher.workers, served, Path(recipe.output_dir) / "workers", processes, progress.line
    ) as sampler:
        try:
            streams = stream_numbers(problems)
            with closing(sampler.stream(asking.ids(problems), asking.params, streams=streams)) as groups:
                for complete in groups:
                    if complete:
                        yield [answer for i, row in complete for answer in asking.received(problems[i], row)]
        except (RuntimeError, ValueError) as error:
            raise RecipeError(f"teacher.workers: {error}; what was received is kept, so start again") from error
