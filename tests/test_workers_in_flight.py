"""Weights that enter running rollouts: which version samples what, who waits, and no prompt lost or doubled."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import ahead_runs
import pytest
from test_rollout_server import fetched, logprobs, requests
from test_workers import PARAMS, PROBE, PROMPTS, local, served, tokens
from tiny_models import tiny_model
from worker_threads import SECRET, PromptByPrompt, Running, sampler

from recipes import free_port, metrics
from rl.rollout import Sample
from rl.rollout.engine import RestartNeeded
from rl.rollout.probe import probe_tokens
from rl.rollout.sync import probe_logprobs
from rl.rollout.workers.client import Refusal, WorkerClient
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe, Worker
from rl.rollout.workers.sampler import WorkerSampler
from rl.rollout.workers.transfer import Spool
from rl.rollout.workers.wire import settings_of

KEYS = [f"k{i}" for i in range(len(PROMPTS))]
SETTINGS = settings_of(PARAMS)


@pytest.fixture
def spool(tmp_path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", limit=20_000)
    yield made
    made.close()


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def busy(worker: Running) -> int:
    return worker.client.health().busy


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# ---- one worker --------------------------------------------------------------------------------------


def test_an_update_enters_and_the_probe_is_scored_while_requests_wait(tmp_path):
    engine, new = PromptByPrompt(sampler(), allowed=3), tiny_model("llama", seed=9)
    with Running(tmp_path, engine=engine) as worker:
        worker.client.generate(requests(PROMPTS), SETTINGS, version=None)
        until(lambda: busy(worker) == 5)
        (scores,) = worker.loop.update(new.named_parameters(), 7, True, [PROBE.tokens])
        assert scores == pytest.approx(logprobs(new, PROBE.tokens), abs=1e-5)
        assert worker.client.score([PROBE.tokens]) == [scores]
        assert busy(worker) == 5 and worker.client.health().version == 7
        engine.allowed = 5
        got = fetched(worker.client, KEYS)
    assert [got[key][0].weights_version for key in KEYS] == [-1] * 3 + [7] * 5
    before, after = local(tiny_model("llama", seed=0)), local(new)
    assert tokens(got[key] for key in KEYS) == tokens([*before[:3], *after[3:]])


@pytest.mark.parametrize("restarts", [False, True])
def test_where_the_engine_cannot_the_update_waits_and_nothing_is_lost(restarts, tmp_path):
    """Requests that come meanwhile wait too; also while an engine is started anew, as vLLM's with experts on CPU."""

    class Between(PromptByPrompt):
        takes_weights_midway = False

        def update_weights(self, named_tensors, version):
            assert self.idle()
            if restarts:
                raise RestartNeeded("this engine cannot")
            super().update_weights(named_tensors, version)

    def remake(named_tensors, version):
        time.sleep(0.5)
        other = PromptByPrompt(sampler())
        other.update_weights(named_tensors, version)
        return other

    engine, new = Between(sampler(), allowed=2), tiny_model("llama", seed=9)
    with Running(tmp_path, engine=engine) as worker:
        worker.loop.remake = remake
        worker.client.generate(requests(PROMPTS[:5]), SETTINGS, version=None)
        until(lambda: busy(worker) == 3)
        updating = in_thread(lambda: worker.loop.update(new.named_parameters(), 1, True, [PROBE.tokens]))
        until(lambda: len(worker.loop._commands) == 1)
        worker.client.generate(requests(PROMPTS[:2], prefix="later"), SETTINGS, version=None)
        assert updating.is_alive() and worker.client.health().version == -1
        engine.allowed = 99
        got = fetched(worker.client, [*KEYS[:5], "later0", "later1"])
        updating.join(60)
        assert worker.client.health().fault is None and not updating.is_alive()
    assert {key: row[0].weights_version for key, row in got.items()} == {
        **dict.fromkeys(KEYS[:5], -1),
        **dict.fromkeys(["later0", "later1"], 1),
    }
    assert tokens([got["later0"], got["later1"]]) == tokens(local(new)[:2])


def test_newer_weights_will_do_where_they_may_and_older_ones_never(tmp_path):
    released = threading.Event()

    class Held(PromptByPrompt):
        def step(self):
            released.wait(60)
            return super().step()

    with Running(tmp_path, engine=Held(sampler())) as worker:
        client = worker.client
        worker.loop.update((), 3, False)
        for version, or_newer in ((4, False), (4, True), (2, False)):
            with pytest.raises(Refusal, match=f"version {version} was asked for, this worker has 3"):
                client.generate(requests(), SETTINGS, version, or_newer)
        client.generate(requests(PROMPTS[:1], "two"), SETTINGS, 2, True)
        until(lambda: not worker.loop._commands)  # its engine is in a step
        updating = in_thread(lambda: worker.loop.update((), 4, True))
        until(lambda: len(worker.loop._commands) == 1)
        client.generate(requests(PROMPTS[:1], "exact"), SETTINGS, 3)
        client.generate(requests(PROMPTS[:1], "newer"), SETTINGS, 3, True)
        released.set()
        updating.join(60)
        got = fetched(client, ["two0", "newer0"])
        assert [got[key][0].weights_version for key in ("two0", "newer0")] == [3, 4]
        with pytest.raises(Refusal, match="unknown key exact0"):
            client.results(["exact0"], [], 0.0)


# ---- a sampler over workers --------------------------------------------------------------------------


def streaming(workers: WorkerSampler) -> tuple[list[tuple[int, list[Sample]]], threading.Thread]:
    """(place, samples) of all prompts as they come, by a thread."""
    arrived: list[tuple[int, list[Sample]]] = []

    def run() -> None:
        for groups in workers.stream(PROMPTS, PARAMS):
            arrived.extend(groups)

    return arrived, in_thread(run)


def assert_drawn(arrived, version_of, models):
    """Every prompt once, by the version that is expected, and with the tokens of that version's weights."""
    assert sorted(place for place, _ in arrived) == list(range(len(PROMPTS)))
    rows = {version: local(model) for version, model in models.items()}
    for place, samples in arrived:
        (version,) = {sample.weights_version for sample in samples}
        assert version == version_of(place)
        assert tokens([samples]) == tokens([rows[version][place]])


def test_a_rollout_goes_on_through_an_update(spool):
    """Two trainer processes, of which the first sends: what the second asks for is drawn by what it was told of."""
    old, new = (tiny_model("llama", seed=seed) for seed in (9, 10))
    engines = [PromptByPrompt(sampler(), allowed=2) for _ in range(2)]
    with Running(spool.folder, engine=engines[0]) as one, Running(spool.folder, engine=engines[1]) as two:
        workers = served([(one.client, None), (two.client, None)], spool, old, in_flight=6)  # two prompts a worker
        second = WorkerSampler([one.client], None, probe=lambda: [], takes_weights_midway=True)
        workers.takes_weights_midway = True
        workers.fleet.start()
        workers.update_weights(old.named_parameters(), 1)
        second.update_weights((), 1)
        arrived, rollout = streaming(workers)
        until(lambda: len(arrived) == 4)
        early = {place for place, _ in arrived}
        workers.probe = lambda: logprobs(new, PROBE.tokens)
        workers.update_weights(new.named_parameters(), 2)
        assert len(arrived) == 4 and busy(one) == busy(two) == 2
        assert workers.version == 2 and workers.sync.workers == 2 and workers.sync.probe < 1e-4

        engines[0].allowed = 99
        others, beside = streaming(second)
        time.sleep(1.0)
        assert not others  # of a version that the second process has not heard of
        second.update_weights((), 2)
        engines[1].allowed = 99
        for thread in (rollout, beside):
            thread.join(120)
        assert_drawn(arrived, lambda place: 1 if place in early else 2, {1: old, 2: new})
        assert_drawn(others, lambda place: 2, {2: new})
        assert workers.moved == second.moved == 0
        workers.close()


def test_a_worker_that_was_lost_comes_back_with_the_newest_weights(spool):
    old, new, port = tiny_model("llama", seed=9), tiny_model("llama", seed=10), free_port()
    engines = [PromptByPrompt(sampler(seed), allowed=1) for seed in (0, 0, 3)]
    with ExitStack() as stack:
        two = stack.enter_context(Running(spool.folder, engine=engines[1]))
        with Running(spool.folder, engine=engines[0], port=port) as one:
            quick = WorkerClient(one.client.url, SECRET, deadline_s=10.0)
            workers = served([(quick, None), (two.client, None)], spool, old, wait_s=120.0, in_flight=6)
            workers.takes_weights_midway = True
            workers.fleet.start()
            workers.update_weights(old.named_parameters(), 1)
            arrived, rollout = streaming(workers)
            until(lambda: len(arrived) == 2)
        early = {place for place, _ in arrived}
        workers.probe = lambda: logprobs(new, PROBE.tokens)
        workers.update_weights(new.named_parameters(), 2)
        assert workers.sync.workers == 1
        stack.enter_context(Running(spool.folder, engine=engines[2], port=port))
        until(lambda: len(arrived) == 3)  # by the one that is back: the other samples nothing yet
        assert quick.health().version == 2
        engines[1].allowed = engines[2].allowed = 99
        rollout.join(120)
        assert_drawn(arrived, lambda place: 1 if place in early else 2, {1: old, 2: new})
        workers.close()


# ---- a whole run -------------------------------------------------------------------------------------


def test_grpo_with_weights_into_running_rollouts(tmp_path, spool):
    class Slow(PromptByPrompt):
        def step(self):
            time.sleep(0.1)  # so that an update comes in the midst of a rollout
            return super().step()

    with ExitStack() as stack:

        def worker(training):
            running = stack.enter_context(Running(spool.folder, engine=Slow(ahead_runs.own_sampler(training))))
            probe = Probe(probe_tokens(len(training.tokenizer)), tolerance=1e-3)
            settings = FleetSettings(transport="files", say=lambda text: None)
            fleet = Fleet([Worker(running.client)], spool, probe, settings)
            fleet.start()
            expected = lambda: probe_logprobs(training.policy, probe.tokens)  # noqa: E731
            return WorkerSampler([running.client], fleet, probe=expected, takes_weights_midway=True)

        changes = {"rollout__in_flight": True, "grpo__correction": {"kind": "tis"}, "grpo__minibatches_per_step": 1}
        ahead_runs.train(tmp_path / "run", 2, worker, **changes, grpo__steps=5)
    found = ahead_runs.versions(tmp_path / "run")
    assert any(len(versions) > 1 for versions in found.values())
    assert all(max(0, step - 3) <= min(v) <= max(v) < step for step, v in found.items())
    ids = [name for rows in ahead_runs.tokens(tmp_path / "run").values() for name, _ in rows]
    assert len(ids) == 5 * 16 and set(Counter(ids).values()) == {4}  # four samples of each of 20 prompts
    assert all(line["sync/probe"] < 1e-4 for line in metrics(tmp_path / "run"))
