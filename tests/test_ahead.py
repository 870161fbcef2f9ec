"""Rollouts that run ahead of the training: which weights sampled what, and that nothing depends on who is faster."""

from __future__ import annotations

import signal
import threading
import time
import traceback

import pytest
import torch
from ahead_runs import launch_two, own_sampler, samples, tokens, train, versions
from test_resume import KILL, weights

from recipes import REPO, grpo, metrics, run, write
from rewards import RewardError
from rl.check import preflight
from rl.grpo import GRPO
from rl.policy.processes import Processes
from rl.recipe_io import RecipeError, validate
from rl.rollout import LocalSampler

# Weights stay as they are, bit for bit: so whatever sampled, it is the policy of the start.
FROZEN = {"optimizer__learning_rate": 1e-30}
TIS = {"grpo__correction": {"kind": "tis"}}
# The reward of the small recipe, as one that may be called before all groups are complete.
EARLY = [{"path": f"{REPO / 'tests' / 'toy_rewards.py'}:digit_share", "per_group": True}]
# Of rewards that are often equal within a group: dynamic sampling has something to replace.
COARSE = (
    "def coarse(completions, **columns):\n    return [float(sum(c.isdigit() for c in t) > 2) for t in completions]\n"
)


def coarse(folder):
    (folder / "coarse.py").write_text(COARSE)
    return [{"path": f"{folder / 'coarse.py'}:coarse"}]


def learning(folder):
    """Metrics without what only a run with rollouts ahead has."""
    return [{k: v for k, v in line.items() if not k.startswith("staleness/")} for line in metrics(folder)]


# ---- which weights sampled what --------------------------------------------------------------------------


def test_a_sampler_of_its_own_changes_nothing_without_ahead(tmp_path):
    own = train(tmp_path / "own", 0)
    shared = train(tmp_path / "shared", 0, sampler=None)
    assert own.collector is None and not own.shares_weights and shared.shares_weights
    assert weights(tmp_path / "own") == weights(tmp_path / "shared")
    assert metrics(tmp_path / "own") == metrics(tmp_path / "shared")
    assert samples(tmp_path / "own") == samples(tmp_path / "shared")
    assert not any("staleness" in name or name == "time/wait" for line in metrics(tmp_path / "own") for name in line)


@pytest.mark.parametrize("ahead", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_is_sampled_by_the_weights_that_many_steps_before(ahead, tmp_path):
    train(tmp_path / "ahead", ahead, **TIS, grpo__steps=5)
    updates = 2  # of a step
    expected = {step: {max(0, step - 1 - ahead) * updates} for step in range(1, 6)}
    assert versions(tmp_path / "ahead") == expected
    for line in metrics(tmp_path / "ahead"):
        age = min(line["step"] - 1, ahead) * updates
        assert line["staleness/mean"] == line["staleness/max"] == age

    train(tmp_path / "now", 0, **TIS, grpo__steps=5)
    ids = {name: {s: [i for i, _ in rows] for s, rows in tokens(tmp_path / name).items()} for name in ("ahead", "now")}
    assert ids["ahead"] == ids["now"]  # the same prompts in the same order
    train(tmp_path / "frozen", 0, **FROZEN, grpo__steps=1 + ahead)
    ahead_tokens, now_tokens = tokens(tmp_path / "ahead"), tokens(tmp_path / "now")
    frozen = tokens(tmp_path / "frozen")
    for step in range(1, 2 + ahead):  # really those of the start, whatever they are called
        assert ahead_tokens[step] == frozen[step]
        assert (now_tokens[step] == frozen[step]) == (step == 1)
    assert ahead_tokens[2 + ahead] != now_tokens[2 + ahead]


def test_results_do_not_depend_on_who_is_faster(tmp_path, monkeypatch):
    train(tmp_path / "even", 1)
    with monkeypatch.context() as patch:
        real = LocalSampler.generate
        patch.setattr(LocalSampler, "generate", lambda *a, **k: (time.sleep(0.3), real(*a, **k))[1])
        train(tmp_path / "sampler", 1)
    with monkeypatch.context() as patch:
        update = GRPO.update
        patch.setattr(GRPO, "update", lambda *a: (time.sleep(0.15), update(*a))[1])
        training = train(tmp_path / "trainer", 1)
    assert training.collector is not None
    for other in ("sampler", "trainer"):
        assert weights(tmp_path / other) == weights(tmp_path / "even")
        assert metrics(tmp_path / other) == metrics(tmp_path / "even")
        assert samples(tmp_path / other) == samples(tmp_path / "even")


def test_rollout_and_training_run_at_the_same_time(tmp_path, monkeypatch):
    spans: dict[str, list[tuple[float, float]]] = {"collect": [], "update": []}

    def spanned(name):
        real = getattr(GRPO, name)

        def call(*a, **k):
            start = time.perf_counter()
            time.sleep(0.2)
            result = real(*a, **k)
            spans[name].append((start, time.perf_counter()))
            return result

        monkeypatch.setattr(GRPO, name, call)

    spanned("collect")
    spanned("update")
    train(tmp_path / "run", 1)
    rollouts, updates = spans["collect"], [spans["update"][i : i + 2] for i in range(0, 8, 2)]
    for step in range(2, 5):  # the rollout of a step, and the training of the step before
        (start, end), training = rollouts[step - 1], updates[step - 2]
        assert max(start, training[0][0]) < min(end, training[-1][1])


def test_a_sampler_that_keeps_its_weights_is_noticed(tmp_path):
    def stubborn(training):
        sampler = own_sampler(training)
        sampler.update_weights = lambda named, version: None
        return sampler

    with pytest.raises(RuntimeError, match="4 to 4 updates old, with at most 2 allowed"):
        train(tmp_path / "run", 1, stubborn)


# ---- with a learning rate of (nearly) zero ---------------------------------------------------------------


def test_without_learning_ahead_is_no_different(tmp_path):
    changes = {**FROZEN, "rewards": coarse(tmp_path), "grpo__dynamic_sampling": {"max_rounds": 2}}
    train(tmp_path / "now", 0, **changes)
    train(tmp_path / "ahead", 1, **changes)
    assert tokens(tmp_path / "ahead") == tokens(tmp_path / "now")
    assert learning(tmp_path / "ahead") == learning(tmp_path / "now")
    assert sum(line["groups/resampled"] for line in metrics(tmp_path / "now")) > 2


@pytest.mark.parametrize("ahead", [0, 1])
def test_without_learning_the_mismatch_does_not_grow(ahead, tmp_path):
    """The sampler computes in bfloat16 and gets its weights anew after every step: it must stay as far as it was."""
    train(tmp_path / "run", ahead, lambda t: own_sampler(t, torch.bfloat16), **FROZEN, grpo__steps=6)
    lines = metrics(tmp_path / "run")
    for name in ("mismatch/k3", "mismatch/max", "mismatch/beyond_10pct"):
        first, last = ([line[name] for line in part] for part in (lines[:3], lines[3:]))
        assert sum(last) <= 1.5 * sum(first)
    assert all(1e-7 < line["mismatch/k3"] < 1e-3 for line in lines)


# ---- several processes -----------------------------------------------------------------------------------


def test_two_processes_collect_what_one_does(tmp_path):
    """Dynamic sampling makes the collecting threads communicate while the trainers do."""
    changes = {**FROZEN, "rewards": coarse(tmp_path), "grpo__dynamic_sampling": {"max_rounds": 2}}
    train(tmp_path / "one", 0, **changes)
    recipe = grpo(tmp_path / "two", rollout__ahead=1, **changes)
    launch_two(write(tmp_path / "recipe.yaml", recipe))
    assert tokens(tmp_path / "two") == tokens(tmp_path / "one")
    assert versions(tmp_path / "two") == {1: {0}, 2: {0}, 3: {2}, 4: {4}}
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "groups/resampled", "groups/uniform", "length/mean", "completions"):
            assert two[name] == pytest.approx(one[name])
        assert two["staleness/max"] == (0 if two["step"] == 1 else 2)


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_stopped(tmp_path):
    changes = {**TIS, "rewards": coarse(tmp_path), "grpo__dynamic_sampling": {"max_rounds": 2}}
    for name, seconds in (("whole", ()), ("part", ("grpo.max_seconds=1e-9",))):
        recipe = write(tmp_path / f"{name}.yaml", grpo(tmp_path / name, rollout__ahead=1, **changes))
        if seconds:
            launch_two(recipe, *seconds)  # ends after its first step, in the midst of a rollout
            assert len(metrics(tmp_path / name)) == 1
        launch_two(recipe)
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    assert samples(tmp_path / "part") == samples(tmp_path / "whole")
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


# ---- killed and resumed ----------------------------------------------------------------------------------

STATEFUL = {
    **TIS,
    "rollout__ahead": 1,
    "grpo__kl": {"coefficient": 0.05},
    "grpo__reference": {"ema": 0.9},
    "grpo__dynamic_sampling": {"max_rounds": 2},
}
# As test_resume.py kills, but for the sampler; and in the rollout of step 4, while step 3 is being trained.
KILL_AHEAD = KILL.replace("strike(30)", "strike(170)").replace(
    "from rl.__main__ import main\nsys.exit(main(sys.argv[3:]))",
    f"sys.path.insert(0, {str(REPO / 'tests')!r})\nfrom ahead_runs import main\nmain(sys.argv[3:])",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder / "run", **ahead_changes(folder))
    assert sum(line["groups/resampled"] for line in metrics(folder / "run")) > 0
    return folder / "run"


def ahead_changes(folder):
    changes = {**STATEFUL, "rewards": coarse(folder), "grpo__steps": 5}
    return {"ahead": changes.pop("rollout__ahead"), **changes}


@pytest.mark.parametrize(
    "place", ["rollout", *(pytest.param(place, marks=pytest.mark.slow) for place in ("optimizer", "checkpoint"))]
)
def test_killed_and_resumed_equals_uninterrupted(place, uninterrupted, tmp_path):
    assert KILL_AHEAD != KILL
    changes = {**STATEFUL, "rewards": coarse(tmp_path), "grpo__steps": 5}
    recipe = write(tmp_path / "recipe.yaml", grpo(tmp_path / "run", **changes))
    once = tmp_path / "struck"
    killed = run(str(once), place, str(recipe), code=KILL_AHEAD)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert once.exists()  # in a rollout there may not be a checkpoint yet: it runs beside the training
    assert place == "rollout" or list((tmp_path / "run" / "checkpoints").glob("step_*"))
    resumed = run(str(once), place, str(recipe), code=KILL_AHEAD)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert metrics(tmp_path / "run") == metrics(uninterrupted)
    assert samples(tmp_path / "run") == samples(uninterrupted)
    assert [len(rows) for rows in samples(tmp_path / "run").values()] == [16] * 5  # nothing lost, nothing doubled


def test_a_checkpoint_holds_the_rollouts_that_come_next(tmp_path):
    train(tmp_path / "run", 2, grpo__steps=5, checkpoint__keep=5)
    for step in range(1, 6):
        state = torch.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state.pt", weights_only=True)
        pending = state["pending"]
        assert len(pending) >= min(2, 5 - step)
        for later, (part,) in enumerate(pending, start=step + 1):
            kept = [c["sample"]["token_ids"].tolist() for c in part["completions"]]
            assert kept == [row["token_ids"] for row in samples(tmp_path / "run")[later]]


# ---- what goes wrong -------------------------------------------------------------------------------------


def test_a_reward_that_raises_in_a_later_rollout_stops_the_training(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "calls = 0\n"
        "def broken(completions):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [len(c) / (3 - calls) for c in completions]\n"
    )
    steps, update = [], GRPO.update

    def slow(self, *a):
        steps.append(self.updates)
        time.sleep(0.5)
        return update(self, *a)

    monkeypatch.setattr(GRPO, "update", slow)
    rewards = [{"path": f"{tmp_path}/mine.py:broken"}]
    with pytest.raises(RewardError, match="'broken' raised ZeroDivisionError") as caught:
        train(tmp_path / "run", 1, rewards=rewards, grpo__minibatches_per_step=4, grpo__steps=3)
    assert len(steps) < 8  # step 2 was being trained, and was not brought to its end
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert "broken" in frames
    assert not [t for t in threading.enumerate() if t.name in ("rollout", "rewards")]


def test_a_reward_that_exits_ends_the_training(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\ndef leave(completions):\n    sys.exit(7)\n")
    for name, per_group in (("early", True), ("late", False)):
        with pytest.raises(SystemExit, match="7"):
            rewards = [{"path": f"{tmp_path}/mine.py:leave", "per_group": per_group}]
            train(tmp_path / name, 1, rewards=rewards)


def test_an_interrupt_ends_the_rollout_that_is_under_way(tmp_path, monkeypatch):
    def interrupted(self, *a):
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPO, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", 1, rollout__max_tokens=256)
    assert not [t for t in threading.enumerate() if t.name in ("rollout", "rewards")]


# ---- rewards while others are sampled --------------------------------------------------------------------


def test_rewards_of_complete_groups_are_computed_while_others_are_sampled(tmp_path, monkeypatch):
    train(tmp_path / "batch", 1, rollout__max_slots=4)
    calls, scored = [], GRPO.score

    def score(self, completions):
        calls.append((threading.current_thread().name, {c.group for c in completions}))
        scored(self, completions)

    monkeypatch.setattr(GRPO, "score", score)
    train(tmp_path / "early", 1, rollout__max_slots=4, rewards=EARLY)  # room for a single group at a time
    assert {thread for thread, _ in calls} == {"rewards"} and len(calls) > 4
    assert sum(len(groups) for _, groups in calls) == 16
    assert learning(tmp_path / "early") == learning(tmp_path / "batch")
    assert samples(tmp_path / "early") == samples(tmp_path / "batch")

    calls.clear()
    train(tmp_path / "late", 1, rollout__max_slots=4)  # a function of whose statistics we know nothing: one batch
    assert [groups for _, groups in calls] == [{0, 1, 2, 3}] * 4


# ---- weights into running rollouts -----------------------------------------------------------------------


class Midway(LocalSampler):
    """Samples prompt by prompt, and takes weights between two of them."""

    takes_weights_midway = True

    def __init__(self, training):
        plain = own_sampler(training)
        super().__init__(plain.model, plain.tokenizer, max_slots=plain.max_slots)
        self.lock = threading.Lock()

    def generate(self, prompts, params, *, streams=None):
        rows = []
        for prompt, stream in zip(prompts, streams, strict=True):
            with self.lock:
                rows += super().generate([prompt], params, streams=[stream])
            time.sleep(0.05)
        return rows

    def update_weights(self, named_tensors, version):
        with self.lock:
            super().update_weights(named_tensors, version)


def test_in_flight_weights_enter_rollouts_within_the_bound(tmp_path):
    train(tmp_path / "run", 2, Midway, **TIS, rollout__in_flight=True, grpo__steps=6, grpo__minibatches_per_step=1)
    found = versions(tmp_path / "run")
    assert any(len(mixed) > 1 for mixed in found.values())  # weights came in the midst of a step
    assert all(max(0, step - 3) <= min(v) <= max(v) < step for step, v in found.items())
    assert all(0 <= line["staleness/mean"] <= line["staleness/max"] <= 2 for line in metrics(tmp_path / "run"))


def test_in_flight_needs_a_sampler_that_can(tmp_path):
    with pytest.raises(RecipeError, match="rollout.in_flight: .* set rollout.engine: vllm, or in_flight: false"):
        train(tmp_path / "run", 1, rollout__in_flight=True)
    workers = {"rollout__mode": "server", "rollout__workers": {"count": 1}, "rollout__ahead": 1}
    with pytest.raises(RecipeError, match="rollout.in_flight: .* set rollout.engine: vllm"):
        preflight(validate(grpo(tmp_path / "run", **workers, rollout__in_flight=True)))
    preflight(validate(grpo(tmp_path / "run", **workers, rollout__in_flight=True, rollout__engine="vllm")))
    with pytest.raises(RecipeError, match="in_flight means nothing with ahead: 0"):
        validate(grpo(tmp_path / "run", rollout__in_flight=True))


# ---- what is refused and warned of -----------------------------------------------------------------------


def test_ahead_needs_weights_of_the_samplers_own(tmp_path):
    recipe = validate(grpo(tmp_path / "run", rollout__ahead=1))
    with pytest.raises(RecipeError, match="rollout.mode: server"):
        preflight(recipe)
    with pytest.raises(RecipeError, match="rollout.mode: server"):
        GRPO(recipe, Processes())


def test_check_warns_of_samples_whose_age_nothing_corrects(tmp_path):
    def warned(**changes):
        changes |= {"rollout__mode": "server", "rollout__workers": {"count": 1}}
        return [w for w in preflight(validate(grpo(tmp_path / "run", **changes))) if w.startswith("rollout.ahead")]

    (warning,) = warned(rollout__ahead=1)
    assert "correction.kind: tis" in warning
    assert not warned(rollout__ahead=1, **TIS) and not warned(rollout__ahead=1, grpo__old_logprobs="sampler")
    assert not warned(rollout__ahead=0)
    assert any("in_flight" in w for w in warned(rollout__ahead=2, **TIS))
