"""benchmarks/fp8.py: what it says without a GPU; that its parts run, tiny, on the reference, with a dummy clock."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.fp8 import backends

FOLDER = Path(__file__).parent.parent / "benchmarks"


def clock(run, *args, **options):
    run(*args, **options)
    return 1.0


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("fp8")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "TOKENS", 32)
    monkeypatch.setattr(module, "DENSE", ((130, 64),))
    monkeypatch.setattr(module, "EXPERTS", ((2, 20),))
    monkeypatch.setattr(module, "EXPERT_SHAPES", ((48, 64),))
    monkeypatch.setattr(module, "QUANTISED", ((20, 256),))
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.BACKENDS["reference"])
    yield module
    del sys.modules["fp8"]


def test_parts_measure_every_product_and_operator(benchmark):
    dense, grouped, quantised = (benchmark.PARTS[part](clock) for part in ("dense", "grouped", "quantise"))
    kinds = ["forward", "input gradient", "weight gradient"]
    assert [row["product"] for row in dense] == [row["product"] for row in grouped] == kinds
    for row in dense:
        assert row["bf16"] == row["triton"] == 2 * 32 * 130 * 64 / 1e12 and row["error"] == 0
    assert all(row["M"] == 40 and row["bf16"] == 2 * 40 * 48 * 64 / 1e12 for row in grouped)
    by_name = {row["operator"]: row["GB/s"] * 1e9 for row in quantised}
    read, values = 20 * 256 * 2, 20 * 256
    assert by_name["rows"] == pytest.approx(read + values + 20 * 2 * 4)
    assert by_name["rows and columns"] == pytest.approx(read + 2 * values + 20 * 2 * 4 + 256 * 4)
    assert "of bf16" in benchmark.table(dense) and "of copy" in benchmark.table(quantised)
    assert benchmark.uneven(4, 1000).diff().float().std() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, FOLDER / "fp8.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "on a GPU: there is none" in done.stderr and not done.stdout
