"""Tensors cut along their first dimension, as FSDP2 does it, and whole ones, by the same functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. (To ask for its class would import torch.distributed.tensor for everyone.)"""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    held: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()
    return held


def whole(like: Any, held: Tensor) -> Tensor:
    """The whole of which each process holds a part as it holds one of `like`; every process gets it."""
    if not is_sharded(like):
        return held
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    mine = DTensor.from_local(
        held.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    gathered: Tensor = mine.full_tensor()
    return gathered


def part(like: Any, whole: Any) -> Tensor:
    """This process's part of a whole tensor (or of a lazily read one that can be sliced), cut as `like` is."""
    if not is_sharded(like):
        taken: Tensor = whole if isinstance(whole, Tensor) else whole[:]
        return taken
    mesh = like.device_mesh
    each = -(-like.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * each, like.shape[0])
    stop = min(start + each, like.shape[0])
    return whole[start:stop] if stop > start else torch.empty(like.to_local().shape)
