"""A worker whose engine fails, is slow, or loses a reply: what the trainer gets to hear."""

from __future__ import annotations

import pytest
import torch
from test_rollout_server import PARAMS, requests
from tiny_models import tiny_model
from worker_threads import Running, sampler

from rl.rollout.local_engine import LocalEngine
from rl.rollout.workers.buckets import checksum, packed, total_checksum
from rl.rollout.workers.client import Refusal, WorkerClient
from rl.rollout.workers.wire import Begin, Bucket, Finish, settings_of


def test_why_an_update_failed_is_said_again(tmp_path):
    """As often as it is asked for, as the reply was lost; until another one begins."""
    weights = [("model.layers.9.weight", torch.zeros(2))]

    def sent(client: WorkerClient) -> Finish:
        ((_, data),) = packed(weights, 1 << 20)
        client.begin(Begin(version=1, transport="http"))
        client.bucket(Bucket(version=1, index=0, bytes=len(data), checksum=checksum(data)), data)
        return Finish(version=1, buckets=1, checksum=total_checksum([checksum(data)]))

    with Running(tmp_path) as worker:
        message, said = sent(worker.client), []
        for _ in range(3):
            with pytest.raises(Refusal, match="layers.9") as error:
                worker.client.finish(message)
            said.append(error.value.status)
        assert said == [500, 500, 500]
        with pytest.raises(Refusal, match="begin one"):
            worker.client.finish(message.model_copy(update={"version": 2}))
        message = sent(worker.client)
        worker.loop.stop()
        for _ in range(2):
            with pytest.raises(Refusal, match="not running") as error:
                worker.client.finish(message)
            assert error.value.status == 409
        worker.client.begin(Begin(version=1, transport="http"))
        with pytest.raises(Refusal, match="0 arrived"):
            worker.client.finish(message)


def test_an_engine_that_has_all_weights_may_be_silent_for_long(tmp_path):
    """As one that then hands them to several processes, which load them."""
    ages = []

    class Slow(LocalEngine):
        def update_weights(self, named_tensors, version):
            super().update_weights(named_tensors, version)
            ages.append(worker.client.health().heartbeat_s)

    with Running(tmp_path, engine=Slow(sampler())) as worker:
        worker.loop.update(list(tiny_model("llama", seed=9).named_parameters()), 1, False)
        assert ages[0] < -500  # its last sign of life lies ahead: minutes until it counts as stuck
        assert worker.client.health().heartbeat_s >= 0  # afterwards as ever


def test_a_batch_that_the_engine_fails_at_is_answered(tmp_path):
    class Failing(LocalEngine):
        def submit(self, key, prompt, params, stream):
            if len(prompt) == 17:
                raise RuntimeError("out of luck")
            super().submit(key, prompt, params, stream)

    with Running(tmp_path, engine=Failing(sampler())) as worker:
        worker.client.generate(requests(), settings_of(PARAMS), version=None)
        keys, samples, errors = {f"k{i}" for i in range(5)}, {}, {}
        for _ in range(60):
            done = worker.client.results(sorted(keys - samples.keys() - errors.keys()), [], wait_s=1.0)
            samples, errors = samples | done[0], errors | done[1]
            if len(samples) + len(errors) == 5:
                break
        assert errors == {"k1": "RuntimeError: out of luck"} and samples.keys() == keys - {"k1"}
