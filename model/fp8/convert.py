"""`to_fp8`: which layers of a model compute in FP8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from model.experts import Experts
from model.fp8.backends import choose
from model.fp8.context import Fp8Context
from model.fp8.feed_forward import Fp8Experts, Fp8SwiGLU
from model.fp8.linear import Fp8Linear
from model.moe import SwiGLU

# By the last part of their name: output heads, gates of shared experts, and the projection that joins states and
# embeddings for multi-token prediction. (Embeddings, norms and the attention itself are no linear layers.)
KEPT = ("lm_head", "embed_out", "score", "classifier", "shared_expert_gate", "eh_proj")
# By any part of their name: what a router is made of.
ROUTERS = frozenset(("gate", "router"))
# Whose input's scales are powers of two, by the last part.
AFTER_ATTENTION = ("o_proj", "out_proj")
BESIDE_ADAPTER = ".base_layer"  # what PEFT calls a layer that it puts an adapter beside, below the layer's own name
# What layers in FP8 were before.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {Fp8Linear: nn.Linear, Fp8Experts: Experts, Fp8SwiGLU: SwiGLU}


class Conversion(NamedTuple):
    """Names of the layers that compute in FP8 from now on, and of linear layers and stacks of such that do not."""

    converted: list[str]
    kept: list[str]
    parameters: int  # of the converted ones


def to_fp8(
    model: nn.Module,
    *,
    backend: str = "auto",
    device: torch.device | None = None,
    skip: Iterable[str] = (),
    keep_weights: bool = True,
    weight_rounding: torch.dtype | None = torch.bfloat16,
) -> Conversion:
    """Turns linear layers of any model, and the SwiGLUs and experts of our own, into FP8 ones, in place.

    Parameters stay what and where they are: checkpoints, optimizers and samplers see plain weights. Left as they are:
    output heads, layers called as in KEPT and ROUTERS, subclasses of nn.Linear, adapters, and what `skip` names, as in
    "model.layers.0.*" or "*.q_proj" (with or without an adapter). Stacked experts of transformers' own models are no
    linear layers.

    device: where the model will run; None = where it is. keep_weights, weight_rounding: see `Fp8Context`.

    Raises ValueError if the backend cannot run on that device, if a pattern of `skip` names nothing, or if nothing is
    left to convert.
    """
    device = device or next(model.parameters()).device
    choose(backend, device if device.type != "meta" else "cpu")
    context = Fp8Context(backend, keep_weights=keep_weights, weight_rounding=weight_rounding)
    found = _layers(model)
    own = {name: name.removesuffix(BESIDE_ADAPTER) for name in found}
    patterns = list(skip)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own.values()):
            some = ", ".join(list(own.values())[:3])
            raise ValueError(f"{pattern!r} in skip names no linear layer of this model; it has {some}, ...")
    head = _output_head(model)
    converted: list[str] = []
    for name, module in found.items():
        parts = own[name].split(".")
        last = parts[-1]
        if module is head or last in KEPT or not ROUTERS.isdisjoint(parts):
            continue
        if any(fnmatchcase(own[name], pattern) for pattern in patterns):
            continue
        converted.append(name)
        if isinstance(module, Experts):
            Fp8Experts.convert(module, context)
        else:
            Fp8Linear.convert(module, context, power_of_two=last in AFTER_ATTENTION)
    if not converted:
        raise ValueError(f"nothing of this {type(model).__name__} can compute in FP8: it has no linear layers for it")
    for network in model.modules():
        if type(network) is SwiGLU and all(isinstance(projection, Fp8Linear) for projection in network.children()):
            Fp8SwiGLU.convert(network)
    parameters = sum(p.numel() for name in converted for p in found[name].parameters())
    stacks = {name for name, module in model.named_modules() if any(p.dim() == 3 for p in module.parameters(False))}
    others = (found.keys() | stacks) - set(converted)
    kept = [name for name, _ in model.named_modules() if name in others]
    return Conversion(converted, kept, parameters)


@contextmanager
def in_high_precision(model: nn.Module) -> Iterator[None]:
    """Within it a converted model computes as it did before."""
    kinds = {module: type(module) for module in model.modules() if type(module) in PLAIN}
    for module, kind in kinds.items():
        module.__class__ = PLAIN[kind]
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


def _layers(model: nn.Module) -> dict[str, nn.Linear | Experts]:
    """Its linear layers and experts by name, without the small ones that make up an adapter."""
    modules = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Experts)}
    adapted = tuple(name.removesuffix(BESIDE_ADAPTER) + "." for name in modules if name.endswith(BESIDE_ADAPTER))
    return {n: module for n, module in modules.items() if n.endswith(BESIDE_ADAPTER) or not n.startswith(adapted)}


def _output_head(model: Any) -> nn.Module | None:
    found = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = found() if found is not None else None
    return head
