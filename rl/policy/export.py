"""The policy as an ordinary Hugging Face folder, wherever its weights are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from rl.policy.backend import Backend
from rl.run.checkpoint import write_folder


def export_model(target: Path, backend: Backend, tokenizer: Any, *, adapters: bool) -> None:
    """Called on every process; the first one writes. adapters: whether the model has some, to be merged."""
    processes, model = backend.processes, backend.model
    own = processes.sharding.kind == "none" and not adapters  # its tensors are those to be written
    if processes.rank == 0:
        weights = None if own else {name: t.to("cpu", copy=True) for name, t in backend.named_weights()}

        def fill(path: Path) -> None:
            model.save_pretrained(path, state_dict=weights)
            tokenizer.save_pretrained(path)

        write_folder(target, fill)
    elif not own:
        exhaust(backend.named_weights())
    processes.barrier()


def exhaust(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Takes part in gathering tensors that another process wants."""
    for _ in tensors:
        pass
