"""Prepacked weights give the same products, and leave the model as it was."""

import pytest
import torch
from tiny_models import EOS, tiny_model, token_lists, tokenizer

from rl.rollout import LocalSampler, SamplingParams, prepacked
from rl.rollout.prepacked import prepacked as prepacking

needs_onednn = pytest.mark.skipif(not prepacked._available(), reason="no oneDNN bfloat16 on this processor")


def linear_layers(model) -> list[torch.nn.Linear]:
    return [m for m in model.modules() if type(m) is torch.nn.Linear]


@needs_onednn
def test_products_are_bit_identical():
    torch.manual_seed(0)
    for outputs, inputs, bias in ((48, 32, True), (576, 1536, False), (7, 5, True)):
        layer = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
        for rows in (1, 3, 8, 9, 40):  # at, below and above the number of rows that it is packed for
            x = torch.randn(1, rows, inputs, dtype=torch.bfloat16)
            with torch.inference_mode():
                want = layer(x)
                with prepacking(layer, rows=8):
                    assert "forward" in vars(layer)
                    got = layer(x)
            assert torch.equal(got, want)


@needs_onednn
def test_sampling_is_the_same_and_sees_new_weights(monkeypatch):
    """Also after an update of the weights: nothing packed outlives a call."""
    model = tiny_model("qwen2").to(torch.bfloat16)
    sampler = LocalSampler(model, tokenizer(EOS), max_slots=4)
    prompts, params = token_lists([3, 9, 1, 6, 4]), SamplingParams(n=2, max_tokens=12, seed=3)

    def sample():
        return [(s.token_ids, s.logprobs) for row in sampler.generate(prompts, params) for s in row]

    first = sample()
    assert all("forward" not in vars(layer) for layer in linear_layers(model))
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    second = sample()
    assert second != first
    monkeypatch.setattr(prepacked, "_available", lambda: False)
    assert sample() == second


def test_only_plain_bfloat16_layers_are_packed():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(Scaled(4, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 4), torch.nn.ReLU())
    with prepacking(model, rows=2):
        assert all("forward" not in vars(module) for module in model)


def test_layers_are_restored_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ZeroDivisionError), prepacking(model, rows=2):
        raise ZeroDivisionError
    assert "forward" not in vars(model[0])
