"""Writes a folder of safetensors files, with one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.files import CONFIG, INDEX, CheckpointError


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed together. layout: their names, shapes and types, without memory."""

    layout: dict[str, Tensor]
    make: Callable[[], dict[str, Tensor]]


def empty_folder(folder: Path) -> None:
    """Makes it; an error if there is something in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty: nothing is overwritten, name another folder")


@torch.no_grad()
def write(folder: Path, pieces: Iterable[Piece], config: dict[str, Any], max_shard_size: int | str) -> None:
    """Shards, index and, last of all, config.json: a folder without it is not finished."""
    layout: dict[str, Tensor] = {}
    maker: dict[str, Piece] = {}
    for piece in pieces:
        layout.update(piece.layout)
        maker.update(dict.fromkeys(piece.layout, piece))
    split = split_torch_state_dict_into_shards(layout, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            if name not in shard:  # else its piece was made already
                made = maker[name].make()
                shard.update({other: made[other].cpu().contiguous() for other in made if other in names})
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
