"""Every backend, in two processes for real, takes the steps that one process alone takes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import train
from safetensors.torch import load_file
from test_moe_training import MODEL as MOE

from recipes import PROBLEMS, REPO, SCRATCH, change, environment, free_port, grpo, sft, write
from rl.policy.processes import Processes

DENSE = {
    "model": {"scratch": {**SCRATCH, "intermediate_size": 65}, "dtype": "float32"},  # rows that two do not share evenly
    "grpo__prompts_per_step": 6,  # three a mini-batch, so that the processes' shares differ
    "grpo__tokens_per_microbatch": 120,
    "grpo__kl__coefficient": 0.05,
    "grpo__reference": {"ema": 0.8},
    "grpo__loss": {"aggregation": "token"},
    "optimizer__weight_decay": 0.1,
    "checkpoint": {"every": 1, "keep": 99},
}
EXPERTS = {
    **DENSE,
    "model": {
        "gradient_checkpointing": True,
        **MOE,
        "scratch": {**MOE["scratch"], "config": {**MOE["scratch"]["config"], "num_nextn_predict_layers": 1}},
    },
    "moe": {"bias_speed": 0.01, "sequence_loss": 0.01, "mtp_loss": 0.3, "replay_routing": True},
}
RUNS = {
    "dense": DENSE,
    "moe": EXPERTS,
    "poisoned": {**DENSE, "optimizer__on_nonfinite": "skip"},
    "bfloat16": {**DENSE, "model": {"scratch": SCRATCH, "dtype": "bfloat16"}},
    "sft": {
        "sft__tokens_per_microbatch": 120,
        "checkpoint": {"every": 1, "keep": 99},
        "evaluate": {"data": {**PROBLEMS, "limit": 4}, "samples": 1, "max_tokens": 6, "every": 1},
    },
    "served": {  # no process has a whole model, but for the reference to be made from
        **DENSE,
        "rollout__mode": "server",
        "rollout__workers": {"count": 1, "env": {"OMP_NUM_THREADS": "1"}},
        "evaluate": {"data": {**PROBLEMS, "limit": 4}, "samples": 1, "max_tokens": 6, "every": 1},
    },
    "gkd": {
        "gkd": {"prompts_per_step": 5, "samples_per_prompt": 3, "tokens_per_microbatch": 120, "on_policy": 1.0},
        "checkpoint": {"every": 1, "keep": 99},
    },
}
# Of metrics, relative and absolute. In bfloat16 a master that differs by rounding now and then becomes another weight.
TOLERANCE = {"bfloat16": (0.05, 1e-3)}
if importlib.util.find_spec("peft") is not None:
    lora = {"scratch": SCRATCH, "dtype": "float32", "lora": {"r": 4}}
    RUNS["lora"] = {**{k: v for k, v in DENSE.items() if k != "grpo__reference"}, "model": lora}
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (make test-slow installs it)"
)


def launch(config: str, *recipes: Path) -> None:
    """Runs recipes in the processes of an accelerate configuration of ours."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(REPO / "recipes/accelerate" / config),
        "--main_process_port", str(free_port()), str(REPO / "tests/launched.py"), *map(str, recipes),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def recipe(folder: Path, kind: str, who: str, steps: int) -> Path:
    run, changes = folder / f"{kind}-{who}", RUNS[kind]
    if kind == "sft":
        made = sft(run, sft__steps=steps, **changes)
    elif kind == "gkd":  # the dense run's model is the teacher
        made = grpo(
            run, pipeline="gkd", teacher={"path": str(folder / "dense" / "model"), "dtype": "float32"}, **changes
        )
        made = change({k: v for k, v in made.items() if k not in ("grpo", "rewards")}, gkd__steps=steps)
    else:
        made = grpo(run, grpo__steps=steps, **changes)
    return write(folder / f"{run.name}.yaml", made)


def alone(path: Path) -> None:
    train(path, Processes())


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "sync/"))} for row in found]


def assert_same(kind: str, mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    rel, absolute = TOLERANCE.get(kind, (2e-4, 1e-5))
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"mismatch/k3", "mismatch/max"}:
            if a[name] is None or b[name] is None:  # no number
                assert a[name] == b[name], (a["step"], name)
            else:
                assert b[name] == pytest.approx(a[name], rel=rel, abs=absolute), (a["step"], name)


def assert_same_weights(kind: str, mine: Path, theirs: Path) -> None:
    if kind in TOLERANCE:
        return
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (mine, theirs))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert (weight - b[name]).abs().max() < 5e-5, name


def until(folder: Path, step: int) -> None:
    """Makes a finished run one that was killed after `step`."""
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def check_backend(config: str, folder: Path, *, kinds: Collection[str] = RUNS, steps: int = 2, sharded: bool) -> None:
    """Runs by one process and by two; and from the middle of its checkpoints each goes on in the other's processes."""
    paths = {f"{kind}-{who}": recipe(folder, kind, who, steps) for kind in kinds for who in ("one", "two")}
    expected = {}
    for kind in kinds:
        alone(paths[f"{kind}-one"])
        expected[kind] = rows(folder / f"{kind}-one")
        shutil.copytree(folder / f"{kind}-one" / "model", folder / kind / "model")
        until(folder / f"{kind}-one", steps // 2)
    # Two processes make their own runs, and take up what one process wrote.
    launch(config, *(paths[f"{kind}-{who}"] for kind in kinds for who in ("two", "one")))
    for kind in kinds:
        for who in ("one", "two"):
            assert_same(kind, expected[kind], rows(folder / f"{kind}-{who}"))
            assert_same_weights(kind, folder / kind, folder / f"{kind}-{who}")
        for rank in (0, 1):
            found = json.loads((folder / f"{kind}-two" / f"held_{rank}.json").read_text())
            assert found["held"] == pytest.approx(found["all"] * (0.5 if sharded else 1), rel=0.02), found
    # And the other way round.
    for kind in kinds:
        until(folder / f"{kind}-two", steps // 2)
        alone(paths[f"{kind}-two"])
        assert_same(kind, expected[kind], rows(folder / f"{kind}-two"))
        assert_same_weights(kind, folder / kind, folder / f"{kind}-two")


def test_fsdp2(tmp_path):
    kinds = [kind for kind in ("dense", "moe", "lora", "sft") if kind in RUNS]
    check_backend("fsdp2-cpu-2.yaml", tmp_path, kinds=kinds, sharded=True)


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize(
    "config,sharded", [("zero1", False), ("zero2", False), ("zero3", True), ("zero3-offload", True)]
)
def test_deepspeed(config, sharded, tmp_path):
    check_backend(f"{config}-cpu-2.yaml", tmp_path, sharded=sharded)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu-2", "fsdp2-cpu-2"])
def test_without_deepspeed(config, tmp_path):
    check_backend(f"{config}.yaml", tmp_path, sharded=config == "fsdp2-cpu-2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["cpu-2", "fsdp2-cpu-2", *(pytest.param(f"zero{n}-cpu-2", marks=deepspeed) for n in (1, 2, 3))]
)
def test_ten_steps(config, tmp_path):
    """Losses, gradients and everything else that is logged, over ten steps of a dense model and the mixture."""
    sharded = config in ("fsdp2-cpu-2", "zero3-cpu-2")
    check_backend(f"{config}.yaml", tmp_path, kinds=("dense", "moe"), steps=10, sharded=sharded)


@pytest.mark.slow
@deepspeed
def test_a_run_moves_between_sharded_backends(tmp_path):
    """Its first step under FSDP2, the second under ZeRO-3, the third under FSDP2 again."""
    kinds, steps = ("dense", "moe"), 3
    paths = {kind: recipe(tmp_path, kind, "two", steps) for kind in kinds}
    for kind in kinds:
        alone(recipe(tmp_path, kind, "one", steps))
    for kept, config in enumerate(("fsdp2-cpu-2", "zero3-cpu-2", "fsdp2-cpu-2")):
        if kept:
            for kind in kinds:
                until(tmp_path / f"{kind}-two", kept)
        launch(f"{config}.yaml", *paths.values())
    for kind in kinds:
        assert_same(kind, rows(tmp_path / f"{kind}-one"), rows(tmp_path / f"{kind}-two"))
        assert_same_weights(kind, tmp_path / f"{kind}-one", tmp_path / f"{kind}-two")


def test_ready_configurations_are_what_they_say():
    folder = REPO / "recipes" / "accelerate"
    for path in folder.glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())
        kind = path.stem.removesuffix("-cpu-2")
        expected = {"fsdp2": "FSDP", "cpu-2": "MULTI_GPU", "gpu-8": "MULTI_GPU"}.get(kind, "DEEPSPEED")
        assert spec["distributed_type"] == expected, path.name
        assert spec.get("use_cpu", False) == path.stem.endswith("cpu-2") and spec["mixed_precision"] == "no"
        if expected == "DEEPSPEED":
            assert f"zero{spec['deepspeed_config']['zero_stage']}" == kind.removesuffix("-offload")
            offloaded = spec["deepspeed_config"]["offload_optimizer_device"] == "cpu"
            assert offloaded == kind.endswith("-offload")
