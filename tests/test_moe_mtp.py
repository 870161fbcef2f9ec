"""Multi-token prediction: which token each position predicts, against an independent computation, and what trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_moe import model_of, relative
from tiny_moe import token_ids as tokens

from model import MoEForCausalLM
from model.loss import IGNORED, cross_entropy
from model.mtp import ahead

TWO = {"num_nextn_predict_layers": 2, "mtp_loss_weight": 0.3}


def test_targets_at_boundaries_by_table():
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
    # Row 0: documents of 3 and 4 tokens. Row 1: one of 5, then padding.
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, -1, -1])
    x = IGNORED
    table = {
        1: [[2, 3, x, 5, 6, 7, x], [9, 10, 11, 12, x, x, x]],
        2: [[3, x, x, 6, 7, x, x], [10, 11, 12, x, x, x, x]],
        3: [[x, x, x, 7, x, x, x], [11, 12, x, x, x, x, x]],
        9: [[x] * 7, [x] * 7],
    }
    for offset, want in table.items():
        assert ahead(tokens, document, offset, fill=x).tolist() == want


def naive_losses(model: MoEForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """Equations 21 to 25 for one document: main loss, then each depth's."""
    decoder = model.model
    out = decoder(ids, use_cache=False, mtp=True)
    losses = [F.cross_entropy(model.lm_head(out.last_hidden_state)[0, :-1], ids[0, 1:])]
    for k, state in enumerate(out.mtp_hidden, start=1):
        losses.append(F.cross_entropy(model.lm_head(state)[0, : -k - 1], ids[0, k + 1 :]))
    return losses


def test_the_loss_is_the_main_one_plus_lambda_times_the_mean_over_depths():
    model = model_of(**TWO).train()
    ids = tokens(1, 23)
    out = model(ids, labels=ids)
    main, first, second = naive_losses(model, ids)
    assert float(out.mtp_loss) == pytest.approx(float((first + second) / 2), rel=1e-5)
    assert float(out.loss) == pytest.approx(float(main + 0.3 * (first + second) / 2), rel=1e-5)
    assert model.eval()(ids, labels=ids).mtp_loss is None


def test_a_module_sees_the_next_token_and_nothing_later():
    """Position i of depth k changes with token i+k, not with i+k+1."""
    model = model_of(**TWO).eval()
    ids = tokens(1, 12)

    def states(ids):
        with torch.no_grad():
            return model.model(ids, use_cache=False, mtp=True).mtp_hidden

    plain = states(ids)
    for k, want in enumerate(plain, start=1):
        changed = ids.clone()
        changed[0, 7] = (ids[0, 7] + 1) % 512
        got = states(changed)[k - 1]
        assert relative(got[:, : 7 - k], want[:, : 7 - k]) < 1e-6
        assert relative(got[:, 7 - k], want[:, 7 - k]) > 1e-3


def test_packed_documents_predict_as_separate_ones():
    model = model_of(**TWO).train()
    first, second = tokens(1, 9, seed=1), tokens(1, 14, seed=2)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    out = model(packed, labels=packed, position_ids=positions)
    want = [naive_losses(model, ids) for ids in (first, second)]
    means = []
    for k in range(3):  # the mean over both documents' positions that predict k+1 tokens ahead
        counts = [len(ids[0]) - k - 1 for ids in (first, second)]
        means.append(sum(float(losses[k]) * n for losses, n in zip(want, counts, strict=True)) / sum(counts))
    assert float(out.mtp_loss) == pytest.approx((means[1] + means[2]) / 2, rel=1e-5)
    assert float(out.loss) == pytest.approx(means[0] + 0.3 * (means[1] + means[2]) / 2, rel=1e-5)


def test_embedding_and_head_learn_from_both_and_only_what_should():
    """From the prediction loss alone every weight learns but the ones that only end the main model's path."""
    ids = tokens(2, 16)
    for hidden, untouched in (("after", set()), ("before", {"model.norm.weight"})):
        model = model_of(**TWO, mtp_hidden=hidden).train()
        model(ids, labels=ids).mtp_loss.backward()
        silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert silent == untouched
    # And the main loss alone reaches nothing of the modules.
    model = model_of(num_nextn_predict_layers=2, mtp_loss_weight=0.0).train()
    model(ids, labels=ids).loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {n for n, _ in model.named_parameters() if n.startswith(("model.layers.4.", "model.layers.5."))}


def test_prediction_modules_survive_saving(tmp_path):
    model = model_of(**TWO).train()
    model.save_pretrained(tmp_path)
    back, info = MoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    ids = tokens(2, 10)
    assert torch.equal(back.train()(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_recomputation_and_counts_include_the_modules():
    ids = tokens(2, 10)
    gradients = []
    for checkpointing in (False, True):
        model = model_of(**TWO, seq_aux_alpha=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert [int(load.sum()) for load in model.model.load_LE] == [0, 80, 80, 80, 80, 80]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_cross_entropy(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, requires_grad=True) for n in (8, 11))
    target = torch.tensor([3, IGNORED, 0, 10, IGNORED, 5, 5, 1])
    want = F.cross_entropy(hidden @ weight.t(), target, ignore_index=IGNORED)
    expected = torch.autograd.grad(want, (hidden, weight))
    got = cross_entropy(hidden, weight, target, chunk)
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    nothing = cross_entropy(hidden, weight, torch.full((8,), IGNORED), chunk)
    assert float(nothing) == 0
