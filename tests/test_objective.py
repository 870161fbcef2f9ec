"""rl.objective against naive loops over Python floats: values, gradients, edge cases and invariances."""

from __future__ import annotations

import math
import random
import statistics
from itertools import product

import pytest
import torch

from rl.objective import aggregate, correction_weights, group_advantages, kl_estimate, mismatch, policy_loss
from rl.objective.advantage import uniform_groups
from rl.objective.kl import LOG_RATIO_LIMIT, saturate

ESTIMATORS = list(product(("group", "batch", "none"), ("mean", "leave-one-out")))
LOSSES = list(product(("ppo", "gspo", "cispo"), ("sequence", "token", "constant")))
CLIPS = ((0.2, 0.2, 5.0), (0.2, 0.28, 2.0), (3e-4, 4e-4, 0.7), (10.0, 10.0, 50.0))  # low, high, CISPO's cap
LIMIT, DENOMINATOR = 40.0, 7.0
INF, NAN = math.inf, math.nan
X, IDS = torch.tensor([0.5, 0.25]), torch.tensor([0, 0])
# The documented defaults: options that equal them are left out of the calls, so that they are tested too.
DEFAULTS = {"scale": "group", "baseline": "mean", "eps": 1e-6, "kind": "ppo", "aggregation": "sequence"}
DEFAULTS |= {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "cap": 5.0}


def given(**options):
    return {name: value for name, value in options.items() if value != DEFAULTS[name]}


def tensor(values, grad=False, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def close(got, want, rel=1e-10, abs_=1e-12):
    got = got.detach().tolist() if isinstance(got, torch.Tensor) else got
    assert got == pytest.approx(want, rel=rel, abs=abs_)


def central_differences(function, x, h=1e-6):
    moved = [[function(x[:t] + [v + by] + x[t + 1 :]) for by in (h, -h)] for t, v in enumerate(x)]
    return [(up - down) / (2 * h) for up, down in moved]


def reward_batch(seed):
    """Ragged groups of arbitrary ids, shuffled; some rewards NaN, some groups uniform or nearly unscored."""
    rng, rows = random.Random(seed), []
    for identity in rng.sample(range(-1000, 1000), 9):
        style = rng.randrange(4)
        for _ in range(rng.randint(1, 7)):
            reward = (float(rng.random() < 0.5), rng.gauss(0, 2), 1e4 + rng.random(), 0.1)[style]
            rows.append((NAN if rng.random() < 0.2 else reward, identity))
    rng.shuffle(rows)
    return list(zip(*rows, strict=True))


def naive_advantages(rewards, ids, scale, baseline, eps):
    """Advantages and which completions' groups teach nothing."""
    out, flat, scored = [], [], [j for j, r in enumerate(rewards) if not math.isnan(r)]
    for i, reward in enumerate(rewards):
        group = [j for j in scored if ids[j] == ids[i]]
        flat.append(len({rewards[j] for j in group}) < 2)
        out.append(0.0)
        if not flat[-1] and i in group:
            pool = [rewards[j] for j in group if baseline == "mean" or j != i]
            spread = [rewards[j] for j in (group if scale == "group" else scored)]
            divisor = 1.0 if scale == "none" else statistics.stdev(spread) + eps
            out[-1] = (reward - statistics.fmean(pool)) / divisor
    return out, flat


@pytest.mark.parametrize("scale,baseline", ESTIMATORS)
def test_advantages_match_the_naive_loop(scale, baseline):
    zeros = 0
    for seed, eps in product(range(8), (1e-6, 1e-2, 0.0)):
        rewards, ids = reward_batch(seed)
        args = tensor(rewards, grad=True), torch.tensor(ids)
        got = group_advantages(*args, **given(scale=scale, baseline=baseline, eps=eps))
        want, flat = naive_advantages(rewards, ids, scale, baseline, eps)
        assert got.dtype == torch.float32 and not got.requires_grad
        close(got, want, rel=3e-7, abs_=1e-8)
        assert uniform_groups(*args).tolist() == flat
        exact = [a for a, f, r in zip(got.tolist(), flat, rewards, strict=True) if f or math.isnan(r)]
        assert all(a == 0.0 for a in exact)
        zeros += len(exact)
    assert zeros > 50  # the batches do hold NaN, lone and uniform completions


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-9 / 3, 1.7e308, -1e300, 5e-324, 0.0, 123456.789])
@pytest.mark.parametrize("scale,baseline", ESTIMATORS)
def test_equal_rewards_give_exactly_zero(value, scale, baseline):
    for size, eps, company in product((1, 2, 3, 6, 7, 10), (1e-6, 1e-12, 0.0), (False, True)):
        rows = [(value, 7)] * size
        if company:  # another group and unscored completions in between
            rows += [(NAN, 7), (0.0, -3), (1.0, -3), (NAN, -3)]
            random.Random(size).shuffle(rows)
        rewards, ids = zip(*rows, strict=True)
        got = group_advantages(tensor(rewards), torch.tensor(ids), scale=scale, baseline=baseline, eps=eps)
        assert all(a == 0.0 for a, i in zip(got.tolist(), ids, strict=True) if i == 7), (size, eps, got)
        if company and abs(value) < 1e300:
            assert got[rows.index((1.0, -3))] > 0


@pytest.mark.parametrize("scale,baseline", ESTIMATORS)
def test_fewer_than_two_scored_and_one_ulp(scale, baseline):
    options = {"scale": scale, "baseline": baseline, "eps": 0.0}
    for rewards in ([], [2.0], [NAN], [NAN, NAN], [NAN, 2.0, NAN]):
        ids = torch.zeros(len(rewards), dtype=torch.long)
        assert group_advantages(tensor(rewards), ids, **options).tolist() == [0.0] * len(rewards)
    rewards, ids = tensor([0.1, math.nextafter(0.1, 1.0)]), torch.tensor([0, 0])
    assert uniform_groups(rewards, ids).tolist() == [False, False]
    low, high = group_advantages(rewards, ids, **options).tolist()
    assert low <= 0 <= high and low != high


def naive_kl(k1, kind):
    """Value and d/d logp; k3's ratio saturates at e^+-40, its gradient goes through."""
    if kind == "k1":
        return k1, 1.0
    if kind == "k2":
        return k1 * k1 / 2, k1
    exponent = min(max(-k1, -LIMIT), LIMIT)
    return math.expm1(exponent) + k1, -math.expm1(exponent)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_matches_the_naive_loop(kind):
    rng = random.Random(11)
    ref = [-rng.expovariate(0.5) for _ in range(60)]
    drift = [rng.gauss(0, rng.choice([1e-3, 1.0, 10.0])) for _ in ref[5:]] + [0.0, 41.0, -41.0, 1e4, -1e4]
    logp = tensor([r + d for r, d in zip(ref, drift, strict=True)], grad=True)
    got = kl_estimate(logp, tensor(ref), kind)
    got.sum().backward()
    want = [naive_kl(x - r, kind) for x, r in zip(logp.tolist(), ref, strict=True)]
    close(got, [value for value, _ in want])
    close(logp.grad, [slope for _, slope in want])
    if kind == "k3":
        assert torch.equal(kl_estimate(logp, tensor(ref)), got)  # the default
    small = [d for d in drift if abs(d) < 10]  # the closed form itself
    numeric = central_differences(lambda x: sum(naive_kl(d, kind)[0] for d in x), small)
    close(numeric, [naive_kl(d, kind)[1] for d in small], rel=1e-4, abs_=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_at_extreme_drifts_is_finite_and_pulls_back(dtype):
    drift = [s * x for s in (-1, 1) for x in (1e-6, 1e-3, 1.0, 39.9, 40.0, 40.1, 100.0, 1e3, 1e4)]
    logp = tensor(drift, grad=True, dtype=dtype)
    value = kl_estimate(logp, torch.zeros_like(logp), "k3")
    value.sum().backward()
    assert torch.isfinite(value).all() and (value >= 0).all()
    assert torch.isfinite(logp.grad).all() and (logp.grad * logp.detach() > 0).all()


def test_estimators_against_the_true_kl_of_a_categorical():
    """Expectations by enumeration: k1, k3 unbiased in value; k2's on-policy gradient is the KL's."""
    logits = tensor([0.3, -1.2, 0.8, 1.9, -0.5, 0.1], grad=True)
    logp, ref = logits.log_softmax(0), tensor([1.0, 0.4, -0.9, 0.6, 0.0, -2.0]).log_softmax(0)
    p, r = [math.exp(x) for x in logp.tolist()], ref.tolist()
    true_kl = math.fsum(q * (math.log(q) - s) for q, s in zip(p, r, strict=True))
    assert true_kl > 0.05
    mean, grad = {}, {}
    for kind in ("k1", "k2", "k3"):
        expectation = (tensor(p) * kl_estimate(logp, ref, kind)).sum()  # the samples' weights are constants
        mean[kind] = expectation.item()
        (grad[kind],) = torch.autograd.grad(expectation, logits, retain_graph=True)
    close([mean["k1"], mean["k3"]], [true_kl, true_kl])
    close(grad["k2"], [q * (math.log(q) - s - true_kl) for q, s in zip(p, r, strict=True)])
    close(grad["k1"], [0.0] * 6)  # pushes nowhere
    close(grad["k3"], [q - math.exp(s) for q, s in zip(p, r, strict=True)])  # KL(ref || pi)'s instead


def token_batch(seed, kept="tokens"):
    """Columns logp, old, advantage, mask, id, weight of the tokens of ragged, interleaved sequences."""
    rng, rows = random.Random(seed), []
    for identity in rng.sample(range(-500, 500), 5):
        advantage, offset = rng.choice([-1.3, -0.4, 0.0, 0.7, 2.0]), rng.gauss(0, 1.5)
        whole = float(rng.random() < 0.5)
        for _ in range(rng.randint(1, 6)):
            old = -rng.expovariate(0.5)
            shift = rng.choice([0.0, offset + rng.gauss(0, 0.9), offset + rng.gauss(0, 0.2)])
            keep = {"all": 1.0, "none": 0.0, "tokens": rng.choice((0.0, 1.0, 1.0)), "sequences": whole}
            own = advantage if rng.random() < 0.7 else rng.gauss(0, 1)
            rows.append((old + shift, old, own, keep[kept], identity, rng.uniform(0, 2)))
    rng.shuffle(rows)
    return [list(column) for column in zip(*rows, strict=True)]


def naive_loss(logp, old, adv, mask, ids, weights, kind, low, high, cap, dual, aggregation):
    """Loss, closed-form d loss / d logp, and metrics, one token at a time."""
    loss, grads, ratios, clips = 0.0, [], [], 0
    for t, a in enumerate(adv):
        grads.append(0.0)
        if not mask[t]:
            continue
        mine = [j for j in range(len(logp)) if ids[j] == ids[t] and mask[j]]
        log_ratio = logp[t] - old[t]
        if kind == "gspo":
            log_ratio = sum(logp[j] - old[j] for j in mine) / len(mine)
        rho = math.exp(min(max(log_ratio, -LIMIT), LIMIT))
        if kind == "cispo":
            value, slope, clipped = -min(rho, cap) * a * logp[t], -min(rho, cap) * a, rho > cap
        elif a >= 0:
            clipped = a > 0 and rho > 1 + high
            value, slope = -min(rho, 1 + high) * a, 0.0 if clipped else -rho * a
        else:
            beyond = dual is not None and rho > dual
            clipped = rho < 1 - low or beyond
            value, slope = -(dual if beyond else max(rho, 1 - low)) * a, 0.0 if clipped else -rho * a
        factor = (weights[t] if weights else 1.0) / (len(mine) if aggregation == "sequence" else 1)
        loss += factor * value / DENOMINATOR
        grads[t] = factor * slope / DENOMINATOR
        ratios.append(rho)
        clips += clipped
    top = max(ratios, default=0.0)
    return loss, grads, {"tokens": len(ratios), "clipped": clips, "ratio": sum(ratios), "ratio_max": top}


def run_loss(logp, old, adv, mask, ids, weights, *, dtype=torch.float64, **options):
    """Loss, gradient by logp and metrics of the code under test; old and weights ask for gradient in vain."""
    x, o = tensor(logp, True, dtype), tensor(old, True, dtype)
    w = tensor(weights, True, dtype) if weights else None
    keep = tensor(mask) if weights else tensor(mask).bool()
    args = x, o, tensor(adv, dtype=dtype), keep, torch.tensor(ids)
    loss, metrics = policy_loss(*args, weights=w, denominator=DENOMINATOR, **options)
    loss.backward()
    assert loss.shape == () and o.grad is None and (w is None or w.grad is None)
    assert not any(m.requires_grad for m in metrics.values())
    return loss.item(), x.grad.tolist(), {name: m.item() for name, m in metrics.items()}


@pytest.mark.parametrize("kept", ["all", "tokens", "sequences", "none"])
@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("kind,aggregation", LOSSES)
def test_policy_loss_matches_the_naive_loop(kind, aggregation, dual, kept):
    clipped = tokens = 0
    for seed, (low, high, cap), weighted in product(range(4), CLIPS, (False, True)):
        batch = token_batch(seed, kept)
        if not weighted:
            batch[-1] = None
        options = {"kind": kind, "clip_low": low, "clip_high": high, "cap": cap, "dual_clip": dual}
        options["aggregation"] = aggregation
        got, want = run_loss(*batch, **given(**options)), naive_loss(*batch, *options.values())
        for g, w in zip(got, want, strict=True):
            close(g, w)
        if kind == "ppo" and low > 1e-3:
            rest = *batch[1:], *options.values()
            numeric = central_differences(lambda x, rest=rest: naive_loss(x, *rest)[0], batch[0])
            close(got[1], numeric, rel=1e-6, abs_=1e-7)
        clipped, tokens = clipped + want[2]["clipped"], tokens + want[2]["tokens"]
    assert 0 < clipped < tokens or kept == "none"


@pytest.mark.parametrize("seed", range(8))
def test_gspo_gradient_is_that_of_the_sequence_objective(seed):
    """2507.18071 eq. 5: mean of min(s A, clip(s) A), s = exp(mean log-ratio); one A a sequence."""
    logp, old, _, mask, ids, _ = token_batch(seed)
    adv = [(-1.0, 0.6, 1.5)[i % 3] for i in ids]

    def objective(logp):
        total = 0.0
        for identity in set(ids):
            kept = [t for t, i in enumerate(ids) if i == identity and mask[t]]
            if kept:
                s, a = math.exp(sum(logp[t] - old[t] for t in kept) / len(kept)), adv[kept[0]]
                total -= min(s * a, min(max(s, 0.5), 1.6) * a) / DENOMINATOR
        return total

    loss, grad, _ = run_loss(logp, old, adv, mask, ids, None, kind="gspo", clip_low=0.5, clip_high=0.6)
    close(loss, objective(logp))
    close(grad, central_differences(objective, logp), rel=1e-6, abs_=1e-8)
    assert any(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind,aggregation", LOSSES)
def test_extreme_log_ratios_stay_finite(kind, aggregation, dtype):
    shifts = [-1e6, -1e4, -500.0, -88.8, -40.0, 0.0, 40.0, 88.8, 500.0, 1e4, 1e6]
    old = [min(-s, 0.0) - 0.5 for s in shifts]
    logp, ones = [o + s for o, s in zip(old, shifts, strict=True)], [1.0] * len(shifts)
    for sign, dual in product((-1.0, 1.0), (None, 3.0)):
        batch = logp, old, [sign] * len(shifts), ones, list(range(len(shifts))), None
        got = run_loss(*batch, kind=kind, dual_clip=dual, aggregation=aggregation, dtype=dtype)
        for g, w in zip(got, naive_loss(*batch, kind, 0.2, 0.2, 5.0, dual, aggregation), strict=True):
            close(g, w, rel=1e-4, abs_=0)  # fails on inf and NaN, too: the naive numbers are finite
        if sign < 0 and (dual is None or kind == "cispo"):  # the worst drift is still pushed down
            assert min(got[1][-5:]) > 0


@pytest.mark.parametrize("kind,aggregation", LOSSES)
def test_poison_in_masked_tokens_does_not_reach_loss_or_gradient(kind, aggregation):
    for seed, poison, dual in product(range(2), (NAN, INF, -INF), (None, 3.0)):
        batch = token_batch(seed)
        options = {"kind": kind, "aggregation": aggregation, "dual_clip": dual}
        clean = run_loss(*batch, **options)
        assert 0.0 in batch[3]
        for columns in ((0,), (1,), (0, 1), (2,), (5,), (0, 1, 2, 5)):  # logp, old, advantages, weights
            dirty = list(batch)
            for c in columns:
                dirty[c] = [v if m else poison for v, m in zip(batch[c], batch[3], strict=True)]
            assert run_loss(*dirty, **options) == clean


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_poison_in_masked_tokens_through_the_kl_term(kind):
    logp, ref, _, mask, ids, _ = token_batch(1)
    for poison in (NAN, -INF):
        x = tensor([v if m else poison for v, m in zip(logp, mask, strict=True)], grad=True)
        args = kl_estimate(x, tensor(ref), kind, tensor(mask)), tensor(mask), torch.tensor(ids)
        term = aggregate(*args, aggregation="token", denominator=3.0)
        term.backward()
        assert torch.isfinite(term) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("drift", [3e8, 1e10, float("inf")])
def test_saturation_keeps_its_value_and_slope_at_any_drift(drift):
    x = torch.tensor([drift, -drift], requires_grad=True)
    y = saturate(x)
    assert y.tolist() == [LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT]
    y.sum().backward()
    assert x.grad.tolist() == ([1.0, 1.0] if math.isfinite(drift) else [0.0, 0.0])


@pytest.mark.parametrize("kind,aggregation", LOSSES)
def test_losses_of_micro_batches_add_up(kind, aggregation):
    """Any split by whole sequences (one is empty), tokens in any order; with a KL term; metrics too."""

    def step(logp, old, adv, mask, ids, weights):
        x, o, keep, seq = tensor(logp, True), tensor(old), tensor(mask), tensor(ids, dtype=torch.long)
        shared = {"aggregation": aggregation, "denominator": DENOMINATOR}
        options = {"kind": kind, "dual_clip": 3.0, "weights": tensor(weights), **shared}
        loss, metrics = policy_loss(x, o, tensor(adv), keep, seq, **options)
        loss += 0.3 * aggregate(kl_estimate(x, o), keep, seq, **shared)
        loss.backward()
        return loss.item(), x.grad.tolist(), {name: m.item() for name, m in metrics.items()}

    for seed in range(6):
        rng, batch = random.Random(100 + seed), token_batch(seed)
        loss, grad, metrics = step(*batch)
        part_of = {identity: rng.randrange(4) for identity in sorted(set(batch[4]))}
        total, scattered, pieces = 0.0, {}, []
        for part in range(5):
            rows = [t for t in rng.sample(range(len(grad)), len(grad)) if part_of[batch[4][t]] == part]
            part_loss, part_grad, part_metrics = step(*([column[t] for t in rows] for column in batch))
            total += part_loss
            scattered.update(zip(rows, part_grad, strict=True))
            pieces.append(part_metrics)
        assert len(set(part_of.values())) > 1 and any(grad)
        close([total] + [scattered[t] for t in range(len(grad))], [loss] + grad, rel=1e-12)
        for name, whole in metrics.items():
            close((max if name == "ratio_max" else sum)([m[name] for m in pieces]), whole, rel=1e-12)


@pytest.mark.parametrize("kind", ["tis", "mis", "sequence-mask"])
def test_correction_matches_the_naive_loop(kind):
    seen = set()
    for seed, (cap, low, high) in product(range(6), ((2.0, 0.5, 5.0), (1.2, 0.8, 1.5))):
        trainer, sampler, _, _, ids, _ = token_batch(seed)
        args = tensor(trainer, True), tensor(sampler, True), torch.tensor(ids)
        got = correction_weights(*args, kind=kind, cap=cap, low=low, high=high)
        gaps = [a - b for a, b in zip(trainer, sampler, strict=True)]
        want = []
        for gap, identity in zip(gaps, ids, strict=True):
            mine = [g for g, i in zip(gaps, ids, strict=True) if i == identity]
            w, mean = math.exp(gap), math.exp(sum(mine) / len(mine))
            each = {"tis": min(w, cap), "mis": w if low <= w <= high else 0.0}
            want.append({**each, "sequence-mask": float(low <= mean <= high)}[kind])
        close(got, want)
        assert not got.requires_grad
        seen |= set(want)
        if cap == 2.0:
            assert torch.equal(correction_weights(*args, kind=kind), got)  # the defaults
        assert correction_weights(*args) is None and correction_weights(*args, kind="none") is None
    extreme = tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    got = correction_weights(extreme, torch.zeros(5), torch.arange(5), kind=kind)
    close(got, [0, 0, 1, 2, 2] if kind == "tis" else [0, 0, 1, 0, 0])
    assert {2.0, 1.2} <= seen if kind == "tis" else 0.0 in seen and len(seen) > 1


def test_mismatch_matches_the_naive_loop():
    for seed in range(4):
        trainer, sampler, *_ = token_batch(seed)
        sampler = [s if i % 3 else t - 0.05 for i, (s, t) in enumerate(zip(sampler, trainer, strict=True))]
        got = mismatch(tensor(trainer, True), tensor(sampler))
        gaps = [t - s for t, s in zip(trainer, sampler, strict=True)]
        assert not any(v.requires_grad for v in got.values())
        want = math.fsum(math.exp(g) - 1 - g for g in gaps), max(abs(g) for g in gaps)
        close((got["k3"].item(), got["max"].item()), want)
        assert got["beyond_10pct"].item() == sum(abs(math.exp(g) - 1) > 0.1 for g in gaps) > 0
    assert all(v.item() == 0 for v in mismatch(tensor([]), tensor([])).values())
    asymmetric = mismatch(tensor([0.0, 0.0]), tensor([0.1, -0.097]))  # pi_trainer / pi_sampler 0.905, 1.102
    assert asymmetric["beyond_10pct"].item() == 1


@pytest.mark.parametrize("call", [
    lambda: group_advantages(X, IDS, scale="std"),
    lambda: group_advantages(X, IDS, baseline="median"),
    lambda: group_advantages(X, IDS[:1]),
    lambda: group_advantages(X[None], IDS[None]),
    lambda: kl_estimate(X, X, "k4"),
    lambda: policy_loss(X, X, X, X, IDS, kind="grpo", denominator=1.0),
    lambda: policy_loss(X, X, X, X, IDS, aggregation="mean", denominator=1.0),
    lambda: aggregate(X, X, IDS, aggregation="mean", denominator=1.0),
    lambda: correction_weights(X, X, IDS, kind="clip"),
])  # fmt: skip
def test_unknown_names_and_wrong_shapes_raise(call):
    with pytest.raises(ValueError, match="must be"):
        call()
