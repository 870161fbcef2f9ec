"""All kernels compile on a machine without a GPU: for Hopper, and for a card with less shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="needs triton: pip install -e '.[fp8]'")


def compiled(folder: Path, target: str) -> dict[str, str]:
    """PTX by name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "model.fp8.kernels.offline", "--target", target, "--ptx", str(folder / "ptx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    sources = {path.stem: path.read_text() for path in (folder / "ptx").iterdir()}
    assert len(sources) == 36
    return sources


def product(name: str) -> bool:
    return "product" in name or "weight-gradient" in name


def test_kernels_compile_for_hopper_without_spills(tmp_path):
    for name, ptx in compiled(tmp_path, "sm_90").items():
        assert ".target sm_90a" in ptx, name
        if product(name):
            assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.e4m3\.e4m3", ptx), name
            assert "cp.async.bulk.tensor.2d" in ptx, name  # operands come by the copy engine
        else:
            assert "e4m3x2.f32" in ptx, name  # E4M3 is rounded and saturated by the hardware


def test_kernels_compile_for_ada_within_its_shared_memory(tmp_path):
    for name, ptx in compiled(tmp_path, "sm_89").items():
        assert ".target sm_89" in ptx, name
        assert not product(name) or "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3" in ptx, name


def test_what_does_not_fit_is_wrong():
    from model.fp8.kernels.offline import TARGETS, Compiled

    hopper, ada = TARGETS["sm_90"], TARGETS["sm_89"]
    product = Compiled("grouped product", "", registers=255, spilled=0, shared=232448, mma=4)
    assert not product.wrong(hopper) and product.wrong(ada)
    assert replace(product, shared=232449).wrong(hopper) and replace(product, mma=0).wrong(hopper)
    spilling = replace(product, spilled=8, shared=101376)
    assert spilling.wrong(hopper) and not spilling.wrong(ada)
    assert not Compiled("SwiGLU", "", registers=80, spilled=0, shared=256, mma=0).wrong(hopper)


@pytest.mark.parametrize(("shared", "stages"), [(232448, (4, 5)), (101376, (3, 4))])
def test_stages_follow_the_shared_memory(monkeypatch, shared, stages):
    from model.fp8.kernels import products

    card = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    products.shared_memory.cache_clear()
    shapes = [products.launch_shape(rows, torch.device("cuda:0")) for rows in (65, 64)]
    products.shared_memory.cache_clear()
    assert shapes == [(128, 8, stages[0]), (64, 4, stages[1])]
    for block, _, count in shapes:
        assert count * (block + 128) * 128 < shared
