"""Atomic checkpoints: written beside, flushed to disk, then renamed. A kill leaves the old or the new, whole.

torch takes seconds to import, so it is imported where it is used: what only writes files does without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.run.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Calls fill(temporary folder), flushes every file and renames the folder to `target`."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if target.exists():  # left by a run that was killed after the rename and replayed the step
        old = target.with_name(f".old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    _flush(target.parent)


def write_file(target: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary path), flushes and renames to `target`."""
    partial = target.with_name(f".partial-{target.name}")
    write(partial)
    _flush(partial)
    partial.replace(target)


class Checkpoints:
    """Folders `step_00000050/` under `folder`: plain numbers in `state.pt`, and tensors by name beside it."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step_")) for p in self.folder.glob("step_*") if p.is_dir())

    def save(self, step: int, state: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        import torch

        def fill(path: Path) -> None:
            torch.save(state, path / "state.pt")
            write_tensors(path / "tensors", tensors)

        write_folder(self.folder / f"step_{step:08d}", fill)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old:08d}")

    def load_latest(self) -> tuple[dict[str, Any], Callable[[str], Any]] | None:
        """The newest complete checkpoint, or None: its numbers, and a reader of its tensors."""
        import torch

        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"step_{steps[-1]:08d}"
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return state, read_tensors(folder / "tensors")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
