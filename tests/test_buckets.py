"""Weights in buckets: what a worker makes of those that a spool has kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.rollout.workers.buckets import checksum, newest, packed, staged_bytes, staged_file


@pytest.mark.parametrize("in_files", [True, False])
def test_of_a_tensor_sent_twice_the_newer_one_counts(tmp_path: Path, in_files: bool) -> None:
    """A worker that is restarted gets the first update, whole, and then what later ones changed."""
    first = {name: torch.full((3,), float(number)) for number, name in enumerate("qkvo")}
    later = {"q": torch.full((3,), 10.0), "v": torch.full((3,), 11.0)}
    staged = []
    for update in (first, later):
        for _, data in packed(update.items(), limit=24):  # two tensors each
            path = tmp_path / f"{len(staged)}.safetensors"
            path.write_bytes(data)
            staged.append(staged_file(path, checksum(data)) if in_files else staged_bytes(data, checksum(data)))
    assert len(staged) == 3
    found = list(newest(staged))
    assert sorted(name for name, _ in found) == sorted("qkvo")
    assert all(torch.equal(tensor, {**first, **later}[name]) for name, tensor in found)
