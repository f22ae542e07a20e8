"""4-bit linear layers of an 8B model on this GPU: our kernels by number of rows, and the search for better cuts.

    PYTHONPATH=. python benchmarks/gpu_int4.py                  # every layer, 1..2,048 rows
    PYTHONPATH=. python benchmarks/gpu_int4.py --tune           # the best three cuts of each layer
    PYTHONPATH=. python benchmarks/gpu_int4.py --rows 1,8 --layers o --group 32

A case is a CUDA graph that runs one layer after another over distinct random weights, so that none of it lies in a
cache, each with its norm, activation and residual. * marks the kernel that is taken. Shares are of 3.17 TB/s, over
codes and scales; errors are relative to float32 arithmetic on the same weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from gpu_linear import CEILING, DTYPE, EPS, compile_cases, graph_us, guarded, only_compile
from triton.backends.compiler import GPUTarget

from aphrodite.kernels.triton import half_rows, int4_expand, int4_half, int4_linear, int4_mma, int4_wgmma
from aphrodite.kernels.triton.activation import Activation
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.int4_half import HalfConfig
from aphrodite.kernels.triton.int4_mma import MmaConfig
from aphrodite.kernels.triton.int4_wgmma import WgmmaConfig
from aphrodite.kernels.triton.int4_words import Int4Words, unpack_int4, whole_splits
from aphrodite.kernels.triton.norm import rms_norm

ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TUNED_ROWS = (1, 8, 16, 32, 64, 128, 256)
DISTINCT_BYTES = 512 << 20  # of weights, so that the second cache holds none of the next

Config = MmaConfig | WgmmaConfig | HalfConfig


class Layer(NamedTuple):
    """One linear of a model with what is fused to it."""

    name: str
    out_features: int
    in_features: int
    norm: bool = False
    activation: Activation | None = None
    residual: bool = False


LAYERS = (
    Layer("qkv", 6144, 4096, norm=True),
    Layer("o", 4096, 4096, residual=True),
    Layer("gate_up", 28672, 4096, norm=True, activation="silu"),
    Layer("down", 4096, 14336, residual=True),
)


class Bench:
    """A layer's weights and inputs on the device, and the clock."""

    def __init__(self, layer: Layer, group: int, device: str) -> None:
        self.layer = layer
        self.group = group
        self.device = device
        self.weights = [self._weight(group)]
        if device != "meta":
            self.weights += [self._weight(group) for _ in range(DISTINCT_BYTES // self.weights[0].nbytes)]
        self.norm = (self._random(layer.in_features), EPS) if layer.norm else None
        self.scratch = torch.empty(layer.out_features * layer.in_features, dtype=DTYPE, device=device)
        self._dense: torch.Tensor | None = None

    def _weight(self, group: int) -> Int4Words:
        strips, chunks = self.layer.out_features // 16, self.layer.in_features // 128
        words = torch.empty(strips, chunks, 16, 16, dtype=torch.int32, device=self.device).random_(-(1 << 31), 1 << 31)
        shape = (strips, max(self.layer.in_features // group, 1), 16)
        scale = torch.rand(shape, device=self.device).add_(0.5) * (self.layer.in_features**-0.5 / 4)
        zero = torch.empty(shape, dtype=torch.int32, device=self.device).random_(6, 10)
        scales = scale.view(torch.int32) & ~0xFF | zero
        paired = self.layer.activation is not None
        return Int4Words(words, scales, self.layer.out_features, self.layer.in_features, group, paired, True)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=self.device).normal_()

    def inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Activations, and a residual stream where the layer adds to one."""
        residual = self._random(rows, self.layer.out_features) if self.layer.residual else None
        return self._random(rows, self.layer.in_features), residual

    def chain_us(self, one: Callable[[Int4Words], object]) -> float:
        """Microseconds of `one(weight)` in a graph over all weights, again and again."""
        return graph_us(one, self.weights, self.weights[0].nbytes)

    def share(self, us: float) -> float:
        """Percent of the memory bandwidth that reading the weight in `us` takes."""
        return self.weights[0].nbytes / (us * 1e-6) / CEILING * 100

    def error(self, one: Callable[[Int4Words], torch.Tensor], x: torch.Tensor, residual: torch.Tensor | None) -> float:
        """Relative distance of `one(weight)` from float32 arithmetic."""
        if self._dense is None:
            self._dense = unpack_int4(self.weights[0]).float()
        before = None if residual is None else residual.float()
        out = one(self.weights[0]).float()
        values = x.float()
        if self.norm is not None:
            values = F.rms_norm(values, values.shape[-1:], self.norm[0].float(), EPS)
        expected = values @ self._dense.T
        if self.layer.activation is not None:
            expected = F.silu(expected[:, ::2]) * expected[:, 1::2]
        if before is not None:
            expected += before
        return float((out - expected).norm() / expected.norm())


def run_cut(bench: Bench, x: torch.Tensor, residual: torch.Tensor | None, cut: Any) -> Callable[[Any], torch.Tensor]:
    """The layer with the given cut; the norm's own kernel comes before all but the kernel of one row."""
    epilogue = Epilogue(None, bench.layer.activation, residual)
    if isinstance(cut, MmaConfig) and x.shape[0] == 1:
        return lambda weight: int4_mma.int4_mma(x, weight, epilogue, bench.norm, cut)

    if isinstance(cut, HalfConfig):
        return lambda weight: int4_half.int4_half(half_rows.half_rows(x, bench.norm), weight, x.dtype, epilogue, cut)

    def after_norm(weight: Any) -> torch.Tensor:
        normed = x if bench.norm is None else rms_norm(x, *bench.norm)
        if isinstance(cut, MmaConfig):
            return int4_mma.int4_mma(normed, weight, epilogue, None, cut)
        if isinstance(cut, WgmmaConfig):
            return int4_wgmma.int4_wgmma(normed, weight, epilogue, cut)
        return int4_linear.by_library(normed, weight, bench.scratch, epilogue)

    return after_norm


def default_cuts(layer: Layer, rows: int, group: int) -> dict[str, Any]:
    """What each kernel that can do this case takes by itself."""
    n, k = layer.out_features, layer.in_features
    cuts: dict[str, Any] = {}
    if rows <= int4_linear.MMA_MAX_ROWS:
        cuts["mma"] = int4_mma.mma_config(n, k, rows, group)
    if 1 < rows <= 256:
        cuts["wgmma"] = int4_wgmma.wgmma_config(n, k, rows, group)
    if 32 < rows <= 2048:
        cuts["half"] = int4_half.half_config(n, k, rows)
    if rows >= 64:
        cuts["library"] = "library"
    return cuts


def tried_cuts(layer: Layer, rows: int, group: int) -> list[Config]:
    """Candidates of one case, the shipped ones among them."""
    cuts: list[Config] = [default_cuts(layer, rows, group)[taken_of(rows)]]
    if rows <= int4_linear.MMA_MAX_ROWS:
        cuts += _mma_cuts(layer, rows)
    else:
        cuts += _wgmma_cuts(layer, rows, group) if rows <= 2 * int4_linear.WGMMA_MAX_ROWS else ()
        cuts += _half_cuts(layer, rows) if rows > int4_linear.WGMMA_MAX_ROWS // 2 else ()
    return list({(type(cut), cut): cut for cut in cuts}.values())  # equal numbers of two kernels are two cuts


def taken_of(rows: int) -> str:
    """The kernel of our own for that many rows."""
    if rows <= int4_linear.MMA_MAX_ROWS:
        return "mma"
    return "wgmma" if rows <= int4_linear.WGMMA_MAX_ROWS else "half"


def _mma_cuts(layer: Layer, rows: int) -> Iterator[MmaConfig]:
    for (strips, splits), depth in itertools.product(
        ((1, 4), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1), (1, 16)), (2, 3, 4, 6, 8)
    ):
        wide = layer.out_features > 8192
        chunks = layer.in_features // 128
        if (wide and splits > 4) or (not wide and splits == 1) or depth * splits > chunks or splits * 4 > chunks:
            continue
        for stages in (4,) if rows == 1 else (4, 8):
            if rows == 1 or (splits * stages <= 64 and depth in (2, 4)):
                yield MmaConfig(strips, splits, depth, stages)


def _wgmma_cuts(layer: Layer, rows: int, group: int) -> Iterator[WgmmaConfig]:
    """Rings of two to four stages, and for few rows splits whose activations are requested at once; for many rows also
    tiles of half the width, whose next operand is unpacked while products run."""
    most = min(max(16, 1 << (rows - 1).bit_length()), int4_wgmma.most_columns(group))
    widths = (most, most // 2) if rows > 64 else (most,)
    chunks = layer.in_features // 128
    for columns, warps, splits in itertools.product(widths, (4, 8), (1, 2, 3, 4, 6, 8, 10, 14)):
        blocks = layer.out_features // (16 * warps) * -(-rows // columns) * splits
        share = -(-chunks // splits)
        if blocks < 64 or (splits > 1 and (blocks > 1100 or blocks * columns * 16 * warps > 1 << 22)):
            continue
        if splits != whole_splits(chunks, splits) or (columns <= 32 and warps == 8):
            continue
        if columns <= 32 and share <= 16 and share * columns * 256 <= 114 << 10:
            yield WgmmaConfig(warps, columns, splits, share)
        if splits <= 4:
            yield from (
                WgmmaConfig(warps, columns, splits, stages) for stages in ((2, 3) if columns == 128 else (3, 4))
            )


def _half_cuts(layer: Layer, rows: int) -> Iterator[HalfConfig]:
    """Wide and narrow tiles, of one and two groups of warps."""
    chunks = layer.in_features // 128
    for columns, warps, splits in itertools.product((64, 128, 256), (4, 8), (1, 2, 3, 4, 5, 8)):
        blocks = layer.out_features // (16 * warps) * -(-rows // columns) * splits
        if columns > 2 * rows or blocks < 64 or splits != whole_splits(chunks, splits):
            continue
        if splits > 1 and (blocks > 400 or blocks * columns * 16 * warps > 1 << 22):
            continue
        yield from (HalfConfig(warps, columns, splits, stages) for stages in ((2, 3) if columns == 256 else (3, 4)))


KERNELS = (
    (int4_mma, "_int4_row_kernel"),
    (int4_mma, "_int4_rows_kernel"),
    (int4_wgmma, "_int4_wgmma_kernel"),
    (int4_half, "_int4_half_kernel"),
    (half_rows, "_half_rows_kernel"),
)


def _compile_task(task: tuple[GPUTarget, bool, Layer, int, int, Any]) -> str | None:
    """Compile one case into Triton's cache; what went wrong, or None."""
    target, pdl, layer, group, rows, cut = task
    only_compile(target, pdl, KERNELS)
    norms = not isinstance(cut, MmaConfig | WgmmaConfig) or rows == 1  # by itself, or by a kernel that is compiled here
    bench = Bench(layer._replace(norm=layer.norm and norms), group, "meta")
    try:
        run_cut(bench, *bench.inputs(rows), cut)(bench.weights[0])
    except Exception as error:
        return f"{layer.name} {rows} {cut}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
    return None


def compile_ahead(cases: list[tuple[Layer, int, int, Any]]) -> None:
    """Compile all cases before they are timed."""
    compile_cases(_compile_task, [case for case in cases if case[3] != "library"])


def compare(layers: list[Layer], group: int, all_rows: list[int]) -> None:
    """A table of our kernels beside one another."""
    compile_ahead(
        [(layer, group, r, cut) for layer in layers for r in all_rows for cut in default_cuts(layer, r, group).values()]
    )
    names = f"{'mma us':>9} {'wgmma us':>9} {'half us':>9} {'library us':>11}"
    print(f"{'layer':8} {'rows':>4} {names} {'%':>6} {'TF/s':>6} errors")
    for layer in layers:
        bench = Bench(layer, group, "cuda")
        for rows in all_rows:
            guarded(f"{layer.name} {rows}", functools.partial(_compared, bench, rows))


def _compared(bench: Bench, rows: int) -> None:
    layer = bench.layer
    x, residual = bench.inputs(rows)
    taken = int4_linear.choose_int4_kernel(rows, x.device, True)
    cuts = default_cuts(layer, rows, bench.group)
    times: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, cut in cuts.items():
        try:
            one = run_cut(bench, x, residual, cut)
            errors[name] = bench.error(one, x, residual)
            times[name] = bench.chain_us(one)
        except Exception as failure:
            print(f"  {layer.name} {rows} {name} {cut}: {type(failure).__name__}: {str(failure).strip()[:200]}")
    cells = [
        f"{times[name]:.2f}{'*' if name == taken else ' '}" if name in times else ""
        for name in ("mma", "wgmma", "half", "library")
    ]
    us = times.get(taken, float("nan"))
    rate = 2 * rows * layer.out_features * layer.in_features / us / 1e6
    found = " ".join(f"{error:.1e}" for error in errors.values())
    line = f"{layer.name:8} {rows:4} {cells[0]:>9} {cells[1]:>9} {cells[2]:>9} {cells[3]:>11}"
    print(f"{line} {bench.share(us):6.1f} {rate:6.0f} {found}", flush=True)


def tune(layers: list[Layer], group: int, all_rows: list[int]) -> None:
    """Try every candidate of every case and print the best three and the shipped one."""
    cases = [
        (layer, group, rows, cut) for layer in layers for rows in all_rows for cut in tried_cuts(layer, rows, group)
    ]
    compile_ahead(cases)
    for layer in layers:
        bench = Bench(layer, group, "cuda")
        for rows in all_rows:
            guarded(f"{layer.name} {rows}", functools.partial(_tuned, bench, rows))


def _tuned(bench: Bench, rows: int) -> None:
    x, residual = bench.inputs(rows)
    found: list[tuple[float, Any]] = []
    for cut in tried_cuts(bench.layer, rows, bench.group):
        try:
            one = run_cut(bench, x, residual, cut)
            error = bench.error(one, x, residual)
            if not error < 5e-3:
                print(f"  WRONG by {error:.1e}: {cut}")
                continue
            found.append((bench.chain_us(one), cut))
        except Exception as failure:
            print(f"  {cut}: {type(failure).__name__}: {str(failure).strip()[:120]}")
    shipped = default_cuts(bench.layer, rows, bench.group)[taken_of(rows)]
    print(f"{bench.layer.name} rows {rows}", flush=True)
    for us, cut in sorted(found)[:4] + [f for f in sorted(found)[4:] if f[1] == shipped][:1]:
        mark = " <- shipped" if (type(cut), cut) == (type(shipped), shipped) else ""
        print(f"   {us:8.2f} us {bench.share(us):5.1f} %  {type(cut).__name__[:-6]}{tuple(cut)}{mark}", flush=True)


def expansion(layers: list[Layer], group: int) -> None:
    """Expanding to bfloat16: microseconds and share of the bandwidth, bytes read and written counted."""
    for layer in layers:
        bench = Bench(layer, group, "cuda")
        dense = torch.empty(layer.out_features, layer.in_features, dtype=DTYPE, device="cuda")
        us = bench.chain_us(functools.partial(int4_expand.expand_int4, out=dense))
        share = (bench.weights[0].nbytes + dense.nbytes) / (us * 1e-6) / CEILING * 100
        wrong = float((dense - unpack_int4(bench.weights[-1]).to(DTYPE)).abs().max())
        print(f"expand {layer.name:8} {us:8.2f} us {share:5.1f} %, wrong by {wrong:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="search for better cuts instead of comparing")
    parser.add_argument("--layers", help="only these, by name, separated by commas")
    parser.add_argument("--rows", help="only these numbers of rows, separated by commas")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    options = parser.parse_args()
    names = options.layers.split(",") if options.layers else [layer.name for layer in LAYERS]
    layers = [layer for layer in LAYERS if layer.name in names]
    default = TUNED_ROWS if options.tune else ROWS
    rows = [int(value) for value in options.rows.split(",")] if options.rows else list(default)
    begin = time.perf_counter()
    (tune if options.tune else compare)(layers, options.group, rows)
    if not options.tune:
        guarded("expansion", lambda: expansion(layers, options.group))
    print(f"{time.perf_counter() - begin:.1f} s in all")


if __name__ == "__main__":
    main()
