"""Products of hundreds and thousands of rows on this GPU: the library's beside our fused gated product.

    PYTHONPATH=. python benchmarks/gpu_prefill.py

First gate_up with its norm and activation, then all four linear layers of a decoder layer one after another. Each way
runs for a while in turn, twice, and the second half of its time counts: the card lowers its clock under sustained
matrix products to keep its power, and what ran just before matters. TFLOP/s count the products alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_linear import DTYPE, EPS, LAYERS, Bench, Layer, compile_ahead, guarded, run_cut

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.gated_gemm import DEFAULT, GatedConfig
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.triton_linear import TritonLinear

ROWS = (128, 256, 512, 1024, 2048, 8192)
CUTS = (DEFAULT, DEFAULT._replace(stages=3), GatedConfig(256, 128, 64, 8, 3, 8), GatedConfig(128, 128, 64, 8, 4, 4))


def sustained_us(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds a call: the least of two turns of `seconds`, each the median over its second half."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2):
        for name, way in ways.items():
            found[name].append(_turn_us(way, seconds))
    return {name: min(times) for name, times in found.items()}


def _turn_us(way: Callable[[], object], seconds: float) -> float:
    way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
        way()
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    replays = max(int(seconds / (time.perf_counter() - begin)), 4)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times[replays // 2 :]) / 2 * 1e3


def shipped(weight: torch.Tensor, layer: Layer) -> TritonLinear:
    """A TritonLinear over a weight whose rows already are pairs."""
    linear = TritonLinear(weight[:2], None, Choice("dense", ()), gated=layer.activation is not None)
    linear.weight = weight
    return linear


def compare_gated(layer: Layer, rows: int) -> None:
    """gate_up by the library and by every cut of ours."""
    bench = Bench(layer, "cuda")
    x, _ = bench.inputs(rows)
    kept = shipped(bench.weights[0], layer)
    ways: dict[str, Callable[[], object]] = {
        "library": lambda: kept.by_library(x, bench.norm, layer.activation, None),
    }
    for cut in CUTS:
        one = run_cut(bench, x, None, cut)
        name = str(tuple(cut))
        guarded(name, lambda one=one, name=name: _keep_if_right(bench, x, one, name, ways))  # type: ignore[misc]
    times = sustained_us(ways, 0.1)
    cells = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
    print(f"{layer.model} {layer.name} {rows}: us {cells}", flush=True)


def _keep_if_right(
    bench: Bench,
    x: torch.Tensor,
    one: Callable[[torch.Tensor], torch.Tensor],
    name: str,
    ways: dict[str, Callable[[], object]],
) -> None:
    weight, norm = bench.weights[0], bench.norm
    ends = torch.cat((torch.arange(64), torch.arange(x.shape[0] - 64, x.shape[0]))).to(x.device)
    values = x[ends].float()
    if norm is not None:
        values = F.rms_norm(values, values.shape[-1:], norm.weight.float(), EPS)
    products = values @ weight.float().T
    expected = F.silu(products[:, ::2]) * products[:, 1::2]
    error = float((one(weight)[ends].float() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ValueError(f"wrong by {error:.1e}")
    ways[name] = lambda: one(weight)


def compare_layers(model: str, rows: int) -> None:
    """The four products of a decoder layer with norms, activation and residuals, sustained."""
    layers = {layer.name: layer for layer in LAYERS if layer.model == model}

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device="cuda").normal_()

    inputs = {name: random(rows, layers[name].in_features) for name in ("qkv", "o")}
    residual = random(rows, layers["o"].out_features)
    linears = {
        name: shipped(random(layer.out_features, layer.in_features) * layer.in_features**-0.5, layer)
        for name, layer in layers.items()
        if name != "head"
    }
    norm = RmsNorm(random(layers["qkv"].in_features), EPS)

    def chain(call: Callable[..., torch.Tensor]) -> None:
        call(linears["qkv"], inputs["qkv"], norm, None, None)
        call(linears["o"], inputs["o"], None, None, residual)
        pairs = call(linears["gate_up"], inputs["qkv"], norm, "silu", None)
        call(linears["down"], pairs, None, None, residual)

    def by_default(linear: TritonLinear, x: torch.Tensor, *parts: object) -> torch.Tensor:
        return linear(x, norm=parts[0], activation=parts[1], residual=parts[2])  # type: ignore[arg-type]

    ways = {"library": lambda: chain(TritonLinear.by_library), "shipped": lambda: chain(by_default)}
    flops = 2 * rows * sum(linear.weight.numel() for linear in linears.values())
    times = sustained_us(ways, 0.4)
    cells = "  ".join(f"{name} {us:.1f} ({flops / us / 1e6:.0f})" for name, us in times.items())
    print(f"{model} layer {rows}: us (TFLOP/s) {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="separated by commas")
    options = parser.parse_args()
    all_rows = [int(value) for value in options.rows.split(",")]
    begin = time.perf_counter()
    gates = [layer for layer in LAYERS if layer.activation is not None]
    compile_ahead([(layer, 2048, cut) for layer in gates for cut in CUTS])
    for layer in gates:
        for rows in all_rows:
            guarded(f"{layer.model} {rows}", lambda n=rows, one=layer: compare_gated(one, n))  # type: ignore[misc]
        for rows in [rows for rows in all_rows if rows >= 1024]:
            guarded(f"{layer.model} {rows}", lambda n=rows, m=layer.model: compare_layers(m, n))  # type: ignore[misc]
    print(f"{time.perf_counter() - begin:.1f} s in all")


if __name__ == "__main__":
    main()
