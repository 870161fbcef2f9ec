"""Tiny mixtures of experts and their inputs, for the tests of `model/`."""

from __future__ import annotations

import torch

from model import MoEConfig, MoEForCausalLM


def model_of(seed: int = 0, **changes) -> MoEForCausalLM:
    """Random weights, norms and biases, so that nothing is hidden by ones and zeros."""
    config = MoEConfig.preset("tiny", **{"num_nextn_predict_layers": 0, "seq_aux_alpha": 0.0, **changes})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = MoEForCausalLM(config)
        for _, tensor in sorted(model.state_dict().items()):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of the tiny preset's vocabulary."""
    return torch.randint(512, shape, generator=torch.Generator().manual_seed(seed))


def gradients_with_and_without_recomputation(ids: torch.Tensor, **changes) -> list[list[torch.Tensor]]:
    """Of every parameter: as computed plainly, and with activation checkpointing."""
    found = []
    for checkpointing in (False, True):
        model = model_of(**changes).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    return found
