"""A layer's experts on this GPU, at the shapes of three models: time, bytes and operations of 1 to 8,192 tokens.

    PYTHONPATH=. python benchmarks/gpu_moe.py                            # all models
    PYTHONPATH=. python benchmarks/gpu_moe.py qwen3-30b --rows 1 32      # some
    PYTHONPATH=. python benchmarks/gpu_moe.py qwen3-30b --tune           # cuts of the products, best three first

Each figure is a CUDA graph over distinct random layers: norm, router, choice, experts and their sum. Bytes are those of
the experts that were chosen; shares are of 3.17 TB/s.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import grouped_gemm
from aphrodite.kernels.triton.expert_weights import ExpertWeights
from aphrodite.kernels.triton.grouped_gemm import PairConfig, TileConfig
from aphrodite.kernels.triton.routing import group_tokens
from aphrodite.layers.activation import Activation
from aphrodite.layers.norm import RmsNorm
from aphrodite.layers.triton_moe import TritonExperts, TritonMixture, TritonRouter
from aphrodite.models.spec import MoeSpec
from aphrodite.quantization.layouts import GgufBlocks, Int4Groups
from aphrodite.quantization.planes import planes_of
from aphrodite.quantization.types import QuantType

CEILING = 3.17e12  # bytes a second that an H100 reads
DEVICE, DTYPE = "cuda", torch.bfloat16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192)
COPIES = 4  # layers of a graph: more than the L2 cache holds


@dataclass(frozen=True)
class Model:
    """Experts of a layer; `packed` is how they are stored, None for dense."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    packed: str | None = None


MODELS = {
    "qwen3-30b": Model(128, 8, 2048, 768),
    "qwen3-30b-int4": Model(128, 8, 2048, 768, "int4"),
    "mixtral-int4": Model(8, 2, 4096, 14336, "int4"),
    "gpt-oss-20b": Model(32, 4, 2880, 2880, "mxfp4"),
}


def make_weights(model: Model, rows: int, columns: int) -> ExpertWeights:
    """Random weights of one projection."""
    count = model.experts * rows
    if model.packed is None:
        weight = torch.empty((model.experts, rows, columns), dtype=DTYPE, device=DEVICE).normal_(0.0, columns**-0.5)
        return ExpertWeights(weight, model.experts)
    if model.packed == "mxfp4":
        data = torch.randint(0, 256, (count, columns // 32, 17), dtype=torch.uint8, device=DEVICE)
        data[..., 0] = 118
        return ExpertWeights(planes_of(GgufBlocks(data.flatten(1), QuantType.MXFP4)), model.experts, is_e2m1=True)
    codes = torch.randint(0, 256, (count, columns // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.full((count, columns // 128), 0.2 * columns**-0.5, dtype=DTYPE, device=DEVICE)
    zeros = torch.full((count, columns // 128), 8, dtype=torch.uint8, device=DEVICE)
    return ExpertWeights(planes_of(Int4Groups(codes, scales, zeros, 128)), model.experts)


class Layers:
    """Some layers of a model, and the clock."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.moe = MoeSpec(num_experts=model.experts, top_k=model.top_k, intermediate_size=model.inner, normalize=True)
        self.norm = RmsNorm(torch.ones(model.hidden, dtype=DTYPE, device=DEVICE), 1e-6)
        choice = Choice("benchmark", ())
        self.gate_up = [make_weights(model, 2 * model.inner, model.hidden) for _ in range(COPIES)]
        self.down = [make_weights(model, model.hidden, model.inner) for _ in range(COPIES)]
        routers = [torch.randn((model.experts, model.hidden), device=DEVICE) for _ in range(COPIES)]
        self.routers = [TritonRouter(weight, None, None, dtype=DTYPE, exact=True) for weight in routers]
        self.mixtures = [
            TritonMixture(self.moe, router, TritonExperts(first, choice), TritonExperts(second, choice), None)
            for router, first, second in zip(self.routers, self.gate_up, self.down, strict=True)
        ]
        self.expert_bytes = sum(
            tensor.nbytes for weights in (self.gate_up[0], self.down[0]) for tensor in weights.tensors
        ) / model.experts  # fmt: skip

    def us(self, one: Callable[[int], object]) -> float:
        """Microseconds of `one(layer)` in a graph over all layers, median of 5."""
        for layer in range(COPIES):
            one(layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(COPIES):
                one(layer)
        graph.replay()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / 4 / COPIES)
        return float(statistics.median(times))

    def table(self, rows: list[int]) -> None:
        """The whole mixture, row count by row count."""
        print(f"{'rows':>6} {'us':>9} {'experts':>8} {'GB/s':>7} {'share':>6} {'TFLOP/s':>8}")
        for count in rows:
            x = torch.randn((count, self.model.hidden), device=DEVICE).to(DTYPE)

            def one(layer: int, x: torch.Tensor = x) -> object:
                return self.mixtures[layer](x, norm=self.norm, activation="silu", residual=None)

            us = self.us(one)
            read = sum(len(router(x, self.moe)[0].unique()) for router in self.routers) / COPIES
            rate = read * self.expert_bytes / us / 1e-6
            flops = 6 * count * self.model.top_k * self.model.hidden * self.model.inner / us * 1e-6
            print(f"{count:6} {us:9.1f} {read:8.1f} {rate / 1e9:7.0f} {rate / CEILING:6.0%} {flops:8.1f}", flush=True)

    def parts(self, count: int) -> None:
        """What the time of a step goes to."""
        x = torch.randn((count, self.model.hidden), device=DEVICE).to(DTYPE)
        for layer in range(COPIES):
            self.mixtures[layer](x, norm=self.norm, activation="silu", residual=None)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for layer in range(COPIES):
                self.mixtures[layer](x, norm=self.norm, activation="silu", residual=None)
            torch.cuda.synchronize()
        shown = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
        parts = (
            f"{event.key[:28]} {event.device_time_total / COPIES:.1f}" for event in shown if event.device_time_total
        )
        print(f"{count:6} parts, us: " + ", ".join(parts), flush=True)

    def tune_pairs(self, count: int) -> None:
        """Cuts for single pairs."""
        x = torch.randn((count, self.model.hidden), device=DEVICE).to(DTYPE)
        routed = [router(x, self.moe) for router in self.routers]
        packed = self.model.packed is not None
        chunks = (1024, 2048) if packed else (256, 512, 1024)
        found = []
        stages = (1, 3) if packed else (1,)
        cuts = itertools.product((4, 8) if packed else (2, 4, 8, 16), chunks, (1, 2, 4), stages)
        for config in itertools.starmap(PairConfig, cuts):

            def one(layer: int, config: PairConfig = config) -> object:
                return grouped_gemm.experts_of_pairs(
                    x, *routed[layer], self.gate_up[layer], self.down[layer], "silu", None, config
                )

            found.append((self.tried(one), tuple(config)))
        print(f"{count:6} pairs, both products: {sorted(found)[:4]}", flush=True)

    def tune_tiles(self, count: int) -> None:
        """Cuts for grouped tiles."""
        x = torch.randn((count, self.model.hidden), device=DEVICE).to(DTYPE)
        size = grouped_gemm.pairs_of_tile(count * self.model.top_k, self.model.experts)
        tiles = [group_tokens(router(x, self.moe)[0], self.model.experts, size) for router in self.routers]
        inner = x.new_zeros(count * self.model.top_k, self.model.inner)
        rows_of, chunks = ((64, 128), (64, 128)) if size > 32 else ((32, 64), (128, 256))
        for name, source, weights in (("gate_up", x, self.gate_up), ("down", inner, self.down)):
            found = []
            for rows, chunk, stages, warps in itertools.product(rows_of, chunks, (3, 4), (4, 8)):
                config = TileConfig(rows, size, chunk, stages, warps)

                def one(
                    layer: int,
                    config: TileConfig = config,
                    source: torch.Tensor = source,
                    weights: list[ExpertWeights] = weights,
                    activation: Activation | None = "silu" if name == "gate_up" else None,
                ) -> object:
                    return grouped_gemm.grouped_product(source, tiles[layer], weights[layer], config, activation)

                found.append((self.tried(one), tuple(config)))
            print(f"{count:6} tiles, {name}: {sorted(found)[:4]}", flush=True)

    def tried(self, one: Callable[[int], object]) -> float:
        """Microseconds, or infinity where the cut does not fit the card."""
        try:
            return round(self.us(one), 1)
        except Exception:
            torch.cuda.synchronize()
            return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="all without")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--tune", action="store_true", help="search cuts instead")
    options = parser.parse_args()
    for name in options.models or MODELS:
        print(f"{name}: {MODELS[name]}", flush=True)
        try:
            layers = Layers(MODELS[name])
            if options.tune:
                for count in options.rows:
                    tune = layers.tune_pairs if count <= grouped_gemm.ALONE_TOKENS else layers.tune_tiles
                    tune(count)
            else:
                layers.table(options.rows)
                for count in (1, 32, 8192):
                    layers.parts(count)
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
