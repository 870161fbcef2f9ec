"""Which code runs the FP8 operators on which device. A backend is a module with functions of `Operators`.

To add one, write such a module (`reference.py` says what each function does) and list it in BACKENDS. It may leave to
another module what that one does as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
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

    def swiglu_quantize(
        self, gate_up: Tensor, weight: Tensor | None = ..., *, power_of_two: bool = ...
    ) -> tuple[Quantized, Quantized]: ...

    def swiglu_quantize_backward(
        self,
        d_out: Tensor,
        gate_up: Quantized,
        weight: Tensor | None = ...,
        *,
        power_of_two: bool = ...,
        offsets: Tensor | None = ...,
    ) -> SwigluGradients: ...


@dataclass(frozen=True)
class Backend:
    """missing: what the device lacks for it, or None if it runs there. rest: the module that has the functions which
    `module` lacks."""

    name: str
    module: str
    missing: Callable[[torch.device], str | None]
    rest: str | None = None

    @cached_property
    def operators(self) -> Operators:
        own = importlib.import_module(self.module)
        if self.rest is None:
            return cast(Operators, own)
        rest = importlib.import_module(self.rest)
        names = [name for name in vars(Operators) if not name.startswith("_")]
        return cast(Operators, SimpleNamespace(**{name: getattr(own, name, getattr(rest, name)) for name in names}))

    def declines(
        self, a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
    ) -> str | None:
        """Which kind of products `fp8_gemm` leaves to the module `rest`, this one being of it; None if it is not."""
        ask = getattr(importlib.import_module(self.module), "declines", None)
        found: str | None = None if ask is None else ask(a, b, out_dtype, accumulate)
        return found


def _nothing(device: torch.device) -> str | None:
    return None


def _no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'r1forge[fp8]')"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _no_gpu(device, (8, 9))


def _no_scaled_mm(device: torch.device) -> str | None:
    if (reason := _no_triton(device) or _no_gpu(device, (9, 0), only=True)) is not None:
        return reason
    version = torch.version.cuda or "0"
    if tuple(map(int, version.split(".")[:2])) < (12, 9):
        return f"scaling in blocks needs torch for CUDA 12.9 or later, this one is for {version}"
    return None


def _no_deep_gemm(device: torch.device) -> str | None:
    if importlib.util.find_spec("deep_gemm") is None:
        return "deep_gemm is not installed (github.com/deepseek-ai/DeepGEMM)"
    if (reason := _no_triton(device) or _no_gpu(device, (9, 0), only=True)) is not None:
        return reason
    try:
        library = importlib.import_module("deep_gemm")
    except Exception as error:  # it looks for CUDA's compiler and libraries, and fails in its own ways without
        return f"importing deep_gemm failed: {type(error).__name__}: {error}"
    if not hasattr(library, "fp8_gemm_nt"):
        return f"deep_gemm {getattr(library, '__version__', '')} has no fp8_gemm_nt; install version 2 or later"
    return None


def _no_gpu(device: torch.device, needed: tuple[int, int], *, only: bool = False) -> str | None:
    """Why it is no NVIDIA GPU of that compute capability (or later, if not `only`)."""
    wanted = f"an NVIDIA GPU of compute capability {needed[0]}.{needed[1]}" + ("" if only else " or later")
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs {wanted}"
    capability = torch.cuda.get_device_capability(device)
    fits = capability == needed if only else capability >= needed
    return None if fits else f"it needs {wanted}, this one has {capability[0]}.{capability[1]}"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "model.fp8.reference", _nothing),
        Backend("triton", "model.fp8.kernels", _no_triton),
        Backend("scaled_mm", "model.fp8.with_scaled_mm", _no_scaled_mm, rest="model.fp8.kernels"),
        Backend("deep_gemm", "model.fp8.with_deep_gemm", _no_deep_gemm, rest="model.fp8.kernels"),
    )
}


def choose(name: str, device: torch.device | str) -> Backend:
    """The backend of that name; "auto" takes the kernels where they run. ValueError if it cannot run there.

    The two others replace single products of the kernels: take them by name where `benchmarks/fp8.py` says that they
    are faster.
    """
    device = torch.device(device)
    if name == "auto":  # on a CPU never the interpreter, which is for tests
        return BACKENDS["triton" if device.type != "cpu" and _no_triton(device) is None else "reference"]
    if name not in BACKENDS:
        raise ValueError(f"FP8 backend {name!r} is not one of auto, {', '.join(BACKENDS)}")
    missing = BACKENDS[name].missing(device)
    if missing is not None:
        raise ValueError(f"FP8 backend {name!r} cannot run on {device}: {missing}; 'auto' takes one that can")
    return BACKENDS[name]


def describe(device: torch.device | str) -> str:
    """One line for the log: what "auto" takes there, and why others cannot be had."""
    device = torch.device(device)
    against = [f"no {b.name}: {reason}" for b in BACKENDS.values() if (reason := b.missing(device)) is not None]
    return "; ".join([f"FP8 on {device}: {choose('auto', device).name}", *against])
