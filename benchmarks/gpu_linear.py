"""Linear layers of two models on this GPU: our kernels beside the vendor's library, and the search for better cuts.

    PYTHONPATH=. python benchmarks/gpu_linear.py                  # every shape, 1..256 rows
    PYTHONPATH=. python benchmarks/gpu_linear.py --tune           # the best three cuts of each shape

gpu_prefill.py does the same for thousands of rows.

A case is a CUDA graph that runs one layer after another over distinct random weights, 512 MB or more, so that none of
it can lie in a cache. Each row is a layer with its norm, activation and residual: by our two kernels, by the library
with a kernel for each other part, and the library's product alone; * marks what TritonLinear takes. Shares are of
3.17 TB/s.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import dense_cuts, dense_wgmma, gated_gemm, linear
from aphrodite.kernels.triton.activation import Activation, gated_pairs
from aphrodite.kernels.triton.compile_worker import WithoutDevice
from aphrodite.kernels.triton.dense_cuts import DenseConfig
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.gated_gemm import GatedConfig
from aphrodite.kernels.triton.linear import GemvConfig, SkinnyConfig, gemv, skinny_gemm
from aphrodite.kernels.triton.norm import add_rms_norm, rms_norm
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.triton_linear import TritonLinear

CEILING = 3.17e12  # bytes a second that an H100 reads
DTYPE = torch.bfloat16
EPS = 1e-5
ROWS = (1, 2, 3, 8, 16, 32, 48, 64, 128, 256)
TUNED_ROWS = (1, 2, 8, 32, 64, 128, 144, 256)
# Weights read by one replay: the gap between two replays, some 6 us, is little beside that.
CHAIN_BYTES = 4 << 30


class Layer(NamedTuple):
    """One linear of a model with what is fused to it."""

    model: str
    name: str
    out_features: int
    in_features: int
    norm: bool = False
    activation: Activation | None = None
    residual: bool = False

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features * DTYPE.itemsize


LAYERS = (
    Layer("8b", "qkv", 6144, 4096, norm=True),
    Layer("8b", "o", 4096, 4096, residual=True),
    Layer("8b", "gate_up", 28672, 4096, norm=True, activation="silu"),
    Layer("8b", "down", 4096, 14336, residual=True),
    Layer("8b", "head", 128256, 4096),
    Layer("0.6b", "qkv", 4096, 1024, norm=True),
    Layer("0.6b", "o", 1024, 2048, residual=True),
    Layer("0.6b", "gate_up", 6144, 1024, norm=True, activation="silu"),
    Layer("0.6b", "down", 1024, 3072, residual=True),
    Layer("0.6b", "head", 151936, 1024),
)


def graph_us(one: Callable[[Any], object], weights: Sequence[Any], nbytes: int) -> float:
    """Microseconds of `one(weight)`, which reads `nbytes`, in a graph over all weights: median of 5 x 2 replays."""
    one(weights[0])
    torch.cuda.synchronize()
    rounds = max(CHAIN_BYTES // (nbytes * len(weights)), 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in list(weights) * rounds:
            one(weight)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(2):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 2 / len(weights) / rounds)
    return float(statistics.median(times))


class Bench:
    """A layer's weights and inputs on the device, and the clock."""

    def __init__(self, layer: Layer, device: str) -> None:
        self.layer = layer
        self.device = device
        copies = 1 if device == "meta" else min(max(-(-(512 << 20) // layer.nbytes), 2), 64)
        shape = (layer.out_features, layer.in_features)
        self.weights = [self._random(*shape) * layer.in_features**-0.5 for _ in range(copies)]
        self.norm = RmsNorm(self._random(layer.in_features), EPS) if layer.norm else None

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=self.device).normal_()

    def inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Activations, and a residual stream where the layer adds to one."""
        residual = self._random(rows, self.layer.out_features) if self.layer.residual else None
        return self._random(rows, self.layer.in_features), residual

    def chain_us(self, one: Callable[[torch.Tensor], object]) -> float:
        """Microseconds of `one(weight)` in a graph over all weights, again and again."""
        return graph_us(one, self.weights, self.layer.nbytes)

    def share(self, us: float) -> float:
        """Percent of the memory bandwidth that reading the weight in `us` takes."""
        return self.layer.nbytes / (us * 1e-6) / CEILING * 100

    def error(
        self, one: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, residual: torch.Tensor | None
    ) -> float:
        """Relative distance of `one(weight)` from float32 arithmetic."""
        before = None if residual is None else residual.float()
        out = one(self.weights[0]).float()
        values = x.float()
        if self.norm is not None:
            values = F.rms_norm(values, values.shape[-1:], self.norm.weight.float(), EPS)
        expected = values @ self.weights[0].float().T
        if self.layer.activation is not None:
            expected = F.silu(expected[:, ::2]) * expected[:, 1::2]
        if before is not None:
            expected += before
        return float((out - expected).norm() / expected.norm())


Cut = GemvConfig | SkinnyConfig | DenseConfig


def tried_cuts(layer: Layer, rows: int) -> list[Cut]:
    """Candidates of one case, the shipped ones among them."""
    n, k = layer.out_features, layer.in_features
    cuts: list[Cut] = []
    if rows <= 2:
        cuts += sorted(_gemv_cuts(layer, rows))
    if 2 <= rows <= linear.SKINNY_MAX_ROWS:
        cuts += sorted(_skinny_cuts(n, k, rows))
    if rows > 16:
        cuts += sorted(_dense_cuts(n, k, rows))
    return cuts


def _dense_cuts(n: int, k: int, rows: int) -> set[DenseConfig]:
    """Every way that has 48 to 264 tiles, or wide ones where there are more, one or two at a time on a processor."""
    shipped = dense_cuts.dense_cut(n, k, rows)
    cuts = set() if shipped is None else {shipped}
    for (parts, part), columns, chunk, warps, blocks, rotated in itertools.product(
        ((1, 64), (2, 64), (3, 64), (4, 64), (1, 128), (2, 128)), (32, 64, 128, 256), (64, 128), (4, 8), (1, 2), (0, 1)
    ):
        row_blocks, sums = -(-rows // (parts * part)), parts * part * columns // (32 * warps)
        count = row_blocks * -(-n // columns)
        stages = min(dense_cuts.SHARED_BYTES // blocks // (2 * chunk * (parts * part + columns)), 8)
        shared_twice = row_blocks > 1 and n * k > 1 << 23 and (row_blocks > 2 or columns < 128 or part < 128)
        if parts * part >= rows + 64 or shared_twice or (part == 128 and warps == 4) or (columns == 32 and n > 4096):
            continue
        if sums > (192 if blocks == 1 else 64) or sums < 8 or stages < 3 or count < 48:
            continue
        if (count > 264 and columns < 128) or (blocks == 2 and count <= 132):
            continue
        cuts.add(DenseConfig(parts, part, columns, stages, chunk, warps, bool(rotated)))
    return cuts


def _gemv_cuts(layer: Layer, rows: int) -> set[GemvConfig]:
    """8 to 32 values of a chunk for each thread, a vector of 16 bytes at least; few rows keep many blocks in flight."""
    n, k = layer.out_features, layer.in_features
    cuts = {linear.gemv_config(n, k, rows)}
    small = layer.nbytes < 20 << 20
    for block, chunk, depth, warps in itertools.product(
        (1, 2, 4, 8), (256, 512, 1024, 2048), (1, 2, 4, 8), (1, 2, 4, 8)
    ):
        values = block * chunk // (32 * warps)
        queued = values * depth // 2
        if k % chunk or not 8 <= values * rows <= 64 or depth * chunk > k or not 8 <= queued <= (64 if small else 32):
            continue
        if (block == 1 and layer.activation) or (chunk < 1024 and not small) or chunk * block < 256 * warps:
            continue
        if (not small and (block * chunk < 4096 or warps < 4 or block > 4)) or (small and values > 32):
            continue
        if small and block * chunk * depth < 2048:
            continue
        cuts.add(GemvConfig(block, chunk, depth, warps))
    return cuts


def _skinny_cuts(n: int, k: int, rows: int) -> set[SkinnyConfig]:
    """The shipped cut and its neighbours, with and without the last tile requested ahead."""
    cuts = {linear.skinny_config(n, k, rows)}
    wide = n >= 6144
    for block, chunk, splits, stages in (
        (64, 128, 1, 3),
        (64, 128, 1, 4),
        (64, 256, 1, 3),
        (64, 64, 1, 6),
        (64, 128, 2, 4),
        (64, 256, 2, 3),
        (64, 128, 4, 4),
        (16, 256, 1, 5),
        (32, 128, 1, 5),
    ):
        if (wide and (splits > 2 or block < 32)) or k % chunk or (block == 16 and rows > 32):
            continue
        if rows > 32 and chunk == 256:
            continue
        cuts.add(SkinnyConfig(block, chunk, splits, stages, 4))
        if block == 64 and k // chunk % splits == 0:
            cuts.add(SkinnyConfig(block, chunk, splits, stages, 4, ahead=True))
    return cuts


def run_cut(bench: Bench, x: torch.Tensor, residual: torch.Tensor | None, cut: Any) -> Callable[[Any], torch.Tensor]:
    """The layer by one kernel with the given cut; the norm's own kernel comes before all but the GEMV."""
    epilogue = Epilogue(None, bench.layer.activation, residual)
    if isinstance(cut, GemvConfig):
        return lambda weight: gemv(x, weight, epilogue, bench.norm, cut)
    norm, activation = bench.norm, bench.layer.activation

    def after_norm(weight: Any) -> torch.Tensor:
        normed = x if norm is None else rms_norm(x, norm.weight, norm.eps)
        if isinstance(cut, GatedConfig) and activation is not None:
            return gated_gemm.gated_gemm(normed, weight, activation, cut)
        if isinstance(cut, DenseConfig):
            return dense_wgmma.dense_wgmma(normed, weight, cut, epilogue)
        return skinny_gemm(normed, weight, epilogue, cut)

    return after_norm


class CompileOnly:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def only_compile(target: GPUTarget, pdl: bool, kernels: Iterable[tuple[Any, str]]) -> None:
    """Let this process compile the kernels, each a module's attribute, where it would launch them."""
    triton.runtime.driver.set_active(WithoutDevice(target))
    for module, name in kernels:
        module.pdl_supported = lambda device: pdl
        kernel = getattr(module, name)
        if not isinstance(kernel, CompileOnly):
            setattr(module, name, CompileOnly(kernel))


def compile_cases(compile_task: Callable[[Any], str | None], cases: Sequence[tuple[Any, ...]]) -> None:
    """Compile all cases in parallel processes that share Triton's cache and do not touch the device.

    Args:
        compile_task: compiles (target, whether launches may be dependent, *case); what went wrong, or None.
    """
    target = triton.runtime.driver.active.get_current_target()
    pdl = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    begin = time.perf_counter()
    tasks = [(target, pdl, *case) for case in cases]
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1)) as pool:
        failures = [failure for failure in pool.imap_unordered(compile_task, tasks) if failure is not None]
    print(f"compiled {len(tasks)} kernels in {time.perf_counter() - begin:.1f} s", flush=True)
    for failure in failures:
        print("  did not compile:", failure)


def _compile_task(task: tuple[GPUTarget, bool, Layer, int, Any]) -> str | None:
    """Compile one case into Triton's cache; what went wrong, or None."""
    target, pdl, layer, rows, cut = task
    kernels = (
        (linear, "_gemv_kernel"), (linear, "_skinny_kernel"), (gated_gemm, "_gated_gemm_kernel"),
        (dense_wgmma, "_dense_kernel"),
    )  # fmt: skip
    only_compile(target, pdl, kernels)
    bench = Bench(layer._replace(norm=layer.norm and isinstance(cut, GemvConfig)), "meta")
    try:
        run_cut(bench, *bench.inputs(rows), cut)(bench.weights[0])
    except Exception as error:
        return f"{layer.name} {rows} {cut}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
    return None


def compile_ahead(cases: list[tuple[Layer, int, Any]]) -> None:
    """Compile all cases before they are timed."""
    compile_cases(_compile_task, cases)


def shipped_cut(layer: Layer, rows: int) -> GemvConfig | SkinnyConfig | None:
    """What TritonLinear takes for this case; None where it takes the library."""
    n, k = layer.out_features, layer.in_features
    kernel = linear.choose_kernel(n, k, rows, DTYPE.itemsize, gated=layer.activation is not None)
    return own_cuts(layer, rows).get(kernel)


def own_cuts(layer: Layer, rows: int) -> dict[str, GemvConfig | SkinnyConfig]:
    """The default cut of each of our kernels that could do this case."""
    cuts: dict[str, GemvConfig | SkinnyConfig] = {}
    if rows <= 3:
        cuts["gemv"] = linear.gemv_config(layer.out_features, layer.in_features, rows)
    if 1 < rows <= 2 * linear.SKINNY_MAX_ROWS:
        cuts["skinny"] = linear.skinny_config(layer.out_features, layer.in_features, rows)
    return cuts


def compare(layers: list[Layer], all_rows: list[int]) -> None:
    """A table of our kernels beside the library."""
    compile_ahead([(layer, r, cut) for layer in layers for r in all_rows for cut in own_cuts(layer, r).values()])
    print(
        f"{'layer':14} {'rows':>4} {'gemv us':>9} {'skinny us':>10} {'library us':>11} {'product':>10} {'%':>5} error"
    )
    for layer in layers:
        bench = Bench(layer, "cuda")
        for rows in all_rows:
            guarded(f"{layer.model} {layer.name} {rows}", lambda r=rows, b=bench: print(_compared(b, r), flush=True))


def _compared(bench: Bench, rows: int) -> str:
    layer = bench.layer
    x, residual = bench.inputs(rows)
    taken = linear.choose_kernel(
        layer.out_features, layer.in_features, rows, DTYPE.itemsize, gated=layer.activation is not None
    )
    ways = {name: run_cut(bench, x, residual, cut) for name, cut in own_cuts(layer, rows).items()}
    kept = TritonLinear(bench.weights[0][:2], None, Choice("dense", ()), gated=layer.activation is not None)

    def library(weight: torch.Tensor) -> torch.Tensor:
        kept.weight = weight
        return kept.by_library(x, bench.norm, layer.activation, residual)

    ways["library"] = library
    error = bench.error(ways[taken], x, residual)
    times = {name: bench.chain_us(way) for name, way in ways.items()}
    alone = bench.chain_us(lambda weight: F.linear(x, weight))
    cells = [
        f"{times[name]:.2f}{'*' if name == taken else ' '}" if name in times else ""
        for name in ("gemv", "skinny", "library")
    ]
    head = f"{layer.model + ' ' + layer.name:14} {rows:4}"
    return (
        f"{head} {cells[0]:>10}{cells[1]:>11}{cells[2]:>12} {alone:10.2f} {bench.share(times[taken]):5.1f} {error:.1e}"
    )


def tune(layers: list[Layer], all_rows: list[int]) -> None:
    """Try every candidate of every case and print the best three and the shipped one."""
    cases = [(layer, rows, cut) for layer in layers for rows in all_rows for cut in tried_cuts(layer, rows)]
    # Skinny kernels do not depend on the rows themselves, only on the padded number.
    distinct = {(c[0], c[1] if isinstance(c[2], GemvConfig) else linear.padded_rows(c[1]), c[2]): c for c in cases}
    compile_ahead(list(distinct.values()))
    best: dict[tuple[str, str, int], Cut] = {}
    benches = {(layer.model, layer.name): Bench(layer, "cuda") for layer in layers}
    for bench in benches.values():
        for rows in all_rows:
            guarded(f"{bench.layer.name} {rows}", lambda r=rows, b=bench: _tuned(b, r, best))
    for model, rows in itertools.product(dict.fromkeys(layer.model for layer in layers), all_rows):
        guarded(f"layers of {model} {rows}", lambda m=model, r=rows: _whole_layers(m, r, benches, best))


def _whole_layers(
    model: str, rows: int, benches: dict[tuple[str, str], Bench], best: dict[tuple[str, str, int], Cut]
) -> None:
    """The four products of a layer after one another, by the best cuts and by what TritonLinear takes."""
    own = [benches[model, name] for name in ("qkv", "o", "gate_up", "down") if (model, name, rows) in best]
    if len(own) < 4:
        return
    stream = own[0].inputs(rows)[0]
    attended = own[1].inputs(rows)[0]
    kept = [
        TritonLinear(bench.weights[0][:2], None, Choice("dense", ()), gated="gate" in bench.layer.name) for bench in own
    ]

    def by_cuts(weights: list[torch.Tensor]) -> None:
        qkv, o, gate_up, down = (best[model, bench.layer.name, rows] for bench in own)
        run_cut(own[0], stream, None, qkv)(weights[0])
        run_cut(own[1], attended, stream, o)(weights[1])
        run_cut(own[3], run_cut(own[2], stream, None, gate_up)(weights[2]), stream, down)(weights[3])

    def as_shipped(weights: list[torch.Tensor]) -> None:
        for layer, weight in zip(kept, weights, strict=True):
            layer.weight = weight
        kept[0](stream, norm=own[0].norm)
        kept[1](attended, residual=stream)
        kept[3](kept[2](stream, norm=own[2].norm, activation="silu"), residual=stream)

    counts = [len(bench.weights) for bench in own]
    chain = [[bench.weights[i % n] for bench, n in zip(own, counts, strict=True)] for i in range(max(counts))]
    nbytes = sum(bench.layer.nbytes for bench in own)
    times = [graph_us(way, chain, nbytes) for way in (by_cuts, as_shipped)]
    floor = nbytes / CEILING * 1e6
    print(f"layer of {model} rows {rows}: {times[0]:.1f} us, as shipped {times[1]:.1f}, floor {floor:.1f}", flush=True)


def _tuned(bench: Bench, rows: int, best: dict[tuple[str, str, int], Cut]) -> None:
    x, residual = bench.inputs(rows)
    found: list[tuple[float, Any]] = []
    for cut in tried_cuts(bench.layer, rows):
        try:
            one = run_cut(bench, x, residual, cut)
            error = bench.error(one, x, residual)
            if not error < 2e-2:
                print(f"  WRONG by {error:.1e}: {cut}")
                continue
            found.append((bench.chain_us(one), cut))
        except Exception as failure:
            print(f"  {cut}: {type(failure).__name__}: {str(failure).strip()[:120]}")
    if found:
        best[bench.layer.model, bench.layer.name, rows] = min(found)[1]
    product = bench.chain_us(lambda weight: F.linear(x, weight))
    shipped = shipped_cut(bench.layer, rows)
    print(f"{bench.layer.model} {bench.layer.name} rows {rows}: torch's product {product:.2f} us", flush=True)
    for us, cut in sorted(found)[:3] + [f for f in sorted(found)[3:] if f[1] == shipped]:
        mark = " <- shipped" if cut == shipped else ""
        print(f"   {us:8.2f} us {bench.share(us):5.1f} %  {type(cut).__name__[:-6]}{tuple(cut)}{mark}", flush=True)


def elementwise() -> None:
    """Norms and activations: microseconds and share of the bandwidth, bytes read and written counted."""
    print(f"{'kernel':34} {'us':>8} {'%':>6}")
    for rows, hidden, width in ((1, 4096, 14336), (128, 4096, 14336), (2048, 4096, 14336), (2048, 1024, 3072)):
        norm_weight = torch.randn(hidden, device="cuda", dtype=DTYPE)
        x, residual = (torch.randn(rows, hidden, device="cuda", dtype=DTYPE) for _ in range(2))
        pairs = torch.randn(rows, 2 * width, device="cuda", dtype=DTYPE)
        bench = Bench(Layer("", "", 1 << 14, 1 << 14), "cuda")
        for name, nbytes, one in (
            (f"rms_norm {rows}x{hidden}", 2 * x.nbytes, lambda _, x=x, w=norm_weight: rms_norm(x, w, EPS)),
            (
                f"add_rms_norm {rows}x{hidden}",
                4 * x.nbytes,
                lambda _, x=x, r=residual, w=norm_weight: add_rms_norm(x, r, w, EPS),
            ),
            (f"silu pairs {rows}x{width}", pairs.nbytes * 3 // 2, lambda _, p=pairs: gated_pairs(p, "silu")),
        ):
            us = bench.chain_us(one)
            print(f"{name:34} {us:8.2f} {nbytes / (us * 1e-6) / CEILING * 100:6.1f}", flush=True)


def guarded(what: str, action: Callable[[], None]) -> None:
    """Run one case; print its error and let the others go on."""
    try:
        action()
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="search for better cuts instead of comparing")
    parser.add_argument("--model", choices=["8b", "0.6b"], help="only this model's layers")
    parser.add_argument("--layers", help="only these, by name, separated by commas")
    parser.add_argument("--rows", help="only these numbers of rows, separated by commas")
    options = parser.parse_args()
    names = options.layers.split(",") if options.layers else [layer.name for layer in LAYERS]
    layers = [layer for layer in LAYERS if layer.name in names and options.model in (None, layer.model)]
    default = TUNED_ROWS if options.tune else ROWS
    rows = [int(value) for value in options.rows.split(",")] if options.rows else list(default)
    begin = time.perf_counter()
    (tune if options.tune else compare)(layers, rows)
    if not options.tune:
        guarded("elementwise", elementwise)
    print(f"{time.perf_counter() - begin:.1f} s in all")


if __name__ == "__main__":
    main()
