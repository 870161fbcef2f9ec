"""benchmarks/fp8.py: what it says without a GPU; that its parts run, tiny, on the reference, with a dummy clock."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.fp8 import backends, reference

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
    tiny = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setattr(module, "LAYER", module.LAYER | tiny)
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


def test_the_layer_is_measured_forward_and_backward_in_both_precisions(benchmark, monkeypatch):
    found, wgrad = [], reference.grouped_wgrad
    monkeypatch.setattr(reference, "grouped_wgrad", lambda *args, **how: found.append("wgrad") or wgrad(*args, **how))

    def clock(run):
        run(), run()
        found.append("timed")
        return 0.5 if found == ["timed"] else 0.25

    rows = benchmark.layer(clock)
    assert found == ["timed", *["wgrad"] * 4, "timed"]  # two weights of the experts, two runs
    assert [(row["precision"], row["tokens"], row["ms"]) for row in rows] == [("bf16", 32, 500), ("fp8", 32, 250)]
    assert rows[1]["speed-up"] == 2 and "speed-up" in benchmark.table(rows)


def test_what_a_vendor_leaves_to_triton_has_no_figure(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "TOKENS", 128)
    monkeypatch.setattr(benchmark, "DENSE", ((192, 256),))  # an input gradient sums over one and a half tiles
    for name in ("scaled_mm", "deep_gemm"):
        here = backends.Backend(name, f"model.fp8.with_{name}", lambda device: None, rest="model.fp8.reference")
        monkeypatch.setitem(backends.BACKENDS, name, here)
    rows = benchmark.dense(lambda run, *args, **options: 1.0)
    assert [row["scaled_mm"] is None for row in rows] == [False, True, True]
    assert not any(row["deep_gemm"] is None for row in rows)
    assert [line.count("–") for line in benchmark.table(rows).splitlines()] == [0, 0, 0, 1, 1]


def test_the_gpu_waits_for_the_host_before_each_measurement(benchmark, monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            said.append("event")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("end"))
    assert benchmark.Clock(2)(lambda: said.append("run")) == 0.003
    assert said == ["run"] * 3 + [benchmark.LAUNCHES, "event", "run", "event", "end"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, FOLDER / "fp8.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "on a GPU: there is none" in done.stderr and not done.stdout
