"""`rollout.mode: colocate` in whole runs, in vLLM's own environment: a trainer and an engine in one process."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import vllm_env
from safetensors.torch import load_file

from recipes import PROBLEMS, grpo, metrics, write
from rl.recipe_io import validate
from rl.runner import run

GREEDY = {"data": {**PROBLEMS, "limit": 6}, "temperature": 0, "max_tokens": 24}
MODEL = {
    "scratch": {"layers": 2, "hidden_size": 64, "intermediate_size": 64, "heads": 2, "kv_heads": 1},
    "dtype": "float32",
}


def recipe(folder: Path) -> dict[str, Any]:
    return grpo(
        folder,
        model=MODEL,
        threads=1,
        rollout__engine="vllm",
        rollout__mode="colocate",
        rollout__max_prompt_tokens=64,
        rollout__workers={"options": {"kv_cache_memory_bytes": 1 << 26}, "probe_tolerance": 1e-3},
        optimizer__learning_rate=0.02,
        grpo__steps=2,
        evaluate=GREEDY,
    )


def evaluated(folder: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(folder / "evaluation" / f"held_out_step_{step:08d}.parquet").to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_grpo_beside_vllm(tmp_path: Path, processes: int) -> None:
    """The engines start with random weights, so that whatever an update does not bring them fails the probe. At the
    end they answer as the checkpoint does, read by a local sampler."""
    path = write(tmp_path / "recipe.yaml", recipe(tmp_path / "run"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    done = subprocess.run(
        [vllm_env.vllm_python(), *launcher, "-m", "rl", str(path)],
        cwd=tmp_path, env=vllm_env.vllm_environment(), capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    rows = [row for row in metrics(tmp_path / "run") if "evaluation" not in row]
    assert [row["sync/version"] for row in rows] == [2, 4]  # two updates a step
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    sent = sum(tensor.nbytes for tensor in weights.values())
    assert all(row["sync/probe"] < 1e-4 and row["sync/bytes"] == sent for row in rows)
    assert all(row["mismatch/max"] < 1e-2 and row["grad_norm"] > 0 for row in rows)
    model = {"path": str(tmp_path / "run" / "model"), "dtype": "float32"}
    run(
        validate(
            {
                "pipeline": "eval",
                "output_dir": str(tmp_path / "local"),
                "threads": 1,
                "model": model,
                "evaluate": GREEDY,
            }
        )
    )
    mine, theirs = evaluated(tmp_path / "run", 2), evaluated(tmp_path / "local", 0)
    assert [row["token_ids"] for row in mine] == [row["token_ids"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a["weights_version"] == 4 and a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
