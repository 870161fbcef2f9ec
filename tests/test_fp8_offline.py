"""All kernels compile for Hopper on a machine without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="needs triton: pip install -e '.[fp8]'")


def test_kernels_compile_for_hopper_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "model.fp8.kernels.offline", "--ptx", str(tmp_path / "ptx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    sources = {path.stem: path.read_text() for path in (tmp_path / "ptx").iterdir()}
    assert len(sources) == 12 and all(".target sm_90a" in ptx for ptx in sources.values())
    for name, ptx in sources.items():
        if "product" in name or "weight-gradient" in name:
            assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.e4m3\.e4m3", ptx), name
            assert "cp.async.bulk.tensor.2d" in ptx, name  # operands come by the copy engine
        else:
            assert "e4m3x2.f32" in ptx, name  # E4M3 is rounded and saturated by the hardware
