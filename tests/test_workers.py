"""WorkerSampler over workers on threads, and over real processes that are killed and stopped."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tiny_models import EOS, tiny_model, token_lists, tokenizer
from worker_threads import SECRET, Running, sampler

from recipes import free_port
from rl.policy.load import character_tokenizer
from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.local_engine import LocalEngine
from rl.rollout.probe import ProbeFailed
from rl.rollout.workers import command
from rl.rollout.workers.client import Unreachable, WorkerClient
from rl.rollout.workers.fleet import Fleet, FleetSettings, Probe, Worker
from rl.rollout.workers.launch import StartFailed, WorkerProcess, write_secret
from rl.rollout.workers.sampler import WorkerSampler
from rl.rollout.workers.transfer import Spool

PROMPTS = token_lists([3, 17, 1, 8, 5, 12, 2, 30])
PARAMS = SamplingParams(n=3, max_tokens=12, seed=4, temperature=0.8)
PROBE = Probe(token_lists([40])[0], tolerance=0.01)


def served(workers, spool, model, *, deadline_s=60.0, in_flight=256, wait_s=60.0, probe=None, **settings):
    """A sampler over (client, process or None) pairs, whose trainer's model is `model`."""
    settings = FleetSettings(transport="files", say=lambda text: None, **settings)
    fleet = Fleet([Worker(client, process) for client, process in workers], spool, PROBE, settings)

    clients = [WorkerClient(client.url, SECRET, deadline_s) for client, _ in workers]
    return WorkerSampler(clients, fleet, probe=probe or (lambda: logprobs(model)), in_flight=in_flight, wait_s=wait_s)


def tokens(rows):
    return [[s.token_ids for s in row] for row in rows]


def local(model, prompts=PROMPTS, params=PARAMS, streams=None):
    return LocalSampler(model, tokenizer(EOS), max_slots=4).generate(prompts, params, streams=streams)


@pytest.fixture
def spool(tmp_path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", limit=20_000)
    yield made
    made.close()


# ---- workers on threads ------------------------------------------------------------------------------


def test_two_workers_give_what_one_sampler_gives(spool):
    model = tiny_model("llama", seed=9)
    streams = list(range(100, 108))
    with Running(spool.folder) as one, Running(spool.folder) as two:
        workers = served([(one.client, None), (two.client, None)], spool, model, in_flight=6)
        workers.fleet.start()
        with pytest.raises(RuntimeError, match="no weights yet"):
            workers.generate(PROMPTS, PARAMS)
        workers.update_weights(model.named_parameters(), 1)
        assert workers.sync.workers == 2 and workers.sync.bytes > 100_000 and workers.sync.probe < 1e-4
        progress = []
        workers.progress = lambda done, of: progress.append((done, of))
        got = workers.generate(PROMPTS, PARAMS, streams=streams)
        expected = local(model, streams=streams)
        assert tokens(got) == tokens(expected)
        for mine, theirs in zip(got, expected, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and a.weights_version == 1
                assert a.finish_reason == b.finish_reason
        assert progress and all(of == 24 for _, of in progress)
        assert workers.generate([], PARAMS) == []
        assert len(workers.generate(PROMPTS[:1], SamplingParams(max_tokens=3))[0]) == 1  # a seed of its own
        model = tiny_model("llama", seed=10)
        workers.probe = lambda: logprobs(model)
        workers.update_weights(model.named_parameters(), 2)
        assert tokens(workers.generate(PROMPTS, PARAMS)) == tokens(local(model))
        assert one.client.health().busy == two.client.health().busy == 0
        assert one.loop._held == two.loop._held == {}  # nothing is kept that was fetched
        workers.close()


def test_two_threads_sample_at_the_same_time(spool):
    """As rollouts ahead and an evaluation do: other settings, and what one shows is not shown for the other."""
    model = tiny_model("llama", seed=9)
    shown: dict[str, list[tuple[int, int]]] = {"rollout": [], "evaluation": []}
    calls = {"rollout": (PROMPTS, PARAMS), "evaluation": (PROMPTS[:5], SamplingParams(n=2, max_tokens=9, seed=8))}
    got = {}
    with Running(spool.folder) as one, Running(spool.folder) as two:
        workers = served([(one.client, None), (two.client, None)], spool, model, in_flight=6)
        workers.fleet.start()
        workers.update_weights(model.named_parameters(), 1)
        workers.stale[one.client.url] = ["a key of a call that has ended"]

        def sample(name):
            mine = copy.copy(workers)
            mine.progress = lambda *counts: shown[name].append(counts)
            got[name] = mine.generate(*calls[name])

        threads = [threading.Thread(target=sample, args=(name,)) for name in calls]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        for name, (prompts, params) in calls.items():
            assert tokens(got[name]) == tokens(local(model, prompts, params))
            assert shown[name][-1] == (len(prompts) * params.n,) * 2
        assert workers.stale == {} and one.loop._held == two.loop._held == {}
        workers.close()


def logprobs(model) -> list[float]:
    ids = torch.tensor([PROBE.tokens])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()


def test_a_worker_that_does_not_use_its_weights_is_caught(spool):
    class Stale(LocalEngine):
        """Keeps its old head, as an engine with a packed copy of it would."""

        def update_weights(self, named_tensors, version):
            super().update_weights((pair for pair in named_tensors if pair[0] != "lm_head.weight"), version)

    model = tiny_model("llama", seed=9)
    with Running(spool.folder, engine=Stale(sampler())) as one:
        workers = served([(one.client, None)], spool, model)
        workers.fleet.start()
        with pytest.raises(ProbeFailed, match="update 1"):
            workers.update_weights(model.named_parameters(), 1)
        workers.close()


def test_every_process_hears_that_an_update_failed(spool):
    """Two samplers as two processes would have them; the second has no fleet."""
    model = tiny_model("llama", seed=9)
    barrier, box, raised = threading.Barrier(2), [None, None], []

    def share(rank):
        def gather(value):
            box[rank] = value
            barrier.wait()
            values = list(box)
            barrier.wait()
            return values

        return gather

    with Running(spool.folder) as one:
        first = served([(one.client, None)], spool, model, probe=lambda: [0.0] * 39)  # a trainer of other weights
        second = WorkerSampler([one.client], None, probe=lambda: [0.0] * 39)
        first.share, second.share = share(0), share(1)
        first.fleet.start()

        def update(sampler):
            with pytest.raises(RuntimeError) as error:
                sampler.update_weights(model.named_parameters(), 1)
            raised.append(str(error.value))

        threads = [threading.Thread(target=update, args=(s,)) for s in (first, second)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        assert len(raised) == 2 and all("trainer's mean log-probability" in text for text in raised)
        assert first.version == second.version == -1
        first.close()


def test_without_any_worker_there_is_a_clear_end(spool):
    model = tiny_model("llama", seed=9)
    with Running(spool.folder) as one:
        url = one.client.url
        workers = served([(one.client, None)], spool, model, wait_s=1.0, deadline_s=2.0)
        workers.fleet.start()
        workers.update_weights(model.named_parameters(), 1)
    with pytest.raises(RuntimeError, match=f"no rollout worker for .* 8 of 8 prompts to do .*{url}.*refused"):
        workers.generate(PROMPTS, PARAMS)
    workers.close()
    with pytest.raises(RuntimeError, match="did not start.*not there after 0.1 s: .*refused"):
        served([(one.client, None)], spool, model, start_timeout_s=0.1).fleet.start()


def test_a_worker_of_others_that_comes_back_gets_the_weights_and_goes_on(spool):
    """Refused connections, until its owner starts it again at its address with whatever weights."""
    model, port = tiny_model("llama", seed=9), free_port()
    with Running(spool.folder, port=port) as one:
        quick = WorkerClient(one.client.url, SECRET, deadline_s=2.0)
        workers = served([(quick, None)], spool, model, wait_s=60.0)
        workers.fleet.start()
        workers.update_weights(model.named_parameters(), 1)
        assert tokens(workers.generate(PROMPTS, PARAMS)) == tokens(local(model))
    again = []
    timer = threading.Timer(1.0, lambda: again.append(Running(spool.folder, seed=3, port=port)))
    timer.start()
    assert tokens(workers.generate(PROMPTS, PARAMS)) == tokens(local(model))
    workers.close()
    again[0].__exit__()


def test_a_wrong_secret_is_noticed_at_the_start(spool):
    with Running(spool.folder) as one:
        stranger = WorkerClient(one.client.url, "another secret 1234", 10.0)
        with pytest.raises(RuntimeError, match="secret is missing or another"):
            served([(stranger, None)], spool, tiny_model("llama")).fleet.start()


# ---- worker processes --------------------------------------------------------------------------------


LONG = SamplingParams(n=2, max_tokens=80, min_tokens=80, seed=1)
MANY = token_lists([5 + i % 7 for i in range(12)])


def strike(client: WorkerClient, process: WorkerProcess, number: signal.Signals) -> threading.Thread:
    """Sends a signal to the worker when it is in the middle of sampling."""

    def wait_and_kill() -> None:
        while client.health().steps < 10:
            time.sleep(0.01)
        os.kill(process._process.pid, number)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_a_process_killed_in_the_middle_is_replaced_while_another_worker_goes_on(tmp_path, spool):
    model = tiny_model("llama", seed=9)
    with Running(spool.folder) as other:
        mine = process(tmp_path, spool, 0)
        client = WorkerClient(mine.url, SECRET, 10.0)
        workers = served([(client, mine), (other.client, None)], spool, model, wait_s=300.0, in_flight=8)
        try:
            workers.fleet.start()
            workers.update_weights(model.named_parameters(), 3)
            first = mine._process.pid
            striker = strike(client, mine, signal.SIGKILL)
            got = workers.generate(MANY, LONG)
            striker.join()
            assert tokens(got) == tokens(local(model, MANY, LONG))
            assert {s.weights_version for row in got for s in row} == {3} and workers.moved > 0
            end = time.monotonic() + 300
            while not workers.fleet.workers[0].up or mine._process.pid == first:
                assert time.monotonic() < end, workers.fleet.workers[0].reason
                time.sleep(0.1)
            assert client.health().version == 3  # nobody told it but the spool
            assert client.score([PROBE.tokens])[0] == pytest.approx(logprobs(model), abs=1e-4)
        finally:
            workers.close()
    assert mine._process.poll() is not None


@pytest.mark.slow
def test_one_killed_and_one_stopped_at_the_same_time(tmp_path, spool):
    """Nobody is left; the run waits until both are there again, with the right weights."""
    model = tiny_model("llama", seed=9)
    processes = [process(tmp_path, spool, number) for number in range(2)]
    pairs = [(WorkerClient(p.url, SECRET, 4.0), p) for p in processes]
    workers = served(pairs, spool, model, deadline_s=4.0, wait_s=300.0, start_timeout_s=300.0, in_flight=12)
    try:
        workers.fleet.start()
        workers.update_weights(model.named_parameters(), 3)
        first = [p._process.pid for p in processes]
        signals = (signal.SIGKILL, signal.SIGSTOP)
        strikers = [strike(client, p, number) for (client, p), number in zip(pairs, signals, strict=True)]
        got = workers.generate(MANY, LONG)
        for striker in strikers:
            striker.join()
        assert tokens(got) == tokens(local(model, MANY, LONG))
        assert {s.weights_version for row in got for s in row} == {3}
        assert workers.moved > 0 and workers.fleet.restarts >= 2
        assert not set(first) & {p._process.pid for p in processes}
    finally:
        workers.close()
    assert all(p._process.poll() is not None for p in processes)


def process(folder, spool, number: int, python: str | None = None, **options) -> WorkerProcess:
    """A worker of other weights than the trainer's."""
    tiny_model("llama", seed=1).save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    (folder / "secret").write_text(SECRET)
    return WorkerProcess(
        number,
        folder,
        engine="local",
        model=str(folder / "model"),
        secret_file=folder / "secret",
        host="127.0.0.1",
        port=0,
        bucket_folder=spool.folder,
        python=python,
        env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cores=None,
        options={"dtype": "float32", "max_slots": 4, **options},
    )


def test_a_worker_that_cannot_start_says_why(tmp_path, spool, capsys):
    (tmp_path / "secret").write_text("short")
    arguments = ["--model", str(tmp_path), "--secret-file", str(tmp_path / "secret")]
    assert command.main(arguments) == 2
    assert "at least 16 printable" in capsys.readouterr().err
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "empty").mkdir()
    arguments[1] = str(tmp_path / "empty")
    for options, says in (
        (["max_slot=4"], "no option max_slot"),
        (["max_slots"], "must look like name=value"),
        (["--cores", "3-1"], "must look like 0-3"),
        ([], "model.path"),
    ):
        assert command.main([*arguments, *options]) == 2
        assert says in capsys.readouterr().err
    broken = process(tmp_path, spool, 0, python="/bin/false")
    broken.start()
    with pytest.raises(StartFailed, match="worker 0 ended with status 1"):
        broken.wait(60)
    broken.close()


def test_a_worker_whose_engine_failed_says_why_before_it_ends(tmp_path, monkeypatch):
    class Failing(LocalEngine):
        def step(self):
            raise RuntimeError("out of luck")

        def idle(self):
            return False

    monkeypatch.setattr(command, "make_engine", lambda *_: Failing(sampler()))
    monkeypatch.setattr(command, "LAST_WORDS_S", 60.0)  # it is ended as soon as they were heard
    (tmp_path / "secret").write_text(SECRET)
    port, heard = free_port(), []

    def ask():
        client = WorkerClient(f"http://127.0.0.1:{port}", SECRET, 10.0)
        end = time.monotonic() + 60
        while not heard and time.monotonic() < end:
            try:
                client.health()
            except Unreachable as error:
                if "luck" in str(error):
                    heard.append(str(error))
                    os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    thread = threading.Thread(target=ask)
    thread.start()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = command.main(["--model", "m", "--secret-file", str(tmp_path / "secret"), "--port", str(port)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    thread.join()
    assert status == 1 and heard == ["the engine failed: RuntimeError: out of luck"]


def test_a_new_secret_is_for_this_user_alone(tmp_path):
    secret = write_secret(tmp_path / "workers" / "secret")
    path = tmp_path / "workers" / "secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(secret) >= 32 and secret == path.read_text().strip()
    assert write_secret(path) != secret
