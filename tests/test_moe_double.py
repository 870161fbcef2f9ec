"""A model in float64: for gradient checks, and as a reference for the other types."""

from __future__ import annotations

import torch
from tiny_moe import model_of, relative, token_ids
from torch.func import functional_call

from model import MoEConfig
from model.moe import MixtureOfExperts, Routing


def test_a_model_runs_in_float64():
    """grouped_mm has no such kernel: the experts take the loop."""
    model = model_of().eval()
    ids = token_ids(2, 20)
    with torch.no_grad():
        single = model(ids).logits
        double = model.double()(ids).logits
    assert double.dtype == torch.float64
    assert 0 < relative(single.double(), double) < 1e-5


def test_gradients_of_experts_and_router():
    """Of the output and of the balance loss, by every weight and by the input."""
    config = MoEConfig.preset(
        "tiny", hidden_size=4, moe_intermediate_size=2, n_routed_experts=4, n_group=2, topk_group=2,
        num_experts_per_tok=2, seq_aux_alpha=1.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    mixture = MixtureOfExperts(config, layer_idx=1).double().train()
    values = {
        name: torch.randn(p.shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for name, p in mixture.named_parameters()
    }
    x = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)

    def outputs(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = Routing(torch.tensor([0, 0, 0, 1, 1]), documents=2)
        return functional_call(mixture, dict(zip(values, weights, strict=True)), (x, routing))

    assert all(out.dtype == torch.float64 for out in outputs(x, *values.values()))
    assert torch.autograd.gradcheck(outputs, (x, *values.values()))
