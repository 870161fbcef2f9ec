"""SwiGLUs, experts and whole models in FP8: against float64 of the rounded tensors and against bfloat16."""

from __future__ import annotations

import copy

import fp8_reference as want
import pytest
import torch
from fp8_reference import kept_for_backward
from test_fp8_linear import error, run, seeded
from test_moe_training import TINY
from tiny_models import tiny_model
from tiny_moe import model_of, token_ids
from torch import nn
from torch.autograd import gradcheck
from transformers import AutoConfig, AutoModelForCausalLM

from model import MoEForCausalLM
from model.experts import Experts
from model.fp8 import Fp8Linear
from model.fp8.convert import in_high_precision, to_fp8
from model.fp8.feed_forward import Fp8Experts, Fp8SwiGLU
from model.moe import SwiGLU
from rl.policy.lora import add_adapters
from rl.recipe_model import LoRASpec


def small(**changes) -> MoEForCausalLM:
    """Three layers of 32 channels; the units above whole models are tested at more."""
    return model_of(**{**TINY, **changes})


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(seeded(*parameter.shape, seed=10 + i) * parameter.shape[-1] ** -0.5)
    return module.to(dtype)


def fp8_swiglu(channels: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> SwiGLU:
    network = filled(SwiGLU(channels, inner), dtype)
    to_fp8(network)
    assert type(network) is Fp8SwiGLU
    return network


class Routed(nn.Module):
    """Experts with the routing of one batch, as a module of one input. Its weights are trained, as a gate's are."""

    def __init__(self, experts: Experts, index_TK: torch.Tensor, weight_TK: torch.Tensor):
        super().__init__()
        self.experts, self.index, self.weight = experts, index_TK, nn.Parameter(weight_TK)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.index, self.weight)


def routed(tokens: int, experts: int, k: int, channels: int, inner: int, dtype: torch.dtype) -> Routed:
    """Expert 1 sees no token, expert 0 every one."""
    generator = torch.Generator().manual_seed(0)
    others = [torch.randperm(experts - 2, generator=generator)[: k - 1] + 2 for _ in range(tokens)]
    index = torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), other]) for other in others])
    weight = torch.rand(tokens, k, generator=generator)
    return Routed(filled(Experts(experts, channels, inner), dtype), index, weight)


@pytest.mark.parametrize("inner", [128, 40, 200])
def test_swiglu_is_that_of_the_rounded_tensors(inner):
    network = fp8_swiglu(96, inner, torch.float32)
    x, dy = seeded(200, 96, dtype=torch.float32), 1e-6 * seeded(200, 96, seed=3, dtype=torch.float32)
    y, dx, d_gate, d_up, d_down = run(network, x, dy)
    gate, up, down = (p.detach() for p in network.parameters())
    if inner % 128:  # no block has rows of both
        gate, up = (torch.nn.functional.pad(w, (0, 0, 0, -inner % 128)) for w in (gate, up))
        down = torch.nn.functional.pad(down, (0, -inner % 128))
    want_y, want_dx, d_gate_up, want_down, _ = want.network(x, torch.cat([gate, up]), down, dy)
    want_gate, want_up = (half[:inner] for half in d_gate_up.chunk(2))
    expected = want_y, want_dx, want_gate, want_up, want_down[:, :inner]
    # A sum that differs in its last bits can round to the next value of E4M3.
    for got, exact in zip((y, dx, d_gate, d_up, d_down), expected, strict=True):
        assert error(got, exact) < 1e-3


@pytest.mark.parametrize("kind", ["swiglu", "experts"])
def test_no_tokens_at_all(kind):
    if kind == "swiglu":
        network = fp8_swiglu(96, 40)
    else:
        network = Routed(filled(Experts(4, 96, 40), torch.bfloat16), torch.zeros(0, 2).long(), torch.zeros(0, 2))
        to_fp8(network)
    empty = torch.empty(0, 96, dtype=torch.bfloat16)
    y, dx, *gradients = run(network, empty, empty)
    assert y.shape == dx.shape == (0, 96)
    assert len(gradients) == len(list(network.parameters())) and not any(g.any() for g in gradients)


def test_a_swiglu_is_one_expert_with_weight_one():
    """Where all scales are powers of two anyway: 448 in every tile of the input and of the gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        network = fp8_swiglu(128, 256, dtype)
        experts = Experts(1, 128, 256).to(dtype)
        with torch.no_grad():
            gate, up, down = network.parameters()
            experts.gate_up_proj.copy_(torch.cat([gate, up]))
            experts.down_proj.copy_(down)
        routed = Routed(experts, torch.zeros(128, 1, dtype=torch.long), torch.ones(128, 1))
        to_fp8(routed)
        x, dy = (seeded(128, 128, seed=i, dtype=dtype).clamp(-400, 400) for i in (0, 3))
        x.fill_diagonal_(448), dy.fill_diagonal_(448)
        y, dx, d_gate, d_up, d_down = run(network, x, dy)
        routed_y, routed_dx, _, d_gate_up, routed_down = run(routed, x, dy)
        assert torch.equal(y, routed_y) and torch.equal(d_down, routed_down[0])
        assert torch.equal(torch.cat([d_gate, d_up]), d_gate_up[0])
        # The expert's is one sum; the network's are two, each rounded to the type.
        assert error(dx, routed_dx) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("channels, inner", [(96, 128), (130, 40)])
def test_experts_are_those_of_the_rounded_tensors(channels, inner):
    tokens, count, k = 150, 6, 3
    module = routed(tokens, count, k, channels, inner, torch.float32)
    to_fp8(module)
    assert type(module.experts) is Fp8Experts
    x, dy = seeded(tokens, channels, dtype=torch.float32), seeded(tokens, channels, seed=3, dtype=torch.float32)
    y, dx, d_weight, d_gate_up, d_down = run(module, x, dy)
    want_weight = torch.zeros(tokens, k, dtype=torch.float64)
    want_y, want_dx = (torch.zeros(tokens, channels, dtype=torch.float64) for _ in range(2))
    for expert in range(count):
        token, slot = (module.index == expert).nonzero(as_tuple=True)
        if not len(token):
            assert expert == 1 and not d_gate_up[expert].any() and not d_down[expert].any()
            continue
        weight = module.weight[token, slot].detach()
        parameters = module.experts.gate_up_proj[expert].detach(), module.experts.down_proj[expert].detach()
        part = want.network(x[token], *parameters, dy[token], weight=weight)
        want_y.index_add_(0, token, part[0])
        want_dx.index_add_(0, token, part[1])
        want_weight[token, slot] = part[4]
        # A sum that differs in its last bits can round to the next value of E4M3.
        assert error(d_gate_up[expert], part[2]) < 1e-3 and error(d_down[expert], part[3]) < 1e-3
    assert error(y, want_y) < 1e-3 and error(dx, want_dx) < 1e-3 and error(d_weight, want_weight) < 1e-3


def test_gradcheck_of_a_fake_quantised_network():
    """Every rounding a constant error with gradient 1; the FP8 network adds roundings of gradients to these."""
    x, gate_up, down, dy = (
        seeded(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(5, 6), (8, 6), (6, 4), (5, 6)])
    )
    inputs = [t.requires_grad_() for t in (x, gate_up, down)]
    with torch.no_grad():
        errors = [want.rounded(x) - x, want.rounded_weight(gate_up) - gate_up, want.rounded_weight(down) - down]
        hidden = (x + errors[0]) @ (gate_up + errors[1]).mT
        inner = want._swiglu(hidden)
        errors.append(want.rounded(inner) - inner)

    def f(x, gate_up, down):
        x, gate_up, down = map(want.straight_through, (x, gate_up, down), errors[:3])
        return want.straight_through(want._swiglu(x @ gate_up.mT), errors[3]) @ down.mT

    assert gradcheck(f, inputs)
    exact = want.network(x.detach(), gate_up.detach(), down.detach(), dy)[:4]
    found = [f(*inputs), *torch.autograd.grad(f(*inputs), inputs, dy)]
    assert error(found[0], exact[0]) < 1e-6
    assert all(error(a, b) < 0.15 for a, b in zip(found[1:], exact[1:], strict=True))


@pytest.mark.parametrize("kind", ["swiglu", "experts"])
def test_errors_against_bfloat16(kind):
    """Three products and a non-linearity: see the table in docs/fp8_training.md."""
    dtype = torch.bfloat16
    plain = filled(SwiGLU(256, 256), dtype) if kind == "swiglu" else routed(300, 8, 4, 256, 128, dtype)
    fp8 = copy.deepcopy(plain)
    to_fp8(fp8)
    x, dy = seeded(300, 256), seeded(300, 256, seed=3)
    for got, expected in zip(run(fp8, x, dy), run(plain, x, dy), strict=True):
        assert 0.02 < error(got, expected) < 0.12


def test_gate_and_up_are_kept_in_fp8_and_nothing_behind_them():
    network = fp8_swiglu(128, 256)
    tokens, byte = 256, 1 + 4 / 128
    with kept_for_backward(network) as kept:
        network(seeded(tokens, 128).requires_grad_())
    assert sum(kept.values()) == tokens * (128 + 2 * 256) * byte


def test_experts_keep_their_input_once_however_many_meet_a_token():
    tokens, k, channels, inner, byte = 256, 4, 128, 128, 1 + 4 / 128
    module = routed(tokens, 8, k, channels, inner, torch.bfloat16)
    to_fp8(module)
    with kept_for_backward(module) as kept:
        module(seeded(tokens, channels).requires_grad_())
    indices = tokens * k * 8 + 8 * 4  # where the rows come from, and the experts' ends
    assert sum(kept.values()) - indices == tokens * (channels + k * 2 * inner) * byte


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gates_gradient_is_that_of_unrounded_experts(dtype):
    """A weight's gradient is <dy, y_k>, here from the inner activation that is computed again."""
    plain = routed(300, 8, 4, 256, 128, torch.float64)
    fp8 = copy.deepcopy(plain)
    fp8.experts.to(dtype)
    to_fp8(fp8)
    x, dy = seeded(300, 256), seeded(300, 256, seed=3)
    expected = run(plain, x.double(), dy.double())[2]
    got = run(fp8, x.to(dtype), dy.to(dtype))[2]
    assert got.dtype == torch.float32 and 0.01 < error(got, expected) < 0.08


# ---- whole models --------------------------------------------------------------------------------------


def test_what_of_our_mixture_of_experts_is_converted():
    moe = model_of(num_nextn_predict_layers=1)
    before = {name: id(p) for name, p in moe.named_parameters()}
    found = to_fp8(moe)
    assert {name: id(p) for name, p in moe.named_parameters()} == before
    depth = moe.config.num_hidden_layers
    assert set(found.kept) == {"lm_head", f"model.layers.{depth}.eh_proj"}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    for i, layer in enumerate(moe.model.layers):
        assert {n for n in attention if f"model.layers.{i}.self_attn.{n}" in found.converted} == attention
        powers = {n for n, m in layer.named_modules() if isinstance(m, Fp8Linear) and m.power_of_two}
        assert powers == {"self_attn.o_proj"}
        dense = layer.mlp if i == 0 else layer.mlp.shared_experts
        assert type(dense) is Fp8SwiGLU and (i == 0 or type(layer.mlp.experts) is Fp8Experts)
    high = {n for n, _ in moe.named_parameters() if not n.startswith(tuple(f"{c}." for c in found.converted))}
    assert {n.split(".")[-2] for n in high if "norm" not in n} == {"embed_tokens", "lm_head", "eh_proj", "gate"}
    assert found.parameters == sum(p.numel() for n, p in moe.named_parameters() if n not in high)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_models_of_transformers(family):
    """Tied heads and routers stay; gradients are those of bfloat16 up to rounding."""
    plain = tiny_model(family).bfloat16()
    fp8 = copy.deepcopy(plain)
    found = to_fp8(fp8, skip=["*.layers.0.*"])
    assert type(fp8.get_output_embeddings()) is nn.Linear
    assert not any(n.split(".")[-1] == "gate" for n in found.converted)
    assert any(n.startswith("model.layers.1.") for n in found.converted)
    assert any(n.startswith("model.layers.0.") for n in found.kept)
    assert ("model.layers.1.mlp.experts" in found.kept) == (family == "mixtral")
    assert fp8.state_dict().keys() == plain.state_dict().keys()
    ids = token_ids(2, 20) % 101
    gradients = []
    for candidate in (plain, fp8):
        candidate(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in candidate.parameters() if p.grad is not None]))
    assert 0.001 < error(gradients[1], gradients[0]) < 0.3


@pytest.mark.parametrize(("family", "router"), [("jetmoe", "mlp.router.layer"), ("mixtral", None)])
def test_no_part_of_a_router_is_in_fp8(family, router):
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    with torch.device("meta"):
        moe = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    found = to_fp8(moe)
    assert not any({"gate", "router"} & set(name.split(".")) for name in found.converted)
    assert router is None or f"model.layers.0.{router}" in found.kept


def test_for_a_while_a_converted_model_is_what_it_was():
    plain, fp8 = small(), small()
    to_fp8(fp8)
    ids = token_ids(1, 9)
    rounded, expected = fp8(ids).logits, plain(ids).logits
    with in_high_precision(fp8):
        assert torch.equal(fp8(ids).logits, expected)
    assert torch.equal(fp8(ids).logits, rounded) and not torch.equal(rounded, expected)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match=r"'\*\.w_proj' in skip names no linear layer of this model; it has model.la"):
        to_fp8(model_of(), skip=["*.w_proj"])
    with pytest.raises(ValueError, match="nothing of this Sequential can compute in FP8"):
        to_fp8(nn.Sequential(nn.Embedding(3, 4)))
    with pytest.raises(ValueError, match="'tritn' is not one of auto"):
        to_fp8(model_of(), backend="tritn")
    skipped = model_of()
    to_fp8(skipped, skip=["*.up_proj"])
    assert type(skipped.model.layers[0].mlp) is SwiGLU  # one of its projections is not in FP8


def test_checkpoints_are_those_of_plain_weights(tmp_path):
    plain, fp8 = model_of(), model_of()
    to_fp8(fp8)
    fp8(token_ids(1, 9))  # quantised copies are in no checkpoint
    fp8.save_pretrained(tmp_path)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert fp8.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in again.state_dict().items())


def test_recomputed_layers_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        moe = small(num_nextn_predict_layers=1, seq_aux_alpha=0.01).train()
        to_fp8(moe)
        if checkpointing:
            getattr(moe, "activation_checkpointing_enable", moe.gradient_checkpointing_enable)({"use_reentrant": False})
        moe(token_ids(2, 40), labels=token_ids(2, 40)).loss.backward()
        gradients.append([p.grad for p in moe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_networks_keep_a_third_of_what_they_keep_in_bfloat16():
    """Inputs, gate, up, silu(gate) and their product, 2 bytes each; experts all of that for each of a token's."""
    dtype = torch.bfloat16
    for plain, bound in ((filled(SwiGLU(128, 256), dtype), 0.35), (routed(256, 8, 4, 128, 128, dtype), 0.45)):
        fp8 = copy.deepcopy(plain)
        to_fp8(fp8)
        kept = []
        for module in (plain, fp8):
            with kept_for_backward(module) as found:
                module(seeded(256, 128).requires_grad_())
            kept.append(sum(found.values()))
        assert kept[1] < bound * kept[0]


def test_layers_beside_adapters_are_treated_as_without():
    """By the layer's own name: heads stay as they are, and what comes out of attention has scales of powers of two."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    adapted = tiny_model("llama", layers=1)
    add_adapters(adapted, LoRASpec(r=2), seed=0)
    found = to_fp8(adapted)
    assert "model.layers.0.self_attn.o_proj.base_layer" in found.converted and "lm_head" in found.kept
    powers = {name for name, m in adapted.named_modules() if isinstance(m, Fp8Linear) and m.power_of_two}
    assert powers == {"model.layers.0.self_attn.o_proj.base_layer"}


def test_adapters_are_not_in_fp8_and_names_in_skip_are_the_models_own():
    pytest.importorskip("peft", reason="PEFT is not installed")
    plain, adapted = tiny_model("llama", layers=2), tiny_model("llama", layers=2)
    add_adapters(adapted, LoRASpec(r=2), seed=0)
    wanted, found = (to_fp8(model, skip=["*.q_proj", "model.layers.1.*"]) for model in (plain, adapted))
    assert [name.removesuffix(".base_layer") for name in found.converted] == wanted.converted
    assert found.parameters == wanted.parameters and len(found.kept) == len(wanted.kept)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert {type(adapted.get_submodule(name.removesuffix(".weight"))) for name in trained} == {nn.Linear}
    again = tiny_model("llama", layers=1)
    add_adapters(again, LoRASpec(r=2), seed=0)
    with pytest.raises(ValueError, match=r"it has model.layers.0.self_attn.q_proj, model"):
        to_fp8(again, skip=["*.w_proj"])
