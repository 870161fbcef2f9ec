"""Weights sent to samplers in FP8: the same bits as rounding what was sent in bfloat16, in half the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_workers import PROBE, process, served
from tiny_models import EOS, tiny_model, token_lists, tokenizer
from tiny_moe import model_of
from worker_threads import SECRET

from model.fp8 import Quantized
from model.fp8.blocks import quantize_blocks
from model.fp8.context import Fp8Module
from model.fp8.convert import to_fp8
from model.fp8.named import SCALE, fp8_weights, plain_weights, quantized_weights, restored
from recipes import SCRATCH, grpo, metrics
from rl.check_rollout import check_rollout, rollout_table
from rl.objective import mismatch
from rl.policy.load import load_model, load_tokenizer
from rl.policy.names import checkpoint_weights, in_fp8
from rl.policy.packing import Document
from rl.policy.policy import Policy
from rl.policy.processes import Processes
from rl.policy.replicated import Replicated
from rl.recipe import OptimizerSpec
from rl.recipe_io import RecipeError, validate
from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.local_engine import LocalEngine
from rl.rollout.starting import model_folder, write_starting_model
from rl.rollout.sync import probe_logprobs
from rl.rollout.types import Sample
from rl.rollout.workers.buckets import checksum, packed, staged_bytes
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.transfer import Spool
from rl.runner import run as run_recipe


def weight(*shape: int, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    """bfloat16, whose rows differ in size by up to 2^12, so that elements are rounded to subnormals and to zero too."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2.0 ** -torch.randint(0, 13, (*shape[:-1], 1), generator=generator)
    return (size * rows * torch.randn(shape, generator=generator)).bfloat16()


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 129), (3, 70, 260)])
@pytest.mark.parametrize("size", [1e4, 1.0, 1e-2, 3e-5, 1e-7])
def test_rounding_a_restored_weight_gives_the_same_bits(shape, size):
    values, scales = quantize_blocks(weight(*shape, size=size))
    again = quantize_blocks(restored(values, scales))
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8)) and torch.equal(again[1], scales)


def test_so_do_blocks_of_any_amax_below_and_around_the_floor():
    """Every bfloat16 from 2^-15 to 2^-12 as a block's largest element, beside all values of E4M3 times it."""
    tops = torch.arange(112 << 7, 115 << 7, dtype=torch.int16).view(torch.bfloat16)
    parts = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448
    for top in tops:
        block = torch.cat([(parts * top), -(parts * top)]).bfloat16()[None]
        values, scales = quantize_blocks(block)
        again = quantize_blocks(restored(values, scales))
        assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8)) and torch.equal(again[1], scales)


def test_a_weight_and_its_scales_come_in_any_order_and_belong_together():
    w = weight(130, 40)
    values, scales = quantize_blocks(w)
    norm, expected = torch.ones(3), restored(values, scales)
    for pairs in (
        [("a.weight", values), ("norm", norm), ("a.weight_scale_inv", scales)],
        [("norm", norm), ("a.weight_scale_inv", scales), ("a.weight", values)],
    ):
        got = dict(plain_weights(pairs))
        assert got.keys() == {"norm", "a.weight"} and got["norm"] is norm
        assert got["a.weight"].dtype == torch.bfloat16 and torch.equal(got["a.weight"], expected)
    with pytest.raises(ValueError, match="a.weight came without a.weight_scale_inv"):
        dict(plain_weights([("a.weight", values)]))
    with pytest.raises(ValueError, match="a.weight_scale_inv came without a.weight:"):
        dict(plain_weights([("a.weight_scale_inv", scales)]))


# ---- whole models --------------------------------------------------------------------------------------


def moe() -> Any:
    """Ragged blocks in every layer, and stacked gate and up projections of 2 x 40 rows."""
    return model_of(hidden_size=130, moe_intermediate_size=40, intermediate_size=200, num_hidden_layers=2)


def dense() -> Any:
    return tiny_model("llama", layers=2, hidden_size=144, intermediate_size=272)


def converted(model: Any) -> Any:
    to_fp8(model)
    return model


def quantized(model: Any) -> dict[str, Quantized]:
    """What the products of a converted model read."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Fp8Module):
            module.quantize_weights()
            copies = [value for value in vars(module).values() if hasattr(value, "transposed")]
            found |= {f"{name}.{number}": copy._copy for number, copy in enumerate(copies)}
    return found


def assert_same_bits(a: Any, b: Any) -> None:
    mine, theirs = quantized(a), quantized(b)
    assert mine.keys() == theirs.keys() and mine
    for name, copy in mine.items():
        assert torch.equal(copy.values.view(torch.uint8), theirs[name].values.view(torch.uint8)), name
        assert torch.equal(copy.scales, theirs[name].scales), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [moe, dense])
def test_a_sampler_that_got_fp8_has_the_weights_of_one_that_got_bfloat16(make, dtype):
    """And both those of the trainer; weights that no product reads in FP8 arrive as they are."""
    trainer = converted(make()).to(dtype)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.25)
    contexts = fp8_weights(trainer)
    samplers = []
    for names in ({}, contexts):
        engine = LocalEngine(LocalSampler(converted(make()).to(dtype), tokenizer(EOS)))
        engine.update_weights(quantized_weights(trainer.state_dict().items(), names), 1)
        samplers.append(engine.sampler.model)
        assert_same_bits(engine.sampler.model, trainer)
    for name, tensor in trainer.state_dict().items():
        assert torch.equal(samplers[0].state_dict()[name], tensor)
        assert torch.equal(samplers[1].state_dict()[name], tensor) == (name not in contexts)


@pytest.mark.parametrize("make", [moe, dense])
def test_what_is_sent_takes_half_the_bytes(make):
    trainer = converted(make()).bfloat16()
    contexts = fp8_weights(trainer)
    named = dict(trainer.state_dict())
    sent = dict(quantized_weights(named.items(), contexts))
    assert sent.keys() == named.keys() | {name + SCALE for name in contexts}
    count = sum(named[name].numel() for name in contexts)
    blocks = sum(sent[name + SCALE].numel() for name in contexts)
    saved = sum(t.nbytes for t in named.values()) - sum(t.nbytes for t in sent.values())
    assert saved == count - 4 * blocks and saved > 0.9 * count
    arrived: dict[str, torch.Tensor] = {}
    for _, data in packed(sent.items(), 50_000):  # buckets keep types, and may part a weight from its scales
        arrived |= dict(staged_bytes(data, checksum(data)).tensors())
    assert arrived.keys() == sent.keys()
    assert all(t.dtype == arrived[name].dtype for name, t in sent.items())


def test_in_files_experts_are_named_one_by_one():
    """As released checkpoints have them; for sizes that are multiples of 128 the bits are those of the stacked ones."""
    trainer = converted(model_of(moe_intermediate_size=128, num_hidden_layers=2))
    chosen = in_fp8(trainer, as_in_files=True)
    assert len(chosen) > len(fp8_weights(trainer)) and not any("gate_up" in name for name in chosen)
    assert not any(part in name for name in chosen for part in ("mlp.gate.", "embed", "norm", "lm_head"))
    stream = dict(quantized_weights(checkpoint_weights(trainer, trainer.state_dict().items()), chosen))
    assert chosen.keys() <= stream.keys() and {name + SCALE for name in chosen} <= stream.keys()
    experts = "model.layers.1.mlp.experts"
    stacked = trainer.get_submodule(experts)
    stacked.quantize_weights()
    both = stacked.gate_up_quantized._copy
    for expert in range(len(stacked.down_proj)):
        parts = [stream[f"{experts}.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(torch.cat(parts).view(torch.uint8), both.values[expert].view(torch.uint8))
        scales = [stream[f"{experts}.{expert}.{part}_proj.weight{SCALE}"] for part in ("gate", "up")]
        assert torch.equal(torch.cat(scales), both.scales[expert])
    plain = converted(dense())
    assert in_fp8(plain, as_in_files=True).keys() == fp8_weights(plain).keys()


def test_vllm_starts_from_a_folder_of_the_weights_that_it_will_be_sent(tmp_path):
    """The same names, types and bits, and the layers that are not in FP8 by name; a folder in FP8 is taken as it is."""
    workers = {"count": 1, "weights": "fp8"}
    changes = {"rollout__mode": "server", "rollout__engine": "vllm", "rollout__workers": workers, "precision": "fp8"}
    recipe = validate(grpo(tmp_path, **changes))
    spec, folder = recipe.model, SimpleNamespace(folder=tmp_path)
    words = load_tokenizer(spec)
    trainer = converted(load_model(spec, words, dtype=torch.float32)).bfloat16()  # as files are rounded
    backend = Replicated(trainer, torch.bfloat16, OptimizerSpec(), Processes())
    write_starting_model(recipe, backend, words, folder)
    written = model_folder(recipe, folder)
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128] and config["modules_to_not_convert"] == ["lm_head"]
    expected = dict(quantized_weights(trainer.state_dict().items(), in_fp8(trainer, as_in_files=True)))
    found = load_file(written / "model.safetensors")
    assert found.keys() == expected.keys() and len(found) > len(trainer.state_dict())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    given = validate(grpo(tmp_path, **changes, model={"path": str(written)}))
    assert model_folder(given, folder) == written.resolve()


# ---- workers -------------------------------------------------------------------------------------------


@pytest.fixture
def spool(tmp_path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", limit=20_000)
    yield made
    made.close()


def test_a_worker_in_fp8_draws_from_the_trainers_distribution(tmp_path, spool):
    """A process, updated by FP8 weights and by bfloat16 ones: the same samples. The trainer's log-probabilities of them
    are off by the order of sums; off those of a sampler that rounds nothing by all that FP8 rounds."""
    trainer = converted(tiny_model("llama", seed=9))
    prompts, params = token_lists([3, 17, 1, 8]), SamplingParams(n=3, max_tokens=12, seed=4)
    policy = Policy(trainer)
    worker = process(tmp_path, spool, 0, precision="fp8")
    client = WorkerClient(worker.url, SECRET, 60.0)
    expected = probe_logprobs(policy, PROBE.tokens)
    workers = served([(client, worker)], spool, trainer, probe=lambda: expected, start_timeout_s=900.0)
    try:
        workers.fleet.start()
        drawn, sizes = [], []
        for version, names in enumerate(({}, fp8_weights(trainer)), start=1):
            workers.update_weights(quantized_weights(trainer.state_dict().items(), names), version)
            assert workers.sync.probe < 1e-4
            drawn.append(workers.generate(prompts, params))
            sizes.append(workers.sync.bytes)
    finally:
        workers.close()
    assert [[s.token_ids for s in row] for row in drawn[0]] == [[s.token_ids for s in row] for row in drawn[1]]
    unrounded = LocalSampler(tiny_model("llama", seed=9), tokenizer(EOS)).generate(prompts, params)
    rounded, plain = (mismatch_of(policy, prompts, samples) for samples in (drawn[1], unrounded))
    assert rounded["k3"] < 1e-3 * plain["k3"] and rounded["max"] < 0.03 * plain["max"]
    assert sizes[1] < 0.6 * sizes[0]


@torch.no_grad()
def mismatch_of(policy: Policy, prompts: list[list[int]], samples: list[list[Sample]]) -> dict[str, float]:
    """Between the sampler's log-probabilities of its samples and the trainer's; k3 as a mean."""
    rows = [(prompt, s) for prompt, group in zip(prompts, samples, strict=True) for s in group]
    (pack,) = policy.pack([Document(prompt, s.token_ids) for prompt, s in rows], 10_000)
    logp, _ = policy.logprobs(pack)
    found = mismatch(logp, pack.gather([s.logprobs for _, s in rows]))
    return {"k3": float(found["k3"]) / len(logp), "max": float(found["max"])}


def test_grpo_in_fp8_with_a_worker_that_gets_fp8(tmp_path):
    """Two steps with updates. In float32 the worker's distribution is the trainer's, so the ratio of new to old is 1;
    the first send has as many bytes as weights, scales and what stays in float32."""
    model = {"scratch": {**SCRATCH, "hidden_size": 136, "intermediate_size": 200}, "dtype": "float32"}
    recipe = grpo(
        tmp_path / "run",
        model=model,
        precision="fp8",
        grpo__steps=2,
        rollout__mode="server",
        rollout__workers={"count": 1, "weights": "fp8", "env": {"OMP_NUM_THREADS": "1"}},
    )
    run_recipe(validate(recipe))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2 and all(row["sync/workers"] == 1 and row["sync/probe"] < 1e-3 for row in rows)
    assert all(row["mismatch/k3"] < 1e-5 and row["grad_norm"] > 0 for row in rows)
    log = (tmp_path / "run" / "workers" / "worker-0.log").read_text()
    assert "in FP8 by backend reference on cpu" in log


# ---- recipes -------------------------------------------------------------------------------------------


SERVER = {"rollout__mode": "server"}
VLLM = {**SERVER, "rollout__engine": "vllm"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout__workers": {"count": 1, "weights": "fp8"}}, "weights: fp8 needs precision: fp8"),
        (
            {"rollout__workers": {"count": 1, "weights": "fp8"}, "precision": "fp8", "model__lora": {"r": 4}},
            "with model.lora set weights: model",
        ),
        ({"rollout__workers": {"count": 1, "weights": "pf8"}}, "did you mean 'fp8'"),
    ],
)
def test_what_cannot_be_in_fp8(tmp_path, changes, says):
    with pytest.raises(RecipeError, match=r"rollout\.workers\.weights") as error:
        validate(grpo(tmp_path, **SERVER, **changes))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({**SERVER, "precision": "fp8", "rollout__workers": {"count": 1}}, None),
        ({**SERVER, "precision": "fp8", "rollout__workers": {"count": 1, "options": {"precision": "bf16"}}},
         "rollout.workers.options.precision"),
        ({**SERVER, "rollout__workers": {"count": 1, "options": {"precision": "fp8"}}},
         "rollout.workers.options.precision"),
        ({**SERVER, "precision": "fp8", "rollout__workers": {"urls": ["http://127.0.0.1:1"], "secret_file": "SECRET"}},
         "started them with precision=fp8"),
        ({**VLLM, "precision": "fp8", "rollout__workers": {"count": 1, "python": "python3"}}, "vLLM rounds none"),
        ({**VLLM, "precision": "fp8", "rollout__workers": {"count": 1, "options": {"quantization": "fp8"}}},
         "rounds them otherwise (fp8)"),
        ({**VLLM, "precision": "fp8", "rollout__workers": {"count": 1, "options": {"quantization": "fp8_per_block"}}},
         None),
        ({**VLLM, "precision": "fp8", "rollout__workers": {"count": 1, "weights": "fp8"}}, None),
        ({**VLLM, "rollout__workers": {"count": 1, "options": {"quantization": "fp8_per_block"}}},
         "fp8_per_block rounds weights that the trainer does not"),
        ({"rollout__mode": "colocate", "rollout__engine": "vllm", "precision": "fp8"}, "vLLM rounds none"),
        ({**SERVER, "precision": "fp8", "model__lora": {"r": 4}, "rollout__workers": {"count": 1}},
         "server rounds merged weights"),
    ],
)  # fmt: skip
def test_check_warns_of_a_sampler_that_rounds_otherwise(tmp_path, changes, says):
    (tmp_path / "secret").write_text(SECRET)
    workers = changes.get("rollout__workers", {})
    if "secret_file" in workers:
        changes = {**changes, "rollout__workers": {**workers, "secret_file": str(tmp_path / "secret")}}
    warnings = [w for w in check_rollout(validate(grpo(tmp_path, **changes))) if "vLLM is not installed" not in w]
    assert len(warnings) == (says is not None)
    assert says is None or (says in warnings[0] and warnings[0].startswith("rollout."))


def test_check_refuses_a_precision_of_workers_that_there_is_not(tmp_path):
    workers = {"count": 1, "options": {"precision": "fp16"}}
    with pytest.raises(RecipeError, match="rollout.workers.options.precision: remove it"):
        check_rollout(validate(grpo(tmp_path, **SERVER, rollout__workers=workers)))


def test_check_says_how_weights_are_sent(tmp_path):
    workers = {"count": 1, "weights": "fp8"}
    recipe = validate(grpo(tmp_path, **SERVER, precision="fp8", rollout__workers=workers))
    assert any("in FP8" in line for line in rollout_table(recipe))
