"""Weights in buckets: what a worker makes of those that a spool has kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.rollout.workers.buckets import checksum, packed
from rl.rollout.workers.receiving import Update
from rl.rollout.workers.transfer import PREFIX
from rl.rollout.workers.wire import Begin, Bucket, Transport


@pytest.mark.parametrize("transport", ["files", "http"])
def test_of_a_tensor_sent_twice_the_newer_one_counts(tmp_path: Path, transport: Transport) -> None:
    """A worker that is restarted gets the first update, whole, and then what later ones changed. Its engine gets each
    tensor once: of a layer that is complete vLLM drops what comes later, without a word."""
    first = {name: torch.full((3,), float(number)) for number, name in enumerate("qkvo")}
    later = {"q": torch.full((3,), 10.0), "v": torch.full((3,), 11.0)}
    update = Update(Begin(version=2, transport=transport), tmp_path)
    for sent in (first, later):
        for _, data in packed(sent.items(), limit=24):  # two tensors each
            path = tmp_path / f"{PREFIX}{len(update.buckets)}.safetensors"
            path.write_bytes(data)
            by_file = transport == "files"
            note = Bucket(
                version=2,
                index=len(update.buckets),
                bytes=len(data),
                checksum=checksum(data),
                file=path.name if by_file else None,
            )
            update.add(note, None if by_file else data)
    assert len(update.buckets) == 3
    found = list(update.tensors())
    assert sorted(name for name, _ in found) == sorted("qkvo")
    assert all(torch.equal(tensor, {**first, **later}[name]) for name, tensor in found)
