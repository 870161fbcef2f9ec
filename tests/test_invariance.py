"""However a mini-batch is cut up, its gradient is the same; and so is a run on one process and on two.

Driven through `GRPO.update`, the code that trains: the gradient is taken where the optimizer would take it.
"""

from __future__ import annotations

import json
import math
import random
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from recipes import launch_two
from rl.experience import Completion
from rl.grpo import GRPO
from rl.policy.processes import Processes
from rl.policy.sharding import LaunchError
from rl.prompts import Prompt
from rl.recipe_io import load_recipe, validate
from rl.rollout import Sample
from rl.train_log import GRPOLog

ROOT = Path(__file__).resolve().parent.parent
REWARD = '''
"""Pays for digits and for length, but nothing for every third answer: groups of all kinds."""

def digits(prompts, completions, completion_ids, answer, **columns):
    pay = lambda text, ids: round(sum(c.isdigit() for c in text) / (len(text) + 1) + 0.01 * len(ids), 3)
    return [pay(t, i) if int(a) % 3 else 0.0 for t, i, a in zip(completions, completion_ids, answer)]
'''


def recipe_dict(folder: Path, **grpo) -> dict:
    (folder / "reward.py").write_text(REWARD)
    return {
        "pipeline": "grpo",
        "output_dir": str(folder / "run"),
        "seed": 3,
        "model": {
            "scratch": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "max_positions": 128,
                "config": {"initializer_range": 0.25},
            },
            "dtype": "float32",
        },
        "data": {"generator": {"families": ["addition"], "levels": [1], "count": 12}},
        "rewards": [{"path": f"{folder / 'reward.py'}:digits"}],
        "rollout": {
            "max_tokens": 12,
            "max_slots": 16,
            "max_prompt_tokens": 64,
            "stop_token_ids": list(range(40, 60)),
        },
        "optimizer": {"learning_rate": 1e-3},
        "log": {"samples_every": 0},
        "grpo": {
            "steps": 2,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "tokens_per_microbatch": 150,
            **grpo,
        },
    }


# ---- one mini-batch, cut up in every way -------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo(tmp_path_factory) -> GRPO:
    """A GRPO object with a perturbed reference, whose optimizer step hands out the gradient instead."""
    folder = tmp_path_factory.mktemp("invariance")
    made = GRPO(validate(recipe_dict(folder, kl={"coefficient": 0.1})), Processes())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.reference.policy.model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    made.kept_reference = made.reference
    return made


@pytest.fixture
def double(grpo, monkeypatch):
    """The same in float64, with the few places replaced that compute in float32 whatever they are given."""

    def exact_logprobs(hidden, target, head, *, temperature, chunk):
        full = (hidden @ head.weight.t() / temperature).log_softmax(-1)
        return full.gather(-1, target[:, None])[:, 0], -(full.exp() * full).sum(-1).detach()

    def exact_norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr("rl.policy.policy.token_logprobs", exact_logprobs)
    models = [grpo.policy.model, grpo.kept_reference.policy.model]
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)
    for model in models:
        model.double()
    yield grpo
    for model in models:
        model.float()


@torch.no_grad()
def experience(grpo: GRPO, seed: int, *, off_policy: bool = True) -> list[Completion]:
    """Ragged groups with advantages, zero ones among them, and old log-probabilities of another policy.

    Those lie around the true ones, with a shift a sequence, so that tokens and sequences fall on both sides
    of the clips.
    """
    model = grpo.policy.model
    draw = random.Random(seed)
    batch = []
    for group, size in enumerate([draw.randint(1, 5), 3, draw.randint(2, 4), 1]):
        prompt = Prompt([draw.randrange(8, 100) for _ in range(draw.choice([1, 4, 9, 17]))], "", {})
        for _ in range(size):
            ids = [draw.randrange(4, 100) for _ in range(draw.choice([1, 2, 5, 8, 12]))]
            logits = model(input_ids=torch.tensor([[*prompt.ids, *ids]]), use_cache=False).logits[0]
            exact = logits.log_softmax(-1)[len(prompt.ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])
            shift = draw.gauss(0, 0.3)
            logps = [round(x + shift + draw.gauss(0, 0.3), 2) for x in exact[:, 0].tolist()]
            sample = Sample(ids, [x + draw.gauss(0, 0.2) for x in logps], "stop", 0)
            completion = Completion(prompt, group, group, sample, "")
            completion.advantage = 0.0 if group == 1 else round(draw.gauss(0, 1), 3)
            completion.old_logp = torch.tensor(logps) if off_policy else None
            batch.append(completion)
    return batch


def gradient(grpo: GRPO, batch: list[Completion], *, padded: bool = False, kl: bool = True, **spec) -> torch.Tensor:
    """The accumulated gradient of one update, flat, as the optimizer gets it; the model stays as it is."""
    settings = {**grpo.recipe.model_dump(mode="json"), "resume": "never"}
    settings["grpo"] = {**settings["grpo"], **spec}
    grpo.recipe = validate(settings)
    grpo.reference = grpo.kept_reference if kl else None
    grpo.policy.packed = grpo.kept_reference.policy.packed = not padded
    found: list[torch.Tensor] = []

    def take(rate: float) -> tuple[float, bool]:
        for p in grpo.backend.masters:
            found.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten())
            p.grad = None
        return 0.0, True

    original, grpo.backend.step = grpo.backend.step, take
    try:
        grpo.update(batch, GRPOLog())
    finally:
        grpo.backend.step = original
    return torch.cat(found)


def assert_invariant(grpo: GRPO, batch: list[Completion], tolerance: float, seed: int, **spec) -> None:
    whole = {"tokens_per_microbatch": 100_000, "share_prompts": False, "skip_uninformative": False}
    want = gradient(grpo, batch, **{**spec, **whole})
    assert want.norm() > 1e-3
    draw = random.Random(seed)
    shuffled = draw.sample(batch, len(batch))
    ways = [
        {"share_prompts": True},
        {"skip_uninformative": True},
        {"tokens_per_microbatch": 1},
        {"tokens_per_microbatch": draw.randint(10, 60), "share_prompts": True, "skip_uninformative": True},
        {"tokens_per_microbatch": draw.randint(20, 100)},
        {"padded": True},
        {"padded": True, "skip_uninformative": True},
    ]
    for i, way in enumerate([{}, *ways]):
        got = gradient(grpo, batch if (i + seed) % 2 and way else shuffled, **{**spec, **whole, **way})
        assert (got - want).norm() <= tolerance * want.norm(), way


LOSSES = list(product(("ppo", "gspo", "cispo"), ("sequence", "token", "constant")))


def loss_spec(kind: str, aggregation: str) -> dict:
    return {"kind": kind, "aggregation": aggregation, "clip_high": 0.28, "dual_clip": 3.0, "cap": 2.0}


@pytest.mark.parametrize("kind,aggregation", LOSSES)
@pytest.mark.parametrize("kl", [False, True])
def test_gradient_in_float32(grpo, kind, aggregation, kl):
    seed = 10 * LOSSES.index((kind, aggregation))
    assert_invariant(grpo, experience(grpo, seed), 1e-5, seed, loss=loss_spec(kind, aggregation), kl=kl)


@pytest.mark.parametrize("kind,aggregation", LOSSES)
def test_gradient_in_float64(double, kind, aggregation):
    for seed in (1, 2):
        batch = experience(double, seed)
        for kl in (False, True):
            assert_invariant(double, batch, 1e-10, seed, loss=loss_spec(kind, aggregation), kl=kl)


@pytest.mark.parametrize("estimator,unbiased", product(("k1", "k2", "k3"), (False, True)))
def test_gradient_with_each_kl_estimator(double, estimator, unbiased):
    spec = {"coefficient": 0.5, "estimator": estimator, "unbiased": unbiased}
    previous = double.recipe
    double.recipe = previous.model_copy(
        update={"grpo": previous.grpo.model_copy(update={"kl": previous.grpo.kl.model_copy(update=spec)})}
    )
    try:
        batch = experience(double, 7)
        without = gradient(double, batch, kl=False, tokens_per_microbatch=100_000)
        with_kl = gradient(double, batch, kl=True, tokens_per_microbatch=100_000)
        assert (with_kl - without).norm() > 1e-3 * without.norm()  # the term is there
        assert_invariant(double, batch, 1e-10, 7)
    finally:
        double.recipe = previous


@pytest.mark.parametrize("correction", ["tis", "mis", "sequence-mask"])
def test_gradient_with_corrections(double, correction):
    spec = {"kind": correction, "cap": 1.1, "low": 0.95, "high": 1.2}
    batch = experience(double, 8)
    plain = gradient(double, batch, correction={"kind": "none"})
    assert (gradient(double, batch, correction=spec) - plain).norm() > 1e-3 * plain.norm()
    assert_invariant(double, batch, 1e-10, 8, correction=spec)
    gradient(double, batch, correction={"kind": "none"})  # leaves the recipe as it was


def test_gradient_on_policy(double):
    """No old log-probabilities: pi_old is pi, the ratio is 1 and the gradient that of A log pi."""
    batch = experience(double, 9, off_policy=False)
    assert_invariant(double, batch, 1e-10, 9, kl=False, loss=loss_spec("ppo", "token"))
    assert_invariant(double, batch, 1e-10, 9, kl=True, loss=loss_spec("gspo", "sequence"))


def test_gradient_with_truncated_completions_masked(double):
    """Masked completions are in no denominator but the constant one, whatever the split."""
    batch = experience(double, 11)
    for i, completion in enumerate(batch):
        completion.masked = i % 4 == 0
    for aggregation in ("sequence", "token", "constant"):
        assert_invariant(double, batch, 1e-10, 11, loss=loss_spec("ppo", aggregation))
        if aggregation != "constant":
            kept = [c for c in batch if not c.masked]
            want = gradient(double, kept, loss=loss_spec("ppo", aggregation))
            got = gradient(double, batch, loss=loss_spec("ppo", aggregation))
            assert (got - want).norm() <= 1e-10 * want.norm()


def test_gradient_of_halves_adds_up_with_the_denominator_of_the_whole(double, monkeypatch):
    """Two processes, in one: each gives its part; the parts are summed once, never averaged."""
    batch = experience(double, 12)
    for kind, aggregation in LOSSES:
        spec = {"loss": loss_spec(kind, aggregation)}
        want = gradient(double, batch, **spec)
        totals = {
            "sequence": float(len(batch)),
            "token": float(sum(len(c.sample.token_ids) for c in batch)),
            "constant": float(len(batch) * double.recipe.rollout.max_tokens),
        }
        with monkeypatch.context() as patch:
            patch.setattr(double.backend, "sum", lambda values, totals=totals: totals)
            parts = [gradient(double, [c for c in batch if c.group % 2 == rank], **spec) for rank in (0, 1)]
        assert (parts[0] + parts[1] - want).norm() <= 1e-10 * want.norm()


@torch.no_grad()
def test_old_and_reference_logprobs_do_not_depend_on_the_split(double):
    batch = experience(double, 13)
    found = []
    for padded, budget in ((False, 100_000), (False, 1), (False, 50), (True, 50)):
        gradient(double, [], tokens_per_microbatch=budget, padded=padded)
        for completion in batch:
            completion.old_logp = completion.ref_logp = None
        double.score_old(batch, True)
        assert all(len(c.old_logp) == len(c.ref_logp) == len(c.sample.token_ids) for c in batch)
        found.append(torch.cat([torch.cat([c.old_logp, c.ref_logp]).double() for c in batch]))
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-10
    model = double.policy.model
    completion = batch[3]
    ids = torch.tensor([[*completion.prompt.ids, *completion.sample.token_ids]])
    logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    want = logp[len(completion.prompt.ids) - 1 : -1].gather(-1, torch.tensor(completion.sample.token_ids)[:, None])
    assert (completion.old_logp - want[:, 0]).abs().max() < 1e-10


# ---- one process and two -----------------------------------------------------------------------------


def results(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return rows, load_file(folder / "model" / "model.safetensors"), summary


def test_a_launcher_that_starts_one_process_of_several_is_refused(monkeypatch):
    """`accelerate launch` with MULTI_CPU and num_processes 2 sets these and starts a single process: training
    on without a word would be a run of half the size that was asked for."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    Processes()
    for name, value in {
        "ACCELERATE_USE_CPU": "True",
        "ACCELERATE_MIXED_PRECISION": "no",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="MULTI_GPU"):
        Processes()


def test_one_process_equals_two(tmp_path):
    """The same recipe: every metric of every step and the final weights, to float error."""
    spec = {
        "minibatches_per_step": 2,
        "prompts_per_step": 6,  # three a mini-batch: the processes' shares differ
        "kl": {"coefficient": 0.05},
        "loss": {"aggregation": "token"},
        "advantage": {"scale": "batch"},
        "dynamic_sampling": {"max_rounds": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_dict(tmp_path, **spec)))
    two = launch_two(tmp_path, str(recipe), f"output_dir={tmp_path / 'two'}")
    alone = load_recipe(str(recipe), [f"output_dir={tmp_path / 'one'}"])
    try:
        GRPO(alone, Processes()).run()
        output, _ = two.communicate(timeout=240)
    finally:
        two.kill()
    assert two.returncode == 0, output[-3000:]
    assert "2 process(es)" in output

    (rows_one, one, summary_one), (rows_two, two_weights, summary_two) = (results(tmp_path / n) for n in ("one", "two"))
    assert len(rows_one) == len(rows_two) == 2
    for a, b in zip(rows_one, rows_two, strict=True):
        assert a.keys() == b.keys()
        assert a["completions"] == 24 and a["grad_norm"] > 0 and a["reward_std"] > 0 and a["kl"] >= 0
        for name in a.keys() - {n for n in a if n.startswith("time/")}:
            if isinstance(a[name], (int, float)) and name not in ("mismatch/k3", "mismatch/max"):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6, nan_ok=True), name
            elif name.startswith("mismatch/"):
                assert max(abs(a[name]), abs(b[name])) < 1e-4, name  # rounding itself
    assert summary_one["updates"] == summary_two["updates"] == 4
    assert one.keys() == two_weights.keys()
    for name, weight in one.items():
        assert (weight - two_weights[name]).abs().max() < 2e-5, name
    start = GRPO(load_recipe(str(recipe), [f"output_dir={tmp_path / 'start'}"]), Processes()).policy.model.state_dict()
    change = max(float((one[n] - start[n]).abs().max()) for n in one)
    assert 1e-3 < change < math.inf  # the weights did move, a hundred times further than they may differ
