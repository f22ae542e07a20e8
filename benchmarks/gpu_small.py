"""The kernels between a step's large ones on this GPU: norms, activations, rows in fp8, expanded blocks, input tables.

    PYTHONPATH=. python benchmarks/gpu_small.py

A case is a CUDA graph of launches over distinct memory, 256 MB or more in all or 64 launches, so that caches do not
help large ones; a launch of few rows is all latency. Shares are of 3.17 TB/s, the most that an H100 reads.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator

import torch

from aphrodite.kernels.triton.activation import gated_pairs
from aphrodite.kernels.triton.norm import add_rms_norm, rms_norm
from aphrodite.kernels.triton.packed_gemm import expand_planes
from aphrodite.kernels.triton.quantize import quantize_rows
from aphrodite.kernels.triton.step_inputs import gather_tokens, scatter
from aphrodite.quantization.layouts import GgufBlocks
from aphrodite.quantization.noise import noise_blocks
from aphrodite.quantization.planes import planes_of
from aphrodite.quantization.types import QuantType

CEILING = 3.17e12  # bytes a second
HIDDEN, INNER = 4096, 14336  # Llama 3.1 8B
CONTEXT = 131_072
CHAIN_BYTES = 256 << 20
DTYPE = torch.bfloat16

Launch = Callable[[], object]
Case = tuple[str, int, Callable[[], Launch]]  # name, bytes moved, what makes the inputs of a launch of its own


def microseconds(make: Callable[[], Launch], nbytes: int) -> float:
    """Of one launch, in a chain of them."""
    launches = [make() for _ in range(min(64, max(4, CHAIN_BYTES // nbytes)))]
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(12):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / len(launches))
    return float(statistics.median(times[2:]))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def cases() -> Iterator[Case]:
    weight = random(HIDDEN)
    for rows in (1, 32, 256, 8192):
        width, inner = rows * HIDDEN * 2, rows * INNER * 2

        def norm(rows: int = rows) -> Launch:
            x = random(rows, HIDDEN)
            return lambda: rms_norm(x, weight, 1e-5)

        def add(rows: int = rows) -> Launch:
            x, residual = random(rows, HIDDEN), random(rows, HIDDEN)
            return lambda: add_rms_norm(x, residual, weight, 1e-5)

        def gated(rows: int = rows) -> Launch:
            pairs = random(rows, 2 * INNER)
            return lambda: gated_pairs(pairs, "silu")

        def quantized(rows: int = rows) -> Launch:
            x = random(rows, HIDDEN)
            return lambda: quantize_rows(x, torch.float8_e4m3fn, (weight, 1e-5))

        yield f"RMSNorm {rows} x {HIDDEN}", 2 * width, norm
        yield f"add + RMSNorm {rows} x {HIDDEN}", 4 * width, add
        yield f"SiLU * up {rows} x {INNER}", 3 * inner, gated
        yield f"RMSNorm to fp8 {rows} x {HIDDEN}", width * 3 // 2, quantized
    yield from tables()
    yield from expanded()


def tables() -> Iterator[Case]:
    table = torch.zeros((257, CONTEXT), dtype=torch.int32, device="cuda")
    for count in (1, 256, 8192):

        def places(count: int = count) -> list[torch.Tensor]:
            return [torch.randint(0, most, (count,), dtype=torch.int32, device="cuda") for most in (257, CONTEXT)]

        def gather(count: int = count) -> Launch:
            rows, columns = places(count)
            return lambda: gather_tokens(torch.empty_like(rows), table, rows, columns)

        def write(count: int = count) -> Launch:
            rows, columns = places(count)
            return lambda: scatter(table, rows, columns, columns)

        yield f"token ids of {count} rows", 16 * count, gather
        yield f"{count} entries of block tables", 16 * count, write


def expanded() -> Iterator[Case]:
    shape = (HIDDEN, INNER)
    for qtype in (QuantType.Q4_K, QuantType.Q6_K):
        blocks = noise_blocks(qtype, shape, 0.02, 0, torch.device("cuda"))
        planes = planes_of(GgufBlocks(blocks, qtype))
        out = torch.empty(shape, dtype=DTYPE, device="cuda")
        yield (
            f"{qtype.name} expanded {HIDDEN} x {INNER}",
            blocks.numel() + 2 * out.numel(),
            lambda planes=planes, out=out: lambda: expand_planes(planes, out),  # type: ignore[misc]
        )


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, bfloat16\n{'':34} {'us':>9} {'GB/s':>7} {'share':>7}")
    for name, nbytes, make in cases():
        try:
            taken = microseconds(make, nbytes)
        except Exception:  # the next case goes on
            traceback.print_exc()
            continue
        rate = nbytes / taken * 1e6
        print(f"{name:34} {taken:9.2f} {rate / 1e9:7.0f} {rate / CEILING:7.1%}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
