"""FP8 layers whose weights FSDP2 shards: the same gradients as in one process, also after the weights have moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_backends import alone, launch, rows
from test_fp8_modules import small
from test_fp8_training import MODEL, SMALL
from tiny_moe import relative, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model.fp8.convert import to_fp8
from recipes import free_port, grpo, write

STEPS = 2


def trained(model: torch.nn.Module, parts: list[int], full=lambda tensor: tensor) -> list[torch.Tensor]:
    """The gradient of every step's mean loss over documents `parts` of two, and what follows from it, flat."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(STEPS):
        for part in parts:
            ids = token_ids(1, 40, seed=2 * step + part)
            (model(ids, labels=ids).loss / len(parts)).backward()
        found.append(torch.cat([full(p.grad).flatten() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, torch.cat([full(p.detach()).flatten() for p in model.parameters()])]


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = small()
    to_fp8(model, keep_weights=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = trained(model, [rank], full=lambda tensor: tensor.full_tensor())
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_give_the_same_gradients(tmp_path):
    torch.multiprocessing.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    model = small()
    to_fp8(model)
    for sharded, whole in zip(torch.load(tmp_path / "found.pt"), trained(model, [0, 1]), strict=True):
        assert relative(sharded, whole) < 1e-3


@pytest.mark.slow
def test_a_recipe_in_bfloat16(tmp_path):
    """Through the backend: shards gathered in bfloat16, and a whole copy that samples. Other roundings than one
    process has, of gradients to bfloat16 before they are summed and of tiles of fewer tokens, but no others."""
    found = {}
    for who in ("one", "two"):
        changes = {**SMALL, "grpo__steps": 2, "grpo__kl__coefficient": 0.01, "model": MODEL, "precision": "fp8"}
        path = write(tmp_path / f"{who}.yaml", grpo(tmp_path / who, **changes))
        alone(path) if who == "one" else launch("fsdp2-cpu-2.yaml", path)
        found[who] = rows(tmp_path / who)
    for one, two in zip(found["one"], found["two"], strict=True):
        assert one.keys() == two.keys()
        assert one["mismatch/k3"] < 0.02 and two["mismatch/k3"] < 0.02
    one, two = found["one"][0], found["two"][0]
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1) and two["grad_norm"] != one["grad_norm"]
