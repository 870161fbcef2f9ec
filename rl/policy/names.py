"""Weights under the names and in the shapes that checkpoint files have, one layer at a time.

transformers fuses and renames weights in memory (the experts of a mixture are one tensor); other engines load what the
files hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from model.fp8.context import Fp8Context
from model.fp8.named import fp8_weights

_LAYER = re.compile(r"\.layers\.\d+\.")


def checkpoint_weights(model: Any, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """From (name in the model, tensor), layers in one piece, to (name in the files, tensor).

    Holds one layer at a time.
    """
    for layer, group in groupby(named, key=lambda pair: _layer_of(pair[0])):
        part = dict(group)
        yield from (_reverted(model, part) if layer else part).items()


def in_fp8(model: Any, *, as_in_files: bool) -> dict[str, Fp8Context]:
    """`fp8_weights`, if wanted by the names in files. (There an expert's gate and up are weights of their own, with
    blocks of their own; those of the stacked ones are the same where their size is a multiple of 128.)"""
    found = fp8_weights(model)
    if not as_in_files:
        return found
    parts = {name: torch.empty(model.get_parameter(name).shape, device="meta") for name in found}
    return {n: found[name] for name, part in parts.items() for n, _ in checkpoint_weights(model, [(name, part)])}


def _layer_of(name: str) -> str:
    found = _LAYER.search(name)
    return name[: found.end()] if found else ""


def _reverted(model: Any, part: dict[str, Tensor]) -> dict[str, Tensor]:
    if hasattr(model.base_model, "prediction_modules"):
        from model.checkpoint.names import released

        return dict(released(part))
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, part)
    return found
