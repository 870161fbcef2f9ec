"""Which code runs the FP8 operators on which device. A backend is a module with the functions of `Operators`.

To add one, write such a module (`reference.py` says what each function does) and list it in BACKENDS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from model.fp8.quantized import Quantized
from model.fp8.reference import SwigluGradients


class Operators(Protocol):
    """The operator set; `reference.py` has the contracts."""

    def quantize_activation(
        self,
        x: Tensor | Quantized,
        *,
        floor: float | None = ...,
        power_of_two: bool = ...,
        transposed: bool = ...,
        offsets: Tensor | None = ...,
    ) -> Quantized: ...

    def quantize_both(
        self, x: Tensor, *, floor: float | None = ..., power_of_two: bool = ..., offsets: Tensor | None = ...
    ) -> tuple[Quantized, Quantized]: ...

    def quantize_weight(self, weight: Tensor, *, power_of_two: bool = ...) -> Quantized: ...

    def fp8_gemm(
        self, a: Quantized, b: Quantized, *, out_dtype: torch.dtype = ..., accumulate: Tensor | None = ...
    ) -> Tensor: ...

    def grouped_gemm(self, a: Quantized, b: Quantized, offsets: Tensor, *, out_dtype: torch.dtype = ...) -> Tensor: ...

    def grouped_wgrad(
        self,
        dy_t: Quantized,
        x_t: Quantized,
        offsets: Tensor,
        *,
        out_dtype: torch.dtype = ...,
        accumulate: Tensor | None = ...,
    ) -> Tensor: ...

    def swiglu_quantize(self, gate_up: Tensor, *, power_of_two: bool = ...) -> tuple[Quantized, Quantized]: ...

    def swiglu_quantize_backward(
        self, d_out: Tensor, gate_up: Quantized, *, power_of_two: bool = ..., offsets: Tensor | None = ...
    ) -> SwigluGradients: ...


@dataclass(frozen=True)
class Backend:
    """missing: what the device lacks for it, or None if it runs there."""

    name: str
    module: str
    missing: Callable[[torch.device], str | None]

    @property
    def operators(self) -> Operators:
        return cast(Operators, importlib.import_module(self.module))


def _nothing(device: torch.device) -> str | None:
    return None


BACKENDS = {backend.name: backend for backend in (Backend("reference", "model.fp8.reference", _nothing),)}
AUTO = ("reference",)  # the first that runs


def choose(name: str, device: torch.device | str) -> Backend:
    """The backend of that name, or for "auto" the first of AUTO that runs there. ValueError if it cannot run."""
    device = torch.device(device)
    if name == "auto":
        return next(b for b in map(BACKENDS.__getitem__, AUTO) if b.missing(device) is None)
    if name not in BACKENDS:
        raise ValueError(f"FP8 backend {name!r} is not one of auto, {', '.join(BACKENDS)}")
    missing = BACKENDS[name].missing(device)
    if missing is not None:
        raise ValueError(f"FP8 backend {name!r} cannot run on {device}: {missing}; auto takes one that can")
    return BACKENDS[name]


def describe(device: torch.device | str) -> str:
    """One line for the log: what "auto" takes there, and why it takes no other."""
    device = torch.device(device)
    against = [f"not {b.name}: {reason}" for b in BACKENDS.values() if (reason := b.missing(device)) is not None]
    return "; ".join([f"FP8 on {device}: {choose('auto', device).name}", *against])
