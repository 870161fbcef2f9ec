"""What runs where, and what one is told otherwise."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from model.fp8 import fp8_gemm, quantize_activation, quantize_weight
from model.fp8 import reference as fp8
from model.fp8.backends import BACKENDS, Backend, choose, describe


def test_on_a_cpu_the_reference_runs():
    assert choose("auto", "cpu") is BACKENDS["reference"] is choose("reference", torch.device("cpu"))
    assert choose("auto", "cpu").operators is fp8
    x, weight = torch.ones(2, 128), torch.ones(3, 128)
    a, b = quantize_activation(x, backend="reference"), quantize_weight(weight, backend="reference")
    assert (fp8_gemm(a, b, backend="reference") == 128).all()


def test_a_backend_takes_over_what_it_has_not_itself(monkeypatch):
    mine = SimpleNamespace(fp8_gemm=lambda a, b: None, helper=lambda: None)
    monkeypatch.setitem(sys.modules, "mine", mine)
    backend = Backend("mine", "mine", lambda device: None, rest="model.fp8.reference")
    operators = backend.operators
    assert operators is backend.operators and operators.fp8_gemm is mine.fp8_gemm
    assert operators.quantize_both is fp8.quantize_both and operators.grouped_wgrad is fp8.grouped_wgrad
    assert not hasattr(operators, "helper")


@pytest.mark.parametrize("name", ["triton", "scaled_mm", "deep_gemm"])
def test_others_say_what_is_missing(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"'{name}' cannot run on cpu: .*(not installed|it needs an NVIDIA GPU)"):
        choose(name, "cpu")
    assert f"no {name}: " in describe("cpu") and describe("cpu").startswith("FP8 on cpu: reference; ")


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'tensorrt' is not one of auto, reference, triton, scaled_mm, deep_gemm"):
        choose("tensorrt", "cpu")


@pytest.mark.parametrize(
    ("capability", "cuda", "triton", "scaled_mm"),
    [
        ((8, 0), "12.9", "or later, this one has 8.0", "this one has 8.0"),
        ((9, 0), "12.8", None, "12.9 or later, this one is for 12.8"),
        ((9, 0), "13.0", None, None),
        ((10, 0), "13.0", None, "this one has 10.0"),
    ],
)
def test_gpus_are_judged_by_capability(monkeypatch, capability, cuda, triton, scaled_mm):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    for name, wanted in (("triton", triton), ("scaled_mm", scaled_mm)):
        found = BACKENDS[name].missing(device)
        assert found is None if wanted is None else wanted in found
    assert choose("auto", device).name == ("reference" if triton else "triton")
