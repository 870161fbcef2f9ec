"""Routing, balancing and the sequence-wise loss: hand-made cases and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_moe import gradients_with_and_without_recomputation, model_of, token_ids

from model import balance
from model.router import affinities, choose_experts, gate_weights, loads, sequence_balance, updated_bias


def choose(s, bias=None, *, k=2, groups=1, kept=1, method="noaux_tc") -> list[set[int]]:
    s = torch.tensor(s, dtype=torch.float32)
    bias = torch.zeros(s.shape[-1]) if bias is None else torch.tensor(bias, dtype=torch.float32)
    index = choose_experts(s, bias, k=k, groups=groups, kept_groups=kept, method=method)
    return [set(row) for row in index.tolist()]


def test_groups_are_limited_by_the_sum_of_their_two_best():
    # The best expert (0.9) stands in a group whose two best sum to less than the others'.
    s = [[0.9, 0.1, 0.0, 0.6, 0.5, 0.0, 0.55, 0.5, 0.0]]
    assert choose(s, groups=3, kept=2, k=3) == [{3, 4, 6}]
    assert choose(s, groups=3, kept=2, k=3, method="group_limited_greedy") == [{0, 3, 4}]
    assert choose(s, groups=3, kept=2, k=3, method="greedy") == [{0, 3, 6}]


def test_negative_choices_do_not_let_other_groups_in():
    """With a 0 for what is not allowed, experts 0 and 1 would win over the kept group's negative choices."""
    s = [[0.1, 0.1, 0.2, 0.3]]
    assert choose(s, [-2.0, -2.0, -1.0, -1.0], groups=2, kept=1) == [{2, 3}]


def test_the_bias_changes_the_choice_and_never_the_weights():
    s = torch.tensor([[0.8, 0.4, 0.2, 0.1]])
    assert choose(s.tolist()) == [{0, 1}]
    assert choose(s.tolist(), [-1.0, 0.0, 0.0, 0.5]) == [{1, 3}]
    index = torch.tensor([[1, 3]])
    assert torch.allclose(gate_weights(s, index, normalise=True, scale=2.5), 2.5 * torch.tensor([[0.8, 0.2]]))
    assert torch.allclose(gate_weights(s, index, normalise=False, scale=2.0), torch.tensor([[0.8, 0.2]]))


def test_ties_choose_different_experts():
    assert all(len(row) == 3 for row in choose([[0.5] * 8] * 4, k=3, groups=4, kept=2))


def test_affinities_are_of_float32_products():
    x, w = torch.randn(5, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    exact = x.double() @ w.double().t()
    assert (affinities(x, w, "sigmoid") - exact.sigmoid()).abs().max() < 1e-5
    assert (affinities(x, w, "softmax") - exact.softmax(-1)).abs().max() < 1e-5


def test_bias_update():
    assert updated_bias(torch.zeros(4), torch.tensor([10, 2, 6, 6]), 0.001).tolist() == pytest.approx(
        [-0.001, 0.001, 0, 0]
    )


def test_every_token_counts_k_times_once():
    """Also with recomputed activations, with accumulation, and without padding; never in evaluation."""
    model = model_of().train()
    batch = token_ids(4, 12, seed=0)
    model(batch, labels=batch).loss.backward()
    once = balance.take_loads(model)
    assert set(once) == {1, 2, 3} and all(int(load.sum()) == 48 * 4 for load in once.values())
    assert all(int(load.sum()) == 0 for load in balance.take_loads(model).values())

    for part in batch.split(1):  # accumulation
        model(part, labels=part).loss.backward()
    assert all(torch.equal(load, once[layer]) for layer, load in balance.take_loads(model).items())

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(batch, labels=batch).loss.backward()
    assert all(torch.equal(load, once[layer]) for layer, load in balance.take_loads(model).items())

    padding = torch.ones(4, 12, dtype=torch.long)
    padding[:, 9:] = 0
    model(batch, attention_mask=padding)
    assert all(int(load.sum()) == 36 * 4 for load in balance.take_loads(model).values())
    model.eval()(batch)
    assert all(int(load.sum()) == 0 for load in balance.take_loads(model).values())


def test_recomputation_gives_the_same_gradients_and_routing():
    batch = token_ids(2, 20, seed=1)
    gradients = gradients_with_and_without_recomputation(batch, seq_aux_alpha=0.1)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_replayed_routing():
    """The recorded experts are used whatever the weights now say; the weights are live, so gradients reach the gate."""
    model = model_of().train()
    batch = token_ids(1, 16, seed=2)
    recorded = model(batch).routing
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.weight.neg_()
    assert any(not torch.equal(a, recorded[i]) for i, a in model(batch).routing.items())
    out = model(batch, labels=batch, routing=recorded)
    assert all(torch.equal(a, recorded[i]) for i, a in out.routing.items())
    out.loss.backward()
    assert all(layer.mlp.gate.weight.grad.norm() > 0 for layer in model.model.layers[1:])


def test_bias_updates_balance_a_skewed_router():
    model = model_of().train()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias[:3] += 0.5
    batch = token_ids(8, 32, seed=3)
    worst = []
    for _ in range(120):
        with torch.no_grad():
            model(batch)
        found = balance.update_biases(model, 0.01)
        worst.append(max(v for name, v in found.items() if name.startswith("moe/max_over_mean")))
    assert worst[0] > 3 and worst[-1] < 1.6
    before = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers[1:]]
    model(batch)
    balance.update_biases(model, 0.0)
    after = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers[1:]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_metrics_of_known_loads():
    found = balance.metrics({2: torch.tensor([6, 2, 0, 0]), 3: torch.zeros(4, dtype=torch.long)})
    assert found.pop("moe/share/2") == [0.75, 0.25, 0.0, 0.0]
    assert found == pytest.approx(
        {
            "moe/max_over_mean/2": 3.0,
            "moe/busiest/2": 0.75,
            "moe/idlest/2": 0.0,
            "moe/load_entropy/2": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        }
    )


def test_router_entropy_is_that_of_each_real_token_once():
    """By hand from recorded affinities, with padding, under recomputation and over two forwards."""
    model = model_of().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    seen: dict[int, list[torch.Tensor]] = {}
    for layer in model.model.expert_layers:
        mixture = model.model.layers[layer].mlp
        mixture.register_forward_pre_hook(lambda m, a, layer=layer: seen.setdefault(layer, []).append(a[0].detach()))
    for _ in range(2):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    found = balance.update_biases(model, 0.0)
    real = mask.flatten().bool()
    for layer in model.model.expert_layers:
        s = (seen[layer][0] @ model.model.layers[layer].mlp.gate.weight.t()).sigmoid()[real]
        share = s / s.sum(-1, keepdim=True)
        expected = float(-(share * share.log()).sum(-1).mean())
        assert found[f"moe/router_entropy/{layer}"] == pytest.approx(expected, rel=1e-5)
    assert "moe/router_entropy/1" not in balance.update_biases(model, 0.0)


# ---- the sequence-wise loss --------------------------------------------------------------------------


def naive(s, index, document, documents, counts):
    """Equations 17 to 20, one sum at a time."""
    total = 0.0
    experts, k = s.shape[1], index.shape[1]
    for d in range(documents):
        tokens = [t for t in range(len(s)) if document[t] == d]
        for i in range(experts):
            chosen = index if counts == "routed" else s.topk(k, -1).indices
            f = experts / (k * len(tokens)) * sum(i in chosen[t].tolist() for t in tokens)
            total += f * sum(float(s[t, i] / s[t].sum()) for t in tokens) / len(tokens)
    return total


@pytest.mark.parametrize("counts", ["affinity", "routed"])
def test_sequence_balance_is_the_sum_of_the_report(counts):
    generator = torch.Generator().manual_seed(0)
    s = torch.rand(14, 8, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(14)])
    document = torch.tensor([0] * 5 + [1] * 2 + [-1] * 3 + [2] * 4)
    got = sequence_balance(s, index, document, 3, counts=counts)
    assert float(got) == pytest.approx(naive(s, index, document.tolist(), 3, counts))


def test_uniform_routing_gives_exactly_one_a_document():
    s = torch.full((8, 8), 0.5, dtype=torch.float64)
    index = torch.arange(16).view(8, 2) % 8  # each expert twice
    assert float(sequence_balance(s, index, torch.zeros(8, dtype=torch.long), 1, counts="routed")) == pytest.approx(
        1, abs=1e-15
    )


def test_sequence_balance_gradient():
    generator = torch.Generator().manual_seed(1)
    s = torch.rand(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(6)])
    document = torch.tensor([0, 0, 0, 1, 1, -1])
    assert torch.autograd.gradcheck(lambda x: sequence_balance(x, index, document, 2, counts="routed"), (s,))


def test_the_loss_holds_alpha_times_the_balance_of_every_layer():
    """Per document, so packing changes nothing; the mean over documents."""
    model = model_of(seq_aux_alpha=0.25, seq_aux_counts="routed").train()
    plain = model_of(seq_aux_alpha=0.0).train()
    batch = token_ids(2, 10, seed=4)
    ours, theirs = model(batch, labels=batch), plain(batch, labels=batch)
    assert float(ours.loss - theirs.loss) == pytest.approx(float(ours.balance_loss), abs=1e-5)
    packed = model(batch.view(1, 20), position_ids=torch.arange(10).repeat(2)[None])
    assert float(packed.balance_loss) == pytest.approx(float(ours.balance_loss), abs=1e-6)
    assert float(model.eval()(batch).balance_loss) == 0
    assert loads(torch.tensor([[0, 2], [2, 1]]), 4).tolist() == [1, 1, 2, 0]
