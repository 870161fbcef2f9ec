"""What a restarted worker is sent from the spool, and a broadcast in which a worker is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import pytest
import torch
from test_workers import PARAMS, PROBE, PROMPTS, local, logprobs, process, tokens
from tiny_models import tiny_model
from torch import Tensor
from worker_threads import SECRET, Running, sampler

from rl.policy.backend import block_of
from rl.rollout.local_engine import LocalEngine
from rl.rollout.workers.buckets import Damaged
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.collective import Broadcast, BroadcastFailed
from rl.rollout.workers.fleet import Fleet, FleetSettings, Worker
from rl.rollout.workers.sampler import WorkerSampler
from rl.rollout.workers.transfer import Spool, Transmission

Named = Iterable[tuple[str, Tensor]]


class EachOnce(LocalEngine):
    """As vLLM, which puts a layer into the form of its kernels when it is complete: a second value finds no place."""

    def update_weights(self, named_tensors: Named, version: int) -> None:
        seen: set[str] = set()

        def once() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named_tensors:
                if name in seen:
                    raise ValueError(f"{name} came twice")
                seen.add(name)
                yield name, tensor

        super().update_weights(once(), version)


def send(workers: list[Running], version: int, buckets: Iterable, transport: str = "files") -> Transmission:
    sending = Transmission([worker.client for worker in workers], version, transport)
    for bucket in buckets:
        sending.send(bucket)
    sending.finish()
    return sending


# ---- the spool ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["files", "http"])
def test_a_restarted_worker_gets_every_weight_once(tmp_path, transport):
    """As with adapters: the first time everything, then the blocks that have some. The first bucket has both."""
    old, new = tiny_model("llama", seed=9), tiny_model("llama", seed=10)
    changed = [(name, tensor) for name, tensor in new.named_parameters() if name.startswith("model.layers.")]
    names = {name for name, _ in changed}
    spool = Spool(tmp_path / "spool", limit=60_000)
    list(spool.write(old.named_parameters()))
    assert any(b.names & names and b.names - names for b in spool.buckets)
    list(spool.write(changed))
    with Running(spool.folder, engine=EachOnce(sampler(seed=1))) as worker:
        send([worker], 2, spool.buckets, transport)
        expected = dict(old.named_parameters())
        with torch.no_grad():
            for name, tensor in changed:
                expected[name].copy_(tensor)
        assert worker.client.score([PROBE.tokens])[0] == pytest.approx(logprobs(old), abs=1e-5)
    spool.close()
    assert not spool.folder.exists()


def test_the_spool_stays_as_large_as_the_weights(tmp_path):
    """Whichever part of them an update brings; layers stay whole."""
    model = tiny_model("llama", seed=9)
    weights = dict(model.named_parameters())
    blocks = sorted({block_of(name) for name in weights})
    spool = Spool(tmp_path / "spool", limit=60_000)
    list(spool.write(weights.items()))
    first = sum(file.stat().st_size for file in spool.folder.iterdir())
    for block in [*blocks, *blocks]:
        list(spool.write((name, tensor) for name, tensor in weights.items() if block_of(name) == block))
        held = [name for bucket in spool.buckets for name in bucket.names]
        assert sorted(held) == sorted(weights)
        assert sum(file.stat().st_size for file in spool.folder.iterdir()) < 1.2 * first
        assert {file.name for file in spool.folder.iterdir()} == {bucket.path.name for bucket in spool.buckets}
        assert all(bucket.size <= 65_000 for bucket in spool.buckets)  # with the header


def test_a_damaged_bucket_does_not_get_a_new_checksum(tmp_path):
    weights = {"a": torch.ones(8), "b": torch.ones(8)}
    spool = Spool(tmp_path / "spool", limit=1000)
    (bucket,) = spool.write(weights.items())
    data = bucket.path.read_bytes()
    bucket.path.write_bytes(data[:-1] + b"\1")
    with pytest.raises(Damaged, match="announced was"):
        list(spool.write([("a", torch.zeros(8))]))


# ---- a broadcast in which a worker is lost -----------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_that_does_not_receive_a_broadcast_is_no_refusal(tmp_path, rank):
    """All are given up with it, and none waits for a broadcast that cannot be; by http they take the weights."""
    model = tiny_model("llama", seed=9)
    spool = Spool(tmp_path / "spool", limit=20_000)
    with ExitStack() as stack:
        workers = [stack.enter_context(Running(spool.folder, seed=seed)) for seed in range(3)]
        clients = [worker.client for worker in workers]
        start = time.monotonic()
        sending = Transmission(clients, 5, "collective")
        for number, bucket in enumerate(spool.write(model.named_parameters())):
            if number == 1:
                group = workers[rank - 1].server.updates._current._broadcast
                fails(group, BroadcastFailed("the broadcast failed"))
            sending.send(bucket)
        assert sending.finish() == []
        assert time.monotonic() - start < clients[0].deadline_s
        assert set(sending.lost) == {client.url for client in clients}
        assert all(reason.startswith("the broadcast") for reason in sending.lost.values())
        assert all(worker.client.health().version == -1 and not worker.client.health().fault for worker in workers)
        assert not send(workers, 5, spool.buckets, "http").lost
        assert {worker.client.health().version for worker in workers} == {5}


def fails(broadcast: Broadcast, error: Exception) -> None:
    """From now on, as if a connection to another had been lost, or the memory were full."""

    def fail(_: Tensor | int) -> Tensor:
        raise error

    broadcast.send = broadcast.receive = fail


def test_what_a_worker_answers_that_was_given_up_is_no_refusal(tmp_path):
    spool = Spool(tmp_path / "spool", limit=1 << 20)
    with Running(spool.folder) as one:
        sending = Transmission([one.client], 5, "collective")
        fails(one.server.updates._current._broadcast, MemoryError("the memory is full"))
        fails(sending._broadcast, BroadcastFailed("the broadcast failed"))
        for bucket in spool.write(tiny_model("llama").named_parameters()):
            sending.send(bucket)
        assert sending.finish() == [] and sending.lost == {one.client.url: "the broadcast failed"}


def test_a_group_that_does_not_come_together_is_no_refusal(tmp_path):
    with Running(tmp_path) as one, Running(tmp_path) as two:
        quick = [WorkerClient(worker.client.url, SECRET, 2.0) for worker in (one, two)]
        two.server.shutdown()
        two.server.server_close()
        sending = Transmission(quick, 1, "collective")
        assert set(sending.lost) == {one.client.url, two.client.url} and sending.finish() == []


def test_an_update_goes_on_by_http_when_a_worker_is_killed_in_the_broadcast(tmp_path):
    model, newer = tiny_model("llama", seed=9), tiny_model("llama", seed=10)
    spool = Spool(tmp_path / "spool", limit=20_000)
    mine, said = process(tmp_path, spool, 0), []
    with Running(spool.folder) as one, Running(spool.folder, seed=1) as two:
        # The last of the ranks is the furthest from the sender: what is lost stands between them.
        workers = [Worker(one.client), Worker(WorkerClient(mine.url, SECRET, 60.0), mine), Worker(two.client)]
        settings = FleetSettings(transport="collective", say=said.append, start_timeout_s=300.0)
        fleet = Fleet(workers, spool, PROBE, settings)
        trainer = WorkerSampler([w.client for w in workers], fleet, probe=lambda: logprobs(model), wait_s=300.0)
        try:
            fleet.start()
            trainer.update_weights(model.named_parameters(), 1)
            assert trainer.sync.workers == 3
            trainer.probe = lambda: logprobs(newer)
            trainer.update_weights(struck(newer.named_parameters(), mine._process), 2)
            assert trainer.sync.workers == 0
            assert tokens(trainer.generate(PROMPTS, PARAMS)) == tokens(local(newer))
            until(lambda: all(w.up and w.client.health().version == 2 for w in workers), said)
            assert fleet.restarts == 1 and fleet.error is None
        finally:
            trainer.close()


def struck(named_tensors: Named, victim) -> Iterator[tuple[str, Tensor]]:
    """The weights; when some of them have been sent, a worker is killed."""
    for number, pair in enumerate(named_tensors):
        if number == 10:
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait(60)
        yield pair


def until(done, said: list[str]) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end, said
        time.sleep(0.1)
