"""A worker's HTTP server, its engine on a thread of this process: answers, refusals, updates by every transport."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
import torch
from tiny_models import EOS, tiny_model, token_lists, tokenizer
from worker_threads import SECRET, Running, sampler

from rl.policy.load import character_tokenizer
from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.engine import RestartNeeded
from rl.rollout.local_engine import LocalEngine
from rl.rollout.workers.buckets import checksum, packed, total_checksum
from rl.rollout.workers.client import Refusal, Unreachable, WorkerClient
from rl.rollout.workers.command import Remake
from rl.rollout.workers.transfer import Spool, TransferError, Transmission
from rl.rollout.workers.wire import Begin, Bucket, Finish, Request, settings_of

PROMPTS = token_lists([3, 17, 1, 8, 5])
PARAMS = SamplingParams(n=3, max_tokens=12, seed=4, temperature=0.8)


@pytest.fixture
def worker(tmp_path):
    with Running(tmp_path) as running:
        yield running


def requests(prompts=PROMPTS, prefix: str = "k") -> list[Request]:
    return [Request(key=f"{prefix}{i}", prompt=p, stream=i) for i, p in enumerate(prompts)]


def fetched(client: WorkerClient, keys: list[str]) -> dict:
    got: dict = {}
    while len(got) < len(keys):
        samples, errors = client.results([k for k in keys if k not in got], list(got), wait_s=1.0)
        assert not errors
        got |= samples
    return got


# ---- sampling ----------------------------------------------------------------------------------------


def test_groups_are_those_of_the_sampler_and_a_key_is_sampled_once(worker):
    client, keys = worker.client, [f"k{i}" for i in range(5)]
    client.generate(requests(), settings_of(PARAMS), version=None)
    client.generate(requests(), settings_of(PARAMS), version=None)  # the reply to the first was lost, say
    got = fetched(client, keys)
    for key, row in zip(keys, sampler().generate(PROMPTS, PARAMS), strict=True):
        assert [(s.token_ids, s.logprobs, s.finish_reason) for s in got[key]] == [
            (s.token_ids, s.logprobs, s.finish_reason) for s in row
        ]
    steps, last = client.health().steps, list(got)[-1]  # the last to come has not been forgotten
    client.generate([r for r in requests() if r.key == last], settings_of(PARAMS), version=None)
    assert client.results([last], [], 0.0)[0] == {last: got[last]}
    assert client.health().steps == steps
    client.abort(keys)
    with pytest.raises(Refusal, match=f"unknown key {last}"):
        client.results([last], [], 0.0)


def test_a_bad_prompt_is_an_error_of_its_own(worker):
    worker.client.generate(requests([[5, 6], [5, 101]]), settings_of(PARAMS), version=None)
    samples: dict = {}
    errors: dict = {}
    while len(samples) + len(errors) < 2:
        done = {*samples, *errors}
        more, wrong = worker.client.results([k for k in ("k0", "k1") if k not in done], [], 1.0)
        samples |= more
        errors |= wrong
    assert len(samples["k0"]) == 3
    assert "vocabulary of 101" in errors["k1"]


def test_other_versions_are_refused_and_aborted_requests_forgotten(worker):
    with pytest.raises(Refusal, match="version 3 was asked for, this worker has -1"):
        worker.client.generate(requests(), settings_of(PARAMS), version=3)
    worker.client.generate(requests(), settings_of(PARAMS), version=None)
    worker.client.abort(None)
    assert worker.client.health().busy == 0
    worker.client.generate(requests(prefix="n"), settings_of(PARAMS), version=None)  # and it goes on
    assert len(fetched(worker.client, ["n0", "n1"])) == 2


def test_an_engine_that_fails_is_seen(tmp_path):
    class Failing(LocalEngine):
        def step(self):
            raise RuntimeError("out of memory")

    with Running(tmp_path, engine=Failing(sampler())) as worker:
        worker.client.generate(requests(), settings_of(PARAMS), version=None)
        with pytest.raises((Unreachable, Refusal), match="out of memory"):
            for _ in range(50):
                worker.client.results(["k0"], [], 1.0)
        with pytest.raises(Unreachable, match="out of memory"):
            worker.client.health()


def test_an_engine_that_is_stuck_is_seen(tmp_path):
    release = threading.Event()

    class Stuck(LocalEngine):
        def step(self):
            release.wait(60)
            return super().step()

    with Running(tmp_path, engine=Stuck(sampler())) as worker:
        client = WorkerClient(worker.server.url, SECRET, deadline_s=0.5)
        worker.client.generate(requests(), settings_of(PARAMS), version=None)
        time.sleep(1.0)
        with pytest.raises(Unreachable, match="stuck|no answer"):
            client.health()
        release.set()
        assert len(fetched(worker.client, ["k0"])) == 1


# ---- what is refused ---------------------------------------------------------------------------------

CONTROL = [
    "/generate", "/results", "/abort", "/update_weights/begin", "/update_weights/bucket", "/update_weights/finish",
    "/score", "/shutdown",
]  # fmt: skip


@pytest.mark.parametrize("authorization", ["", "Bearer ", "Bearer 0123456789abcdef-secreT", "Bearer \xe9", SECRET[:-1]])
def test_without_the_secret_nothing_but_health(worker, authorization):
    for path in CONTROL:
        status, content = worker.raw("POST", path, b'{"all": true}', Authorization=authorization)
        assert status == 401 and SECRET not in json.dumps(content)
    assert worker.raw("GET", "/health", None, Authorization=authorization)[0] == 200
    assert not worker.server.asked_to_stop


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/generate", b"", 400, "JSON"),
        ("/generate", b"\xff\x00", 400, "JSON"),
        ("/generate", b"[" * 100_000, 400, "JSON"),
        ("/generate", b"{}", 400, "requests"),
        ("/generate", b'{"requests": [], "params": {}}', 400, "requests"),
        ("/generate", b'{"requests": [{"key": "a", "prompt": [1.5], "stream": 0}], "params": {}}', 400, "prompt"),
        ("/generate", b'{"requests": [{"key": "a", "prompt": ["1"], "stream": 0}], "params": {}}', 400, "prompt"),
        ("/results", b'{"keys": ["a"], "wait_s": 1e9}', 400, "wait_s"),
        ("/results", b'{"keys": ["a"], "sudo": true}', 400, "sudo"),
        ("/results", b'{"keys": ["nobody"]}', 409, "unknown key"),
        ("/abort", b'{"keys": "abc"}', 400, "keys"),
        ("/update_weights/begin", b'{"version": -1, "transport": "files"}', 400, "version"),
        ("/update_weights/begin", b'{"version": 1, "transport": "pigeon"}', 400, "transport"),
        ("/update_weights/begin", b'{"version": 1, "transport": "collective"}', 422, "group"),
        ("/update_weights/bucket", b'{"version": 1, "index": 0, "bytes": 1, "checksum": "x"}', 400, "checksum"),
        ("/update_weights/finish", b'{"version": 1, "buckets": 0, "checksum": "%s"}' % (b"0" * 32), 409, "begin one"),
        ("/score", b'{"tokens": [[]]}', 400, "tokens"),
        ("/score", b'{"tokens": [[5, 100000]]}', 400, "vocabulary"),
        ("/nothing", b"{}", 404, "no endpoint"),
    ],
)
def test_malformed_requests_are_answered_and_do_no_harm(worker, path, body, status, says):
    before = worker.client.score([PROMPTS[1]])
    got, content = worker.raw("POST", path, body)
    assert got == status and says in content["error"]
    assert worker.loop.alive and worker.client.health().fault is None
    assert worker.client.score([PROMPTS[1]]) == before


def test_bodies_that_are_too_large_or_do_not_come(tmp_path):
    with Running(tmp_path, max_bucket_bytes=1000) as worker:
        assert worker.raw("POST", "/generate", b"{}", **{"Content-Length": str(1 << 40)})[0] == 413
        assert worker.raw("POST", "/generate", b"{}", **{"Content-Length": "-1"})[0] == 400
        assert worker.raw("POST", "/generate", b"{}", **{"Transfer-Encoding": "chunked"})[0] == 411
        query = f"version=1&index=0&bytes=2000&checksum={'0' * 32}"
        assert worker.raw("POST", f"/update_weights/bucket?{query}", b"0" * 2000)[0] == 413
        with socket.create_connection(worker.server.server_address[:2], timeout=60) as raw:
            lines = ["POST /generate HTTP/1.1", f"Authorization: Bearer {SECRET}", "Content-Length: 100", "", "{"]
            raw.sendall("\r\n".join(lines).encode())
            raw.shutdown(socket.SHUT_WR)
            assert b"400" in raw.recv(100)
        assert worker.client.health().alive


def test_other_methods_and_paths(worker):
    assert worker.raw("GET", "/generate", None)[0] == 405
    assert worker.raw("GET", "/etc/passwd", None)[0] == 404


def test_a_server_that_is_no_worker_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Unreachable, match="no answer in 0.3 s"):
            WorkerClient(url, SECRET, deadline_s=0.3).health()
    with pytest.raises(Unreachable, match="refused"):
        WorkerClient(url, SECRET, deadline_s=5).health()


# ---- weights -----------------------------------------------------------------------------------------


def logprobs(model, tokens: list[int]) -> list[float]:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()


@pytest.mark.parametrize("transport", ["files", "http", "collective"])
def test_updates_by_every_transport_reach_every_worker(tmp_path, transport):
    new = tiny_model("llama", seed=9)
    spool = Spool(tmp_path / "spool", limit=20_000)  # several buckets
    with Running(spool.folder) as one, Running(spool.folder, seed=1) as two:
        sending = Transmission([one.client, two.client], 5, transport)
        for bucket in spool.write(new.named_parameters()):
            sending.send(bucket)
        assert sending.finish() == [one.client, two.client] and not sending.lost
        assert len(spool.buckets) > 3 and sending.bytes > sum(p.numel() * 4 for p in new.parameters())
        for worker in (one, two):
            assert worker.client.health().version == 5
            assert worker.client.score([PROMPTS[1]])[0] == pytest.approx(logprobs(new, PROMPTS[1]), abs=1e-5)
            worker.client.generate(requests(), settings_of(PARAMS), version=5)
            got = fetched(worker.client, ["k1"])["k1"]
            expected = LocalSampler(new, tokenizer(EOS), max_slots=4).generate(PROMPTS, PARAMS)[1]
            assert [s.token_ids for s in got] == [s.token_ids for s in expected]
            assert {s.weights_version for s in got} == {5}
    spool.close()
    assert not spool.folder.exists()


def test_only_changed_weights_are_sent_and_the_spool_still_has_all(tmp_path):
    base, changed = tiny_model("llama", seed=9), tiny_model("llama", seed=10)
    spool = Spool(tmp_path / "spool", limit=20_000)
    names = [name for name, _ in changed.named_parameters() if "q_proj" in name]
    for model, chosen in ((base, None), (changed, names), (changed, names)):
        list(spool.write((n, p) for n, p in model.named_parameters() if chosen is None or n in chosen))
    assert sum(set(names) <= b.names for b in spool.buckets) == 1  # the first change has been replaced
    with Running(spool.folder, seed=1) as worker:
        sending = Transmission([worker.client], 2, "files")
        for bucket in spool.buckets:
            sending.send(bucket)
        sending.finish()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name in names:
                    parameter.copy_(dict(changed.named_parameters())[name])
        assert worker.client.score([PROMPTS[1]])[0] == pytest.approx(logprobs(base, PROMPTS[1]), abs=1e-5)


def begin_http(client: WorkerClient, version: int = 1) -> list[tuple[Bucket, bytes]]:
    client.begin(Begin(version=version, transport="http"))
    pieces = [data for _, data in packed(tiny_model("llama", seed=9).named_parameters(), 20_000)]
    return [
        (Bucket(version=version, index=i, bytes=len(data), checksum=checksum(data)), data)
        for i, data in enumerate(pieces)
    ]


def test_damaged_updates_are_refused_and_the_old_weights_stay(worker):
    client, before = worker.client, worker.client.score([PROMPTS[1]])
    buckets = begin_http(client)
    for note, data in buckets[:-1]:
        client.bucket(note, data)
    note, data = buckets[-1]
    for wrong in (data[:-4] + b"\x01\x02\x03\x04", b"\0" * len(data)):
        with pytest.raises(Refusal, match="announced was"):
            client.bucket(note, wrong)
    garbage = b"not weights at all" + b"\0" * 100
    with pytest.raises(Refusal, match="safetensors"):
        client.bucket(note.model_copy(update={"bytes": len(garbage), "checksum": checksum(garbage)}), garbage)
    total = total_checksum(n.checksum for n, _ in buckets)
    with pytest.raises(Refusal, match="arrived"):
        client.finish(Finish(version=1, buckets=len(buckets), checksum=total))
    with pytest.raises(Refusal, match="does not fit"):
        client.finish(Finish(version=1, buckets=len(buckets) - 1, checksum=total))
    assert client.score([PROMPTS[1]]) == before and client.health().version == -1
    client.bucket(note, data)
    client.bucket(note, data)  # the reply was lost, say
    finish = Finish(version=1, buckets=len(buckets), checksum=total)
    assert client.finish(finish).version == 1
    assert client.finish(finish).version == 1  # likewise
    assert client.score([PROMPTS[1]]) != before


def test_files_are_read_from_the_one_folder(worker, tmp_path):
    worker.client.begin(Begin(version=1, transport="files"))
    note = {"version": 1, "index": 0, "bytes": 1, "checksum": "0" * 32}
    for name in ("../secret", "/etc/passwd", ".hidden", "a/b"):
        assert worker.raw("POST", "/update_weights/bucket", json.dumps({**note, "file": name}).encode())[0] == 400
    assert worker.raw("POST", "/update_weights/bucket", json.dumps({**note, "file": "absent"}).encode())[0] == 422


def test_weights_of_another_model_are_refused_and_nothing_is_sampled_until_all_are_right(worker):
    spool = Spool(worker.server.updates.folder / "spool", limit=1 << 20)
    worker.server.updates.folder = spool.folder
    other = {"model.embed_tokens.weight": torch.zeros(101, 32), "model.layers.9.weight": torch.zeros(2)}
    sending = Transmission([worker.client], 1, "files")
    for bucket in spool.write(other.items()):
        sending.send(bucket)
    with pytest.raises(TransferError, match="layers.9"):
        sending.finish()
    assert "update to version 1 broke off" in str(worker.client.health().fault)
    with pytest.raises(Refusal, match="broke off"):
        worker.client.generate(requests(), settings_of(PARAMS), version=None)
    sending = Transmission([worker.client], 2, "files")
    for bucket in spool.write(tiny_model("llama", seed=9).named_parameters()):
        sending.send(bucket)
    sending.finish()
    worker.client.generate(requests(), settings_of(PARAMS), version=2)


def test_an_update_waits_for_what_is_being_sampled(worker):
    long = SamplingParams(n=2, max_tokens=60, min_tokens=60, seed=4)
    worker.client.generate(requests(), settings_of(long), version=None)
    buckets = begin_http(worker.client)
    for note, data in buckets:
        worker.client.bucket(note, data)
    total = total_checksum(n.checksum for n, _ in buckets)
    assert worker.client.finish(Finish(version=1, buckets=len(buckets), checksum=total)).version == 1
    got = fetched(worker.client, [f"k{i}" for i in range(5)])
    assert {s.weights_version for row in got.values() for s in row} == {-1}


def test_an_engine_that_takes_no_weights_is_started_anew_with_them(tmp_path):
    """As vLLM's experts on CPU; weights that are not sent stay as they were at the update before."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")

    class Fixed(LocalEngine):
        def update_weights(self, named_tensors, version):
            raise RestartNeeded("this engine cannot")

    remake = Remake("local", str(tmp_path / "model"), {"dtype": "float32"})
    with Running(tmp_path, engine=Fixed(sampler())) as worker:
        worker.loop.remake = remake
        new = dict(tiny_model("llama", seed=9).named_parameters())
        worker.loop.update([pair for pair in new.items() if "mlp" not in pair[0]], 1, False)
        # The second update goes to an engine that could take it: make it refuse as well.
        worker.loop.engine.__class__ = Fixed
        worker.loop.update([pair for pair in new.items() if "mlp" in pair[0]], 2, False)
        assert worker.client.health().version == 2 and worker.client.health().fault is None
        expected = logprobs(tiny_model("llama", seed=9), PROMPTS[1])
        assert worker.client.score([PROMPTS[1]])[0] == pytest.approx(expected, abs=1e-5)
