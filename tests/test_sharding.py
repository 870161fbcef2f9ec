"""What an accelerate configuration asks for: understood, or refused with the fix. And tensors cut and put together."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_moe import model_of

from recipes import SCRATCH, grpo
from rl.check_tables import memory_table
from rl.policy.names import checkpoint_weights
from rl.policy.processes import Processes
from rl.policy.sharding import LaunchError, Sharding
from rl.recipe_io import validate
from rl.run.tensors import read_tensors, write_tensors

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
OFFLOAD = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE", "RANK", "LOCAL_", "MASTER_")):
            monkeypatch.delenv(name)


def launched(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables,expected",
    [
        ({}, Sharding()),
        (FSDP, Sharding("fsdp2")),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding("fsdp2", reshard=False)),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, Sharding("zero", 1)),
        (ZERO, Sharding("zero", 3)),
        ({**ZERO, **OFFLOAD}, Sharding("zero", 3, offload_parameters=True, offload_optimizer=True)),
    ],
)
def test_configurations(monkeypatch, variables, expected):
    launched(monkeypatch, **variables)
    assert Sharding.of_environment() == expected


@pytest.mark.parametrize(
    "variables,field",
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json"}, "deepspeed_config_file"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping"),
        ({**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device"),
        ({**ZERO, **OFFLOAD, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "offload_param_device"),
    ],
)
def test_refused(monkeypatch, variables, field):
    launched(monkeypatch, **variables)
    with pytest.raises(LaunchError, match=field):
        Sharding.of_environment()


@pytest.mark.parametrize("variables", [FSDP, ZERO])
def test_sharding_without_the_processes_that_share_is_refused(monkeypatch, variables):
    """As where the configuration's variables are set by hand, or a script is started beside the launcher."""
    launched(monkeypatch, **variables)
    with pytest.raises(LaunchError, match="no process group was started"):
        Processes()


def test_check_tells_what_each_process_will_hold(monkeypatch, tmp_path):
    def rows(dtype: str = "bfloat16", **model) -> dict[str, float]:
        recipe = validate(grpo(tmp_path, model={"scratch": SCRATCH, "dtype": dtype, **model}))
        monkeypatch.setattr("rl.check_tables.GiB", 1)
        lines = [line.rsplit(None, 2) for line in memory_table(recipe) if line.endswith("GiB")]
        return {line[0].strip(): float(line[1]) for line in lines}

    count = rows()["weights"] / 2
    assert rows()["float32 masters"] == 4 * count
    adapted = rows(lora={"r": 1, "target_modules": ["q_proj"]})  # 32 in, 32 out, two layers
    assert (adapted["weights"], adapted["Adam moments"]) == (2 * count, 8 * 128)
    launched(monkeypatch, WORLD_SIZE="4", **FSDP)
    held = rows()
    assert (held["float32 masters"], held["Adam moments"], held["float32 gradients"]) == (count, 2 * count, count)
    assert held["whole copy for the sampler"] == 2 * count and "weights" not in held
    launched(monkeypatch, ACCELERATE_USE_FSDP="false", **{**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"})
    held = rows()
    assert (held["weights"], held["float32 gradients"], held["Adam moments"]) == (2 * count, 4 * count, 2 * count)


def test_check_counts_the_quantised_weights_that_a_process_keeps(monkeypatch, tmp_path):
    def in_fp8(**changes) -> float:
        made = grpo(tmp_path, model={"scratch": SCRATCH}, **{"precision": "fp8", **changes})
        monkeypatch.setattr("rl.check_tables.GiB", 1)
        rows = [line.split() for line in memory_table(validate(made)) if line.startswith("FP8 weights")]
        return float(rows[0][2]) if rows else 0.0

    assert in_fp8(precision="bf16") == 0
    alone = in_fp8()  # with the transposes
    workers = {"rollout__mode": "server", "rollout__workers": {"count": 1}}
    assert alone > 0 and in_fp8(**workers) == alone
    launched(monkeypatch, WORLD_SIZE="4", **FSDP)
    assert in_fp8() == alone / 2 and in_fp8(**workers) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_moe", "deepseek_v3", "ours"])
def test_weights_under_the_names_of_files(family, tmp_path):
    model = model_of(num_nextn_predict_layers=1) if family == "ours" else tiny_model(family)
    model.save_pretrained(tmp_path, **({"repeat_shared": False} if family == "ours" else {}))
    expected = load_file(tmp_path / "model.safetensors")
    persistent = model.state_dict()
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    found = dict(checkpoint_weights(model, named))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tensors_are_written_in_files_of_bounded_size_and_read_by_part(tmp_path):
    tensors = {f"t{i}": torch.arange(12.0).view(4, 3) + i for i in range(5)} | {"scalar": torch.tensor(3.0)}
    write_tensors(tmp_path, tensors.items(), file_bytes=100)
    assert len(list(tmp_path.iterdir())) == 3
    read = read_tensors(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(read(name)[:] if tensor.ndim else read(name), tensor)
    assert torch.equal(read("t3")[1:3], tensors["t3"][1:3])
