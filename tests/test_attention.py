"""The attention function: what it passes on, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import documents, tiny_model

from rl.policy.attention import attend, packed_attention
from rl.policy.policy import Policy


class Module(torch.nn.Module):
    layer_idx = 0


class Layout:
    """Records what it is asked; returns the queries."""

    def attend(self, layer, q_HTD, k_GTD, v_GTD, options):
        self.asked = (layer, q_HTD.shape, k_GTD.shape, v_GTD.shape, options)
        return q_HTD


def test_attention_passes_on_what_the_architecture_asks():
    layout, q, k = Layout(), torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    out, weights = attend(Module(), q, k, k, layout=layout, scaling=0.3, sliding_window=7, softcap=2.0)
    assert out.shape == (1, 5, 4, 8) and weights is None
    assert torch.equal(out, q.transpose(1, 2))
    layer, *shapes, options = layout.asked
    assert (layer, shapes) == (0, [(4, 5, 8), (2, 5, 8), (2, 5, 8)])
    assert (options.scale, options.window, options.softcap) == (0.3, 7, 2.0)
    attend(Module(), q, k, k, layout=layout)
    assert layout.asked[-1].scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"layout": None}, "needs a layout"),
        ({"attention_mask": torch.ones(1, 5)}, "no attention_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not plain causal"),
        ({"s_aux": torch.zeros(4)}, "not plain causal"),
        ({"position_bias": torch.zeros(4)}, "not plain causal"),
    ],
)
def test_attention_refuses_what_it_would_have_to_ignore(wrong, message):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        attend(Module(), q, q, q, **{"layout": Layout(), **wrong})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_dropout_is_without_effect_or_refused(checkpointing):
    """A model left in training mode: the policy that is trained must be the one that was sampled from."""
    model = tiny_model("llama", attention_dropout=0.5)
    policy = Policy(model)
    (batch,) = policy.pack(documents()[:2], 1000)
    want, _ = policy.logprobs(batch)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        got, _ = policy.logprobs(batch)
    except ValueError as error:
        assert "dropout" in str(error)
    else:
        assert torch.allclose(got, want, atol=1e-5)


def test_packed_attention_restores_the_model_even_after_an_error():
    model = tiny_model("llama", attention="sdpa")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids, use_cache=False).logits
    with pytest.raises(ValueError, match="needs a layout"), packed_attention(model):
        model(input_ids=ids, use_cache=False)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
