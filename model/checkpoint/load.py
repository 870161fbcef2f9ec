"""Fills a model that has no memory yet from files, one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint.files import Checkpoint
from model.checkpoint.names import copies, main_tensors
from model.checkpoint.strict import check, left_out


@torch.no_grad()
def fill(model: Any, checkpoint: Checkpoint, device_of: Callable[[str], torch.device | str]) -> None:
    """Gives every parameter and persistent buffer memory on `device_of(its name)`, and its values, in its own type.

    In memory at a time: the model, and one tensor as stored and in float32. Raises CheckpointError before anything is
    read if names or shapes do not fit. A head tied to the embedding is left to the caller.
    """
    config = model.config
    skipped, surplus = left_out(checkpoint.shape, config)
    found = {name: shape for name, shape in checkpoint.shape.items() if name not in skipped}
    wanted = {name: tuple(tensor.shape) for name, tensor in main_tensors(model.state_dict(), config).items()}
    check(wanted, found, config, str(checkpoint.folder))
    if surplus:
        warnings.warn(
            f"{checkpoint.folder}: the prediction modules in layers {sorted(surplus)} are not loaded, because "
            f"num_nextn_predict_layers is {config.num_nextn_predict_layers}",
            stacklevel=2,
        )
    _materialise(model, device_of)
    named = main_tensors(model.state_dict(), config)
    for name in found:  # in the files' order
        target = named[name]
        target.copy_(checkpoint.read(name, target.dtype, target.device))
    for name in wanted.keys() - found.keys():  # biases that nothing reads
        named[name].zero_()
    for copy, main in copies(config).items():
        if copy in checkpoint.shape and not _repeats(checkpoint, copy, named[main]):
            warnings.warn(
                f"{checkpoint.folder}: {copy} differs from {main}, which the model uses in its place: the two are "
                "shared (V3 report, section 2.2), and the former is ignored",
                stacklevel=2,
            )


def _materialise(model: nn.Module, device_of: Callable[[str], torch.device | str]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        memory = torch.empty_like(tensor, device=device_of(name))
        owner, _, attribute = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            memory = nn.Parameter(memory, requires_grad=tensor.requires_grad)
        memory._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would draw random values
        setattr(model.get_submodule(owner), attribute, memory)


def _repeats(checkpoint: Checkpoint, copy: str, main: Tensor) -> bool:
    if checkpoint.shape[copy] != tuple(main.shape):
        return False
    return torch.equal(checkpoint.read(copy, main.dtype, main.device), main)
