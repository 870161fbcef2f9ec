"""What each choice of the FP8 scheme costs or buys in precision, on the CPU: the tables of docs/fp8.md.

    python benchmarks/fp8_error.py

Relative error in Frobenius norm, of elements and of the product with normal weights, against float64. In the rows with
outliers one channel in 256 is larger by that factor; errors are of the other channels alone, and of a product whose
weights for the large ones are zero, so that nothing hides behind them.
"""

from __future__ import annotations

import common
import torch
from torch import Tensor

from model.fp8 import fp8_gemm, quantize_activation, quantize_weight
from model.fp8.blocks import dequantize_blocks, quantize_blocks

M, N, K = 256, 256, 2048


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def tiles() -> str:
    """One scale for the tensor, for a row, for 1 × 128, and that rounded up to a power of two."""
    generator = torch.Generator().manual_seed(0)
    plain, weight = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)
    rows = []
    for factor in (1, 1e3, 1e5):
        x, w, small = plain.clone(), weight.clone(), torch.arange(K) % 256 != 7
        if factor > 1:
            x[:, ~small] *= factor
            w[:, ~small] = 0
        cells = []
        for tile, power_of_two in (((M, K), False), ((1, K), False), ((1, 128), False), ((1, 128), True)):
            q, scale = quantize_blocks(x, tile, power_of_two=power_of_two)
            back = dequantize_blocks(q, scale, tile, torch.float32)
            product = back.double() @ quantize_weight(w).dequantize(torch.float64).mT
            cells.append(f"{error(back[:, small], x[:, small]):.2%}, {error(product, x.double() @ w.double().mT):.2%}")
        rows.append(["none" if factor == 1 else f"{factor:,.0f}", *cells])
    return common.markdown_table(["outliers", "tensor", "row", "1 x 128", "1 x 128, power of two"], rows)


def floors() -> str:
    """Gradients of falling size with the activations' floor and without."""
    gradient = torch.randn(M, K, generator=torch.Generator().manual_seed(0))
    rows = []
    for size in (1e-4, 1e-7, 1e-9, 1e-11):
        x = gradient * size
        found = (error(quantize_activation(x, floor=floor).dequantize(), x) for floor in (1e-4, None))
        rows.append([f"{size:.0e}", *(f"{e:.2%}" for e in found)])
    return common.markdown_table(["size", "floor 1e-4", "none"], rows)


def products() -> str:
    """The three products of a linear layer, all in FP8."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (M, N)))
    weight, kept = quantize_weight(w), quantize_activation(x)
    columns = quantize_activation(dy, floor=None, transposed=True)
    gradient = quantize_activation(dy, floor=None)
    found = {
        "forward, x w^T": (fp8_gemm(kept, weight, out_dtype=torch.float32), x @ w.mT),
        "input gradient, dy w": (fp8_gemm(gradient, weight.t(), out_dtype=torch.float32), dy @ w),
        "weight gradient, dy^T x": (
            fp8_gemm(columns, quantize_activation(x, transposed=True), out_dtype=torch.float32),
            dy.mT @ x,
        ),
    }
    return common.markdown_table(["product", "error"], [[name, f"{error(*pair):.2%}"] for name, pair in found.items()])


if __name__ == "__main__":
    for part in (tiles, floors, products):
        print(f"{part.__doc__}\n\n{part()}\n")
