"""The FP8 operators on a GPU: products against bfloat16 and the vendors', quantisation against copying, one MoE layer.

    python benchmarks/fp8.py [--parts dense grouped quantise layer] [--repeats 30] [--json OUT]

Medians of --repeats launches. Before each the cache is cleared and the GPU waits a millisecond, in which the host
launches: what takes less than that is not measured by its launches. Products: TFLOP/s of 2MNK; – where a vendor's
backend leaves the product to Triton. Quantisation: GB/s of all that is read and written. Quantising operands is not
part of a product's time, but of the layer's. `error` of the kernels is |difference| / |product| in Frobenius norms,
from the torch reference on the same operands: the tensor cores' sums.
Without a GPU that runs the kernels it says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import reference
from model.fp8.backends import BACKENDS, Operators, describe
from model.fp8.quantized import Quantized

TOKENS = 4096
DENSE = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))  # N, K
EXPERTS = ((4, 8192), (8, 4096), (16, 2048), (32, 1024))  # groups, tokens of each on average
EXPERT_SHAPES = ((4096, 7168), (7168, 2048))  # gate and up, down
QUANTISED = ((4096, 7168), (32768, 7168), (32768, 4096))  # M, K
LAYER: dict[str, Any] = {
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "seq_aux_alpha": 0.0,
}
PRODUCTS = ("triton", "scaled_mm", "deep_gemm")
# Peers' figures as they publish them, for orientation: other machines, so no comparison.
PUBLISHED = """Published, TFLOP/s: DeepGEMM on H800 1,550 dense, 1,381 grouped;
grouped weight gradient on H100 457 (torchao's table), 900-1,044 (DeepGEMM's)."""
DEVICE = "cuda"
LAUNCHES = 2_000_000  # cycles that the GPU waits before the first event, about a millisecond
Row = dict[str, Any]


class Clock:
    def __init__(self, repeats: int):
        self.repeats = repeats
        self.flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)  # larger than any L2 cache

    def __call__(self, run: Callable[..., object], *args: Any, **options: Any) -> float:
        """Seconds of one run, the median."""
        for _ in range(3):
            run(*args, **options)
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(LAUNCHES)
            start.record()
            run(*args, **options)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return median(times)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def kernels() -> Operators:
    return BACKENDS["triton"].operators


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def dense(clock: Clock) -> list[Row]:
    """Forward, input and weight gradient of linear layers."""
    return [row for n, k in DENSE for row in linear(clock, n, k)]


def linear(clock: Clock, n: int, k: int) -> Iterator[Row]:
    ops = kernels()
    x, w, dy = normal(TOKENS, k), normal(n, k), normal(TOKENS, n)
    x_rows, x_columns = ops.quantize_both(x)
    dy_rows, dy_columns = ops.quantize_both(dy, floor=None)
    weight = ops.quantize_weight(w)
    cases: list[tuple[str, tuple[Tensor, Tensor], tuple[Quantized, Quantized], Tensor | None]] = [
        ("forward", (x, w.mT), (x_rows, weight), None),
        ("input gradient", (dy, w), (dy_rows, weight.t()), None),
        ("weight gradient", (dy.mT, x), (dy_columns, x_columns), torch.zeros(n, k, device=DEVICE)),
    ]
    flops = 2 * TOKENS * n * k / 1e12
    for name, plain, operands, gradient in cases:
        row: Row = {"product": name, "M": TOKENS, "N": n, "K": k, "bf16": flops / clock(torch.matmul, *plain)}
        for backend in PRODUCTS:
            chosen = BACKENDS[backend]
            if chosen.missing(torch.device(DEVICE)) is None:
                left = chosen.declines(*operands, accumulate=gradient)  # then its speed would be Triton's
                run = chosen.operators.fp8_gemm
                row[backend] = None if left else flops / clock(run, *operands, accumulate=gradient)
        both = (run(*operands, out_dtype=torch.float32) for run in (ops.fp8_gemm, reference.fp8_gemm))
        yield row | {"error": error(*both)}


def grouped(clock: Clock) -> list[Row]:
    """The same three of experts, with groups of uneven sizes. bfloat16: torch's grouped_mm."""
    return [
        row
        for experts, mean in EXPERTS
        for n, k in EXPERT_SHAPES
        for row in experts_linear(clock, uneven(experts, mean), experts * mean, n, k)
    ]


def uneven(groups: int, mean: int) -> Tensor:
    """Ends of groups whose sizes differ from the mean by up to two fifths."""
    shift = torch.rand(groups - 1, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
    ends = ((torch.arange(1, groups) + shift) * mean).int()
    return torch.cat([ends, torch.tensor([groups * mean], dtype=torch.int32)]).to(DEVICE)


def experts_linear(clock: Clock, offsets: Tensor, m: int, n: int, k: int) -> Iterator[Row]:
    ops, experts = kernels(), len(offsets)
    x, w, dy = normal(m, k), normal(experts, n, k), normal(m, n)
    x_rows, x_columns = ops.quantize_both(x, offsets=offsets)
    dy_rows, dy_columns = ops.quantize_both(dy, floor=None, offsets=offsets)
    weight = ops.quantize_weight(w)
    cases: list[tuple[str, tuple[Tensor, Tensor], str, tuple[Quantized, Quantized], Row]] = [
        ("forward", (x, w.mT), "grouped_gemm", (x_rows, weight), {}),
        ("input gradient", (dy, w), "grouped_gemm", (dy_rows, weight.t()), {}),
        ("weight gradient", (dy.mT, x), "grouped_wgrad", (dy_columns, x_columns),
         {"accumulate": torch.zeros(experts, n, k, device=DEVICE)}),
    ]  # fmt: skip
    flops = 2 * m * n * k / 1e12
    for name, plain, operator, operands, options in cases:
        row: Row = {"product": name, "experts": experts, "M": m, "N": n, "K": k}
        row["bf16"] = flops / clock(F.grouped_mm, *plain, offs=offsets)
        row["triton"] = flops / clock(getattr(ops, operator), *operands, offsets, **options)
        both = (getattr(o, operator)(*operands, offsets, out_dtype=torch.float32) for o in (ops, reference))
        yield row | {"error": error(*both)}


def quantise(clock: Clock) -> list[Row]:
    """Bytes read and written a second, beside a copy of the same tensor."""
    return [row for m, k in QUANTISED for row in quantised(clock, m, k)]


def quantised(clock: Clock, m: int, k: int) -> Iterator[Row]:
    ops, x, gradient = kernels(), normal(m, k), normal(m, k // 2)
    copy = 2 * x.nbytes / clock(torch.empty_like(x).copy_, x)
    _, kept = ops.swiglu_quantize(x)
    cases: list[tuple[str, int, Callable[..., Any], tuple[Any, ...], Row]] = [
        ("rows", x.nbytes, ops.quantize_activation, (x,), {}),
        ("columns", x.nbytes, ops.quantize_activation, (x,), {"transposed": True}),
        ("rows and columns", x.nbytes, ops.quantize_both, (x,), {}),
        ("blocks", x.nbytes, ops.quantize_weight, (x,), {}),
        ("SwiGLU", x.nbytes, ops.swiglu_quantize, (x,), {}),
        ("SwiGLU backward", gradient.nbytes + kept.nbytes, ops.swiglu_quantize_backward, (gradient, kept), {}),
    ]
    for name, read, run, args, options in cases:
        found = run(*args, **options)
        written = sum(q.nbytes for q in ([found] if isinstance(found, Quantized) else found))
        speed = (read + written) / clock(run, *args, **options)
        yield {"operator": name, "M": m, "K": k, "GB/s": speed / 1e9, "of copy": speed / copy}


def layer(clock: Clock) -> list[Row]:
    """Router, shared and routed experts, forward and backward: a layer without its attention."""
    rows: list[Row] = [moe(clock, precision) for precision in ("bf16", "fp8")]
    rows[1]["speed-up"] = rows[0]["ms"] / rows[1]["ms"]
    return rows


def moe(clock: Clock, precision: str) -> Row:
    from model import MoEConfig
    from model.fp8 import convert
    from model.moe import MixtureOfExperts, Routing

    config = MoEConfig.preset("tiny", **LAYER)
    with torch.device(DEVICE):
        network = MixtureOfExperts(config, 0).to(torch.bfloat16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if precision == "fp8":
        convert.to_fp8(network)
    x = normal(TOKENS, config.hidden_size).requires_grad_()
    gradient = torch.randn_like(x)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(lambda: network(x, Routing())[0].backward(gradient))
    row: Row = {"precision": precision, "tokens": TOKENS, "ms": seconds * 1000}
    if x.is_cuda:
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


PARTS: dict[str, Callable[[Clock], list[Row]]] = {
    "dense": dense,
    "grouped": grouped,
    "quantise": quantise,
    "layer": layer,
}


def table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "bf16" in columns:
        rows = [row | {"of bf16": row["triton"] / row["bf16"]} for row in rows]
        columns.append("of bf16")
    return common.markdown_table(columns, [[cell(row.get(column, "")) for column in columns] for row in rows])


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", metavar="OUT", help="also write every number here")
    given = parser.parse_args()
    missing = "there is none" if not torch.cuda.is_available() else BACKENDS["triton"].missing(torch.device(DEVICE))
    if missing is not None:
        print(f"benchmarks/fp8.py measures kernels on a GPU: {missing}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # for the products that errors are measured against
    import triton

    card = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "triton": triton.__version__}
    print(f"{card}; {', '.join(f'{name} {v}' for name, v in versions.items())}; {describe(DEVICE)}\n")
    clock, found = Clock(given.repeats), {}
    for part in given.parts:
        found[part] = PARTS[part](clock)
        print(f"## {part}\n\n{table(found[part])}\n", flush=True)
    print(PUBLISHED)
    common.write_json(given.json, {"card": card, **versions, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
