"""New weights for an engine that cannot be given any: a checkpoint, from which another engine is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from rl.rollout.workers.buckets import StagedFile, packed

SHARD_BYTES = 4 << 30
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")


def write_checkpoint(source: Path, named_tensors: Iterable[tuple[str, Tensor]], target: Path) -> None:
    """A Hugging Face folder like `source` (config, tokenizer and all), in which these weights are new.

    Those that are not among them stay as they are in `source`.
    """
    if not source.is_dir():
        raise ValueError(f"this engine has to be restarted with new weights, which needs a model folder, not {source}")
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)
    placed: dict[str, str] = {}
    _write_shards(target, named_tensors, placed)
    _write_shards(target, _remaining(source, placed), placed)
    index = {"metadata": {}, "weight_map": placed}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shards(target: Path, named_tensors: Iterable[tuple[str, Tensor]], placed: dict[str, str]) -> None:
    """Adds files to the folder, and to `placed` which weight is in which."""
    for names, data in packed(named_tensors, SHARD_BYTES):
        file = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
        (target / file).write_bytes(data)
        placed |= dict.fromkeys(names, file)


def _remaining(source: Path, placed: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    known = set(placed)
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in StagedFile(path).tensors():
            if name not in known:
                yield name, tensor
