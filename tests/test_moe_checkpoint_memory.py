"""How much memory loading an FP8 folder takes, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import MoEConfig, MoEForCausalLM
from model.checkpoint.export import QUANTIZATION
from model.checkpoint.names import is_quantized, main_tensors

MB = 2**20
SHARD = 20 * MB

# Growth: the most that the process ever had, less what it has before it starts to load.
MEASURED = """
import json, resource, sys
import torch
from safetensors.torch import load_file
from pathlib import Path

def peak():
    # Not ru_maxrss: that of a child starts at what its parent held when it forked.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

folder, way = Path(sys.argv[1]), sys.argv[2]
if way == "streamed":
    from model import MoEForCausalLM
else:
    from model.fp8.blocks import dequantize_blocks
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
if way == "streamed":
    model = MoEForCausalLM.from_pretrained(folder)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
else:  # all files first, then all weights
    raw = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw.update(load_file(path))
    weights = {
        name: dequantize_blocks(t, raw[name + "_scale_inv"]) if name + "_scale_inv" in raw else t.clone()
        for name, t in raw.items() if not name.endswith("_scale_inv")
    }
    size = sum(t.numel() * t.element_size() for t in weights.values())
print(json.dumps({"growth": peak() - before, "size": size}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 220 MB in bfloat16: random codes, written without building the model."""
    folder = tmp_path_factory.mktemp("large")
    config = MoEConfig.preset(
        "tiny",
        hidden_size=512,
        moe_intermediate_size=512,
        n_routed_experts=48,
        num_nextn_predict_layers=0,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        named = main_tensors(MoEForCausalLM(config).state_dict(), config)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 0x7F, (2 * MB,), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, weight in named.items():
        if is_quantized(name):
            rows, columns = weight.shape
            shard[name] = codes[: rows * columns].view(rows, columns).clone()
            shard[f"{name}_scale_inv"] = torch.full((-(-rows // 128), -(-columns // 128)), 1e-4)
        else:
            shard[name] = torch.ones(weight.shape, dtype=torch.float32 if name.endswith("bias") else torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    written = json.loads(config.to_json_string())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": QUANTIZATION}))
    assert len(set(weight_map.values())) > 5
    return folder


def measured(folder: Path, way: str) -> tuple[int, int]:
    """(growth, size of the weights in bfloat16), bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder), way], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return found["growth"], found["size"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_loading_fp8_takes_the_model_and_about_a_shard(folder):
    streamed, size = measured(folder, "streamed")
    naive, same_size = measured(folder, "naive")
    assert size == same_size > 200 * MB
    bound = size + SHARD + 16 * MB  # 16 MB: headers, allocator, threads
    print(f"weights {size / MB:.0f} MB, streamed {streamed / MB:.0f} MB, naive {naive / MB:.0f} MB")
    assert size * 0.9 < streamed < bound < naive, (streamed / MB, size / MB, naive / MB)
