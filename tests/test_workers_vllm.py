"""Workers whose engine is the real vLLM, in its own environment; the trainer's side in this one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ahead_runs
import pyarrow.parquet as pq
import pytest
import vllm_env
from test_workers import logprobs, served, tokens
from tiny_models import tiny_model, token_lists, tokenizer
from worker_threads import SECRET

from recipes import PROBLEMS, grpo, metrics, run, write
from rl.policy.load import character_tokenizer
from rl.rollout import LocalSampler, SamplingParams
from rl.rollout.workers.client import WorkerClient
from rl.rollout.workers.launch import WorkerProcess
from rl.rollout.workers.transfer import Spool

pytestmark = pytest.mark.slow
# Heads of a size that vLLM's attention on CPU knows; a tied head, whose packed copy vLLM would forget.
SHAPE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = token_lists([3, 17, 1, 8, 5, 12, 2, 30])
GREEDY = SamplingParams(temperature=0, max_tokens=12)
OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_slots": 4, "kv_cache_memory_bytes": 1 << 26}
DEADLINE_S = 60.0


def llama(seed: int) -> Any:
    return tiny_model("llama", layers=2, seed=seed, tie_word_embeddings=True, **SHAPE)


def started(folder: Path, spool: Spool) -> WorkerProcess:
    llama(1).save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    (folder / "secret").write_text(SECRET)
    return WorkerProcess(
        0,
        folder,
        engine="vllm",
        model=str(folder / "model"),
        secret_file=folder / "secret",
        host="127.0.0.1",
        port=0,
        bucket_folder=spool.folder,
        python=vllm_env.vllm_python(),
        env=vllm_env.ENVIRONMENT,
        cores=None,
        options=OPTIONS,
    )


@pytest.fixture
def spool(tmp_path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", limit=40_000)
    yield made
    made.close()


def assert_like(workers: Any, model: Any) -> None:
    """Greedy tokens and log-probabilities as LocalSampler gives them."""
    got = workers.generate(PROMPTS, GREEDY)
    expected = LocalSampler(model, tokenizer()).generate(PROMPTS, GREEDY)
    assert tokens(got) == tokens(expected)
    for (mine,), (theirs,) in zip(got, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert mine.weights_version == workers.version and mine.finish_reason == theirs.finish_reason


def test_updates_by_every_transport_and_a_kill_in_the_middle(tmp_path, spool):
    process = started(tmp_path, spool)
    pairs = [(WorkerClient(process.url, SECRET, DEADLINE_S), process)]
    model = llama(9)
    workers = served(pairs, spool, model, deadline_s=DEADLINE_S, wait_s=900.0, start_timeout_s=900.0)
    try:
        workers.fleet.start()
        for version, transport in enumerate(("files", "http", "collective"), start=1):
            model = llama(9 + version)
            workers.fleet.settings.transport = transport
            workers.probe = lambda model=model: logprobs(model)
            workers.update_weights(model.named_parameters(), version)
            assert workers.sync.workers == 1 and workers.sync.probe < 1e-3
            assert_like(workers, model)
        changed = {n: p for n, p in llama(20).named_parameters() if ".layers.1." in n}  # as with adapters
        model.load_state_dict({**model.state_dict(), **changed})
        workers.update_weights(changed.items(), 4)
        assert_like(workers, model)
        long = SamplingParams(n=2, max_tokens=200, min_tokens=200, seed=1)
        expected = tokens(workers.generate(PROMPTS, long))
        before = pairs[0][0].health().steps

        def strike() -> None:
            while pairs[0][0].health().steps < before + 20:
                time.sleep(0.01)
            os.kill(process._process.pid, signal.SIGKILL)

        striker = threading.Thread(target=strike)
        striker.start()
        assert tokens(workers.generate(PROMPTS, long)) == expected
        striker.join()
        assert workers.fleet.restarts >= 1
        assert_like(workers, model)
    finally:
        workers.close()


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recipe of the small runs, sampled by one vLLM worker in float32."""
    return grpo(
        folder,
        model={"scratch": {"layers": 2, "hidden_size": 64, "intermediate_size": 64, "heads": 2, "kv_heads": 1},
               "dtype": "float32"},
        rollout__engine="vllm",
        rollout__mode="server",
        rollout__max_prompt_tokens=64,
        rollout__workers={
            "count": 1,
            "python": vllm_env.vllm_python(),
            "env": vllm_env.ENVIRONMENT,
            "options": {"kv_cache_memory_bytes": 1 << 26},
            "deadline_s": DEADLINE_S,
            "start_timeout_s": 900.0,
        },
        **changes,
    )  # fmt: skip


def ran(recipe: Path) -> None:
    result = run(str(recipe), timeout_s=1800)
    assert result.returncode == 0, result.stdout + result.stderr


def test_grpo_with_a_vllm_worker(tmp_path):
    """Two steps with weight updates; in float32 sampler and trainer agree, so the ratio of new to old is 1.

    The worker started with random weights. After the last update it answers as one that loads the trainer's checkpoint.
    """
    greedy = {"data": {**PROBLEMS, "limit": 6}, "temperature": 0, "max_tokens": 24}
    changes = {"grpo__steps": 2, "optimizer__learning_rate": 0.02, "evaluate": {**greedy, "at_start": True}}
    recipe = small(tmp_path / "run", **changes)
    ran(write(tmp_path / "recipe.yaml", recipe))
    rows = [row for row in metrics(tmp_path / "run") if "evaluation" not in row]
    assert len(rows) == 2 and all(row["sync/workers"] == 1 and row["sync/probe"] < 1e-3 for row in rows)
    assert all(row["mismatch/max"] < 1e-2 for row in rows)
    fresh = {
        "pipeline": "eval",
        "output_dir": str(tmp_path / "fresh"),
        "model": {"path": str(tmp_path / "run" / "model"), "dtype": "float32"},
        "evaluate": greedy,
        "engine": "vllm",
        "workers": recipe["rollout"]["workers"],
    }
    ran(write(tmp_path / "fresh.yaml", fresh))
    before, updated, loaded = (
        evaluated(tmp_path / "run", 0),
        evaluated(tmp_path / "run", 2),
        evaluated(tmp_path / "fresh", 0),
    )
    assert {row["weights_version"] for row in updated} == {4} and {row["weights_version"] for row in loaded} == {-1}
    assert [row["token_ids"] for row in updated] == [row["token_ids"] for row in loaded]
    for mine, theirs in zip(updated, loaded, strict=True):
        assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-5)
    assert any(a["logprobs"] != pytest.approx(b["logprobs"], abs=1e-3) for a, b in zip(before, updated, strict=True))


def evaluated(folder: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(folder / "evaluation" / f"held_out_step_{step:08d}.parquet").to_pylist()


def test_grpo_with_weights_into_running_rollouts(tmp_path):
    """One slot: rollouts outlast the training, so updates come in their midst, and the probe finds no free slot."""
    changes = {
        "rollout__ahead": 1,
        "rollout__in_flight": True,
        "rollout__max_tokens": 150,
        "rollout__max_slots": 1,
        "grpo__correction": {"kind": "tis"},
        "grpo__minibatches_per_step": 1,
        "grpo__steps": 4,
        "checkpoint__every": 4,
    }
    ran(write(tmp_path / "recipe.yaml", small(tmp_path / "run", **changes)))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 4 and all(row["sync/workers"] == 1 and row["sync/probe"] < 1e-3 for row in rows)
    assert all(row["staleness/max"] <= 1 for row in rows) and max(row["staleness/mixed"] for row in rows) > 0
    samples = [row for rows in ahead_runs.samples(tmp_path / "run").values() for row in rows]
    assert set(Counter(row["id"] for row in samples).values()) == {4} and len(samples) == 64  # every prompt once
    assert all(row["weights_version"] <= row["newest_version"] <= 4 for row in samples)
    assert any(row["weights_version"] < row["newest_version"] for row in samples)
