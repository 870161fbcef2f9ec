"""Compiles every kernel without a GPU: `python -m model.fp8.kernels.offline [--target sm_90] [--ptx FOLDER]`.

The operators run on small CPU tensors, and instead of a launch each kernel is compiled for just the types, alignments
and settings that it would have been launched with. Prints what ptxas says of registers and spills, the shared memory
and the number of FP8 tensor core instructions. Exit status 1 if a kernel needs more shared memory than a block may
have, if a product has no such instruction or if, on Hopper, for which the blocks are made, a kernel spills registers.
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
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from model.fp8.kernels import launches, products, quantize, swiglu

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
SYNCHRONOUS = re.compile(r"mma\.sync\.\S+\.f32\.e4m3\.e4m3")


@dataclass(frozen=True)
class Target:
    capability: int
    shared: int  # bytes that a block may have
    mma: re.Pattern[str]  # its FP8 instruction for tensor cores
    spills: bool  # whether kernels may spill there


TARGETS = {
    "sm_89": Target(89, 101376, SYNCHRONOUS, True),
    "sm_90": Target(90, products.HOPPER_SHARED, re.compile(r"wgmma\.mma_async\.\S+\.f32\.e4m3\.e4m3"), False),
    "sm_120": Target(120, 101376, SYNCHRONOUS, True),
}


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    registers: int
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    mma: int  # FP8 instructions in the PTX

    def wrong(self, target: Target) -> bool:
        product = "product" in self.name or "weight gradient" in self.name
        return self.shared > target.shared or (product and not self.mma) or (self.spilled > 0 and not target.spills)


def compiled(target: Target) -> list[Compiled]:
    """Every kernel in the ways that training launches it."""
    found: list[Compiled] = []
    with _instead_of_launches(lambda *launch: None):
        ways = launches.training()
    for name, run in ways.items():

        def handle(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], name: str = name) -> None:
            found.append(_compile(name, kernel, args, options, target))

        with _instead_of_launches(handle), mock.patch.object(products, "shared_memory", lambda device: target.shared):
            run()
    return found


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


def _compile(name: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], target: Target) -> Compiled:
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
    gpu = GPUTarget("cuda", target.capability, 32)
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=gpu, options=options)
    ptx: str = built.asm["ptx"]
    registers, spilled = _resources(built.asm["cubin"])
    return Compiled(name, ptx, registers, spilled, built.metadata.shared, len(target.mma.findall(ptx)))


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
    parser.add_argument(
        "--target", choices=TARGETS, default="sm_90", help="compute capability (default: sm_90, Hopper)"
    )
    parser.add_argument("--ptx", type=Path, metavar="FOLDER", help="also write each kernel's PTX there")
    given = parser.parse_args()
    target = TARGETS[given.target]
    found = compiled(target)
    print(f"{'kernel':48}{'registers':>10}{'spilled':>10}{'shared':>10}{'FP8 mma':>10}")
    for kernel in found:
        wrong = "  wrong" if kernel.wrong(target) else ""
        print(f"{kernel.name:48}{kernel.registers:10}{kernel.spilled:10}{kernel.shared:10}{kernel.mma:10}{wrong}")
        if given.ptx is not None:
            given.ptx.mkdir(parents=True, exist_ok=True)
            (given.ptx / f"{kernel.name.replace(' ', '-').replace(',', '')}.ptx").write_text(kernel.ptx)
    return int(any(kernel.wrong(target) for kernel in found))


if __name__ == "__main__":
    sys.exit(main())
