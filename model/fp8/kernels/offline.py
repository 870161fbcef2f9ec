"""Compiles every kernel for Hopper without a GPU: `python -m model.fp8.kernels.offline [--ptx FOLDER]`.

The operators run on small CPU tensors, and instead of a launch each kernel is compiled for just the types, alignments
and settings that it would have been launched with. Prints what ptxas says of registers and spills, the shared memory
and the number of FP8 tensor core instructions. Exit status 1 if a kernel spills or a product has no such instruction.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from model.fp8 import kernels
from model.fp8.kernels import products, quantize, swiglu

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = (
    quantize.tiles_kernel,
    quantize.blocks_kernel,
    products.rows_kernel,
    products.tokens_kernel,
    swiglu.forward_kernel,
    swiglu.backward_kernel,
)
TYPES = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
}
WGMMA = re.compile(r"wgmma\.mma_async\.\S+\.f32\.e4m3\.e4m3")


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    registers: int
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    wgmma: int  # instructions in the PTX


def compiled() -> list[Compiled]:
    """Every kernel in the ways that training launches it."""
    found: list[Compiled] = []
    for name, run in _uses():

        def handle(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], name: str = name) -> None:
            found.append(_compile(name, kernel, args, options))

        with _instead_of_launches(handle):
            run()
    return found


def _uses() -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.zeros(256, 512, dtype=torch.bfloat16)
    offsets = torch.tensor([128, 256], dtype=torch.int32)
    with _instead_of_launches(lambda *launch: None):
        a, a_t = kernels.quantize_both(x, offsets=offsets)
        few = kernels.quantize_activation(x[:32])
        dense_t = kernels.quantize_activation(x, transposed=True)
        w, experts = kernels.quantize_weight(x), kernels.quantize_weight(x.expand(2, -1, -1))
    yield "quantise rows", lambda: kernels.quantize_activation(x)
    yield "quantise rows and columns", lambda: kernels.quantize_both(x, floor=None)
    yield "quantise rows and columns of groups", lambda: kernels.quantize_both(x, power_of_two=True, offsets=offsets)
    yield "quantise columns of E4M3 in groups", lambda: kernels.quantize_activation(a, transposed=True, offsets=offsets)
    yield "quantise blocks", lambda: kernels.quantize_weight(x)
    yield "product", lambda: kernels.fp8_gemm(a, w)
    yield "product, few rows", lambda: kernels.fp8_gemm(few, w)
    yield "weight gradient", lambda: kernels.fp8_gemm(dense_t, dense_t, accumulate=torch.zeros(512, 512))
    yield "grouped product", lambda: kernels.grouped_gemm(a, experts, offsets)
    yield (
        "grouped weight gradient",
        lambda: kernels.grouped_wgrad(a_t, a_t, offsets, accumulate=torch.zeros(2, 512, 512)),
    )
    yield "SwiGLU", lambda: kernels.swiglu_quantize(x)
    yield "SwiGLU backward", lambda: kernels.swiglu_quantize_backward(x[:, :256], a, offsets=offsets)


@contextmanager
def _instead_of_launches(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], object]) -> Iterator[None]:
    """handle(kernel, arguments, options) where a kernel would be launched."""
    for kernel in KERNELS:
        kernel.run = lambda *args, grid, warmup, kernel=kernel, **options: handle(kernel, args, options)
    try:
        yield
    finally:
        for kernel in KERNELS:
            del kernel.run


def _compile(name: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    signature, constants, aligned = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        constant = parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)
        signature[parameter.name] = "constexpr" if constant else _type(value)
        if constant:
            constants[parameter.name] = value
        elif (
            not isinstance(value, TensorDescriptor)
            and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
        ):
            aligned[(index,)] = [["tt.divisibility", 16]]
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=HOPPER, options=options)
    ptx: str = built.asm["ptx"]
    registers, spilled = _resources(built.asm["cubin"])
    return Compiled(name, ptx, registers, spilled, built.metadata.shared, len(WGMMA.findall(ptx)))


def _type(value: Any) -> str:
    """As Triton's launcher names it."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread, as the binary says. These kernels have no arrays of their own, so
    local memory is spilled registers."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    assert found is not None, said
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ptx", type=Path, metavar="FOLDER", help="also write each kernel's PTX there")
    folder = parser.parse_args().ptx
    found = compiled()
    print(f"{'kernel':38}{'registers':>10}{'spilled':>10}{'shared':>10}{'wgmma':>8}")
    for kernel in found:
        print(f"{kernel.name:38}{kernel.registers:10}{kernel.spilled:10}{kernel.shared:10}{kernel.wgmma:8}")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{kernel.name.replace(' ', '-').replace(',', '')}.ptx").write_text(kernel.ptx)
    wrong = [k for k in found if k.spilled or (not k.wgmma and ("product" in k.name or "weight gradient" in k.name))]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
