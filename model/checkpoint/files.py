"""Reads a folder of safetensors files one tensor at a time; FP8 weights come dequantised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoint.names import SCALE
from model.fp8.blocks import BLOCK, dequantize_blocks, scale_shape

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_PLAIN = ("F64", "F32", "BF16", "F16")


class CheckpointError(ValueError):
    """Files that cannot be read, or that do not fit the model."""


class Checkpoint:
    """The tensors in some safetensors files. Only headers and scales (4 bytes per 16,384 weights) are held.

    shape: of each tensor by name, in the files' order, without the scales of FP8 weights. fp8: the names of these.
    """

    def __init__(self, files: Sequence[Path]):
        self.folder = files[0].parent
        self.shape: dict[str, tuple[int, ...]] = {}
        self.fp8: set[str] = set()
        self._file: dict[str, Path] = {}
        scales: dict[str, Tensor] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():
                    if name in self.shape or name in scales:
                        raise CheckpointError(f"{self.folder}: {name} is in two files")
                    if name.endswith(SCALE):
                        scales[name] = file.get_tensor(name).float().clone()  # not a view of the mapped file
                        continue
                    part = file.get_slice(name)
                    self.shape[name], self._file[name] = tuple(part.get_shape()), path
                    if part.get_dtype() == "F8_E4M3" and len(self.shape[name]) == 2:
                        self.fp8.add(name)
                    elif part.get_dtype() not in _PLAIN:
                        raise CheckpointError(f"{path}: {name} is of type {part.get_dtype()}, which is not read")
        self.block = _block_size(self.folder) if self.fp8 else BLOCK
        self._scale = {name: self._scale_of(name, scales) for name in self.fp8}
        if scales:
            raise CheckpointError(f"{self.folder}: {next(iter(scales))} belongs to no FP8 weight")

    @classmethod
    def in_folder(cls, folder: Path) -> Checkpoint:
        """Through its index, which must be right, or its only file."""
        if not (folder / INDEX).is_file():
            if not (folder / SINGLE).is_file():
                raise CheckpointError(f"{folder}: there is neither {INDEX} nor {SINGLE}")
            return cls([folder / SINGLE])
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: there is no weight_map")
        files = sorted(set(weight_map.values()))
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise CheckpointError(f"{folder}: {INDEX} names {len(absent)} files that are not there: {absent[0]}")
        checkpoint = cls([folder / file for file in files])
        lost = [name for name in weight_map if name not in checkpoint.shape and not name.endswith(SCALE)]
        if lost:
            raise CheckpointError(f"{folder}: {INDEX} names {len(lost)} tensors that are in no file: {lost[0]}")
        return checkpoint

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """One tensor. Its file is mapped for as long as that takes, so that only this tensor's pages are in memory."""
        with _opened(self._file[name]) as file:
            tensor = file.get_tensor(name).to(device)  # in its own type: FP8 crosses the bus as FP8
        if name not in self._scale:
            return tensor.to(dtype)
        return dequantize_blocks(tensor, self._scale[name].to(device), self.block, dtype)

    def _scale_of(self, name: str, scales: dict[str, Tensor]) -> Tensor:
        scale = scales.pop(name + SCALE, None)
        if scale is None:
            raise CheckpointError(f"{self.folder}: {name} is in FP8, but {name + SCALE} is not there")
        wanted = scale_shape(self.shape[name], self.block)
        if tuple(scale.shape) != wanted:
            raise CheckpointError(
                f"{self.folder}: {name + SCALE} has the shape {tuple(scale.shape)}; blocks of {self.block} "
                f"(quantization_config.weight_block_size) need {wanted}"
            )
        return scale


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors' own type is no subclass of anything narrower
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def _block_size(folder: Path) -> tuple[int, int]:
    """As config.json says; 128 x 128 if it says nothing."""
    path = folder / CONFIG
    settings = read_json(path).get("quantization_config") if path.is_file() else None
    if settings is None:
        return BLOCK
    method, size = settings.get("quant_method"), settings.get("weight_block_size")
    if method != "fp8" or not isinstance(size, list) or len(size) != 2:
        raise CheckpointError(
            f"{path}: quantization_config must be quant_method fp8 with a weight_block_size of two numbers, "
            f"not {method} with {size}"
        )
    return int(size[0]), int(size[1])
