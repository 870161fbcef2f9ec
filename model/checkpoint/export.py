"""FP8 checkpoints in the released layout: from a model, or from folder to folder without building one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.files import CONFIG, Checkpoint, CheckpointError, read_json
from model.checkpoint.names import SCALE, is_quantized, main_tensors, module_copies, needed, released_dtype
from model.checkpoint.write import Piece, empty_folder, write
from model.fp8.blocks import BLOCK, quantize_blocks, scale_shape

# What transformers, vLLM and SGLang read; as in the release.
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
SHARD = "5GB"
# Model types whose layers have these names; of others we do not know which weights an engine takes in FP8.
FAMILY = ("deepseek_v2", "deepseek_v3", "kimi_k2")


def save_fp8(model: Any, folder: str | Path, max_shard_size: int | str = SHARD) -> None:
    """Writes a `MoEForCausalLM` as the release is: projections in E4M3 with a float32 scale per 128 x 128 block, biases
    of the routing in float32, the rest in bfloat16; prediction modules with their copies of embedding and head.

    The folder must be new or empty. In memory at a time: one shard.
    """
    folder = Path(folder)
    empty_folder(folder)
    named = needed(main_tensors(model.state_dict(), model.config), model.config)
    for copy, main in module_copies(model.config).items():
        named[copy] = named[main]
    pieces = [released_piece(name, tuple(tensor.shape), tensor.detach) for name, tensor in named.items()]
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write(folder, pieces, _fp8_config(json.loads(model.config.to_json_string())), max_shard_size)


def export_fp8(
    source: Path,
    target: Path,
    max_shard_size: int | str = SHARD,
    *,
    weights: Collection[str] | None = None,
    kept: Collection[str] = (),
) -> None:
    """The same from a folder of float32, float16 or bfloat16 files; tokenizer and other small files are copied.

    weights: names of those to quantise; None = as in the release, whose names only its family has.
    kept: names of linear layers that are not quantised, for engines that would expect them to be.
    """
    checkpoint, config = _source(source)
    if checkpoint.fp8:
        raise CheckpointError(f"{source} is in FP8 already")
    if weights is None and config.get("model_type") not in FAMILY:
        raise CheckpointError(f"{source} is a model of type {config.get('model_type')}, not {' or '.join(FAMILY)}")
    empty_folder(target)
    chosen: Callable[[str], bool] = is_quantized if weights is None else weights.__contains__
    pieces = [
        (_fp8_piece if chosen(name) else _plain_piece)(name, shape, partial(checkpoint.read, name, torch.float32))
        for name, shape in checkpoint.shape.items()
    ]
    _copy_others(source, target)
    write(target, pieces, _fp8_config(config, kept), max_shard_size)


def dequantise(source: Path, target: Path, max_shard_size: int | str = SHARD) -> None:
    """The way back: all weights in bfloat16, config.json without its quantization_config."""
    checkpoint, config = _source(source)
    if not checkpoint.fp8:
        raise CheckpointError(f"{source} holds no FP8 weights: there is nothing to dequantise")
    empty_folder(target)
    pieces = [
        _plain_piece(name, shape, partial(checkpoint.read, name, released_dtype(name)))
        for name, shape in checkpoint.shape.items()
    ]
    _copy_others(source, target)
    write(target, pieces, _typed({k: v for k, v in config.items() if k != "quantization_config"}), max_shard_size)


def released_piece(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Piece:
    """One tensor of the release: as it is, or quantised with its scales. `read` gives its values."""
    return (_fp8_piece if is_quantized(name) else _plain_piece)(name, shape, read)


def _fp8_piece(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Piece:

    def make() -> dict[str, Tensor]:
        q, scale = quantize_blocks(read())
        if not scale.isfinite().all():
            raise CheckpointError(f"{name} holds a NaN or an infinity")
        return {name: q, name + SCALE: scale}

    layout = {
        name: torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"),
        name + SCALE: torch.empty(scale_shape(shape), dtype=torch.float32, device="meta"),
    }
    return Piece(layout, make)


def _plain_piece(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Piece:
    dtype = released_dtype(name)
    return Piece({name: torch.empty(shape, dtype=dtype, device="meta")}, lambda: {name: read().to(dtype)})


def _source(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: there is no {CONFIG}")
    return Checkpoint.in_folder(folder), read_json(folder / CONFIG)


def _fp8_config(config: dict[str, Any], kept: Collection[str] = ()) -> dict[str, Any]:
    names = {"modules_to_not_convert": sorted(kept)} if kept else {}
    return {**_typed(config), "quantization_config": QUANTIZATION | names}


def _typed(config: dict[str, Any]) -> dict[str, Any]:
    """With bfloat16 as the type to compute in, under the name that the config uses (it was torch_dtype)."""
    return {**config, "torch_dtype" if "torch_dtype" in config else "dtype": "bfloat16"}


def _copy_others(source: Path, target: Path) -> None:
    """Everything beside the weights, but not folders."""
    for path in source.iterdir():
        if path.is_file() and path.name != CONFIG and ".safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)
