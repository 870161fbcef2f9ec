"""Models in FP8 that are sampled from: sampler and trainer multiply and round alike."""

from __future__ import annotations

import pytest
import torch
from test_fp8_modules import small
from tiny_models import documents, token_lists, tokenizer
from torch import nn

import model.mla
from model import MoEForCausalLM
from model.fp8 import Fp8Linear
from model.fp8.convert import to_fp8
from rl.objective import mismatch
from rl.policy.moe import ExpertTraining
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.recipe import RLMoESpec
from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.prepacked import prepacked


def sampled(moe: MoEForCausalLM) -> list[tuple[Document, list[float]]]:
    """Completions with the experts that each token met, and the sampler's log-probabilities."""
    sampler = LocalSampler(moe.eval(), tokenizer(eos=None), record_routing=True)
    prompts = token_lists([9, 4, 17], vocabulary=512)
    found = sampler.generate(prompts, SamplingParams(n=2, max_tokens=12, seed=0))
    return [
        (Document(prompt, s.token_ids, group=g, routed=torch.from_numpy(s.routed_experts)), s.logprobs)
        for g, (prompt, rows) in enumerate(zip(prompts, found, strict=True))
        for s in rows
    ]


@torch.no_grad()
def mismatch_of(trainer: MoEForCausalLM, samples: list[tuple[Document, list[float]]]) -> dict[str, float]:
    policy = Policy(trainer, experts=ExpertTraining(trainer, RLMoESpec(), 1))  # which meets the sampler's experts
    (pack,) = policy.pack([document for document, _ in samples], 10_000)
    logp, _ = policy.logprobs(pack)
    return {k: float(v) for k, v in mismatch(logp, pack.gather([logps for _, logps in samples])).items()}


def fp8_model(**settings) -> MoEForCausalLM:
    moe = small(num_nextn_predict_layers=1)
    to_fp8(moe, **settings)
    return moe


def test_decoding_multiplies_as_training_does(monkeypatch):
    """The absorbed form of attention does not pass through kv_b_proj, yet meets its rounded weights and latents."""
    moe = fp8_model()
    agreeing = mismatch_of(moe, sampled(moe))
    assert agreeing["max"] < 0.02
    monkeypatch.setattr(model.mla, "multiplied_weight", lambda linear: linear.weight)
    monkeypatch.setattr(model.mla, "multiplied_input", lambda linear, x: x)
    apart = mismatch_of(moe, sampled(moe))
    assert apart["max"] > 3 * agreeing["max"] and apart["k3"] > 3 * agreeing["k3"]


def test_a_sampler_with_exported_weights_rounds_as_the_trainer_does():
    """Masters are float32, exported weights bfloat16: the trainer quantises what it exports. Quantising the masters
    instead rounds some weights to other neighbours."""
    found = {}
    for rounding in (torch.bfloat16, None):
        trainer, remote = small(), small(seed=1)
        in_fp8 = to_fp8(trainer, weight_rounding=rounding).converted
        to_fp8(remote, weight_rounding=rounding)
        with torch.no_grad():  # what is not in FP8 is the same on both sides
            for name, tensor in trainer.state_dict().items():
                if not name.endswith("bias") and not any(name.startswith(f"{layer}.") for layer in in_fp8):
                    tensor.copy_(tensor.bfloat16())
        export = {n: t if n.endswith("bias") else t.bfloat16() for n, t in trainer.state_dict().items()}
        LocalSampler(remote, tokenizer(eos=None)).update_weights(export.items(), 1)
        found[rounding] = mismatch_of(trainer, sampled(remote))
    with_rule, without = found[torch.bfloat16], found[None]
    assert with_rule["max"] < 0.02
    assert without["k3"] > 3 * with_rule["k3"]


def test_prepacked_weights_do_not_stand_in_for_fp8():
    moe = fp8_model().bfloat16()
    with prepacked(moe, 4):
        packed = [name for name, m in moe.named_modules() if isinstance(m, nn.Linear) and "forward" in vars(m)]
    assert not any(isinstance(moe.get_submodule(name), Fp8Linear) for name in packed)


def test_new_weights_are_sampled_from():
    moe = fp8_model()
    first = sampled(moe)
    other = small(seed=1, num_nextn_predict_layers=1)
    LocalSampler(moe, tokenizer(eos=None)).update_weights(other.state_dict().items(), 1)
    to_fp8(other)
    assert [s[1] for s in sampled(moe)] == [s[1] for s in sampled(other)] != [s[1] for s in first]


def test_packs_and_single_documents_agree():
    """What each token's row becomes does not depend on its neighbours."""
    policy = Policy(fp8_model())
    assert policy.check_packing(tolerance=0.02) < 0.02 and policy.packed
    batch = [d for d in documents(vocabulary=512) if len(d) > 2]
    values = []
    for budget in (20, 10_000):
        found = {}
        for pack in policy.pack(batch, budget):
            with torch.no_grad():
                logp, _ = policy.logprobs(pack)
            found.update(zip(zip(pack.sequence_P.tolist(), pack.offset_P.tolist(), strict=True), logp, strict=True))
        values.append([float(found[key]) for key in sorted(found)])
    assert values[0] == pytest.approx(values[1], abs=0.02)
