"""Packed weights of every kind on this GPU: microseconds and the share of the memory bandwidth, and better cuts.

    PYTHONPATH=. python benchmarks/gpu_packed.py                          # Q4_K and Q6_K of an 8B model, 1..512 rows
    PYTHONPATH=. python benchmarks/gpu_packed.py --formats int4,nf4,Q3_K
    PYTHONPATH=. python benchmarks/gpu_packed.py --tune --rows 1,8        # the best three cuts of each shape

A case is a CUDA graph that runs one layer after another over distinct random weights, of more bytes than a cache has.
Shares are of 3.17 TB/s, of the bytes that are read as packed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_linear import CEILING, EPS, LAYERS, Layer, compile_cases, graph_us, guarded, only_compile

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import grid_gluon, grid_mma, grid_row, half_rows, packed_gemm, packed_gemv, packed_mma
from aphrodite.kernels.triton.epilogue import WORKSPACE_VALUES, Epilogue
from aphrodite.kernels.triton.grid_gluon import Card, table_copies
from aphrodite.kernels.triton.grid_mma import GridMmaCut
from aphrodite.kernels.triton.grid_row import GridRowCut
from aphrodite.kernels.triton.launch import ceil_div
from aphrodite.kernels.triton.packed_gemv import PackedGemvCut
from aphrodite.kernels.triton.packed_grid import is_grid
from aphrodite.kernels.triton.packed_mma import PackedMmaCut
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.packed_linear import PackedLinear
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.layouts import CodebookGroups, GgufBlocks, Int4Groups, Int8Groups, PackedLayout
from aphrodite.quantization.noise import noise_blocks
from aphrodite.quantization.planes import planes_of
from aphrodite.quantization.types import QuantType

DTYPE = torch.bfloat16
ROWS = (1, 2, 4, 8, 32, 64, 512)
DISTINCT_BYTES = 256 << 20


def random_layout(name: str, out: int, columns: int, device: str) -> PackedLayout:
    """A random matrix of format `name`, small numbers."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256)

    def scales(group: int) -> torch.Tensor:
        return torch.empty((out, columns // group), dtype=torch.float16, device=device).uniform_(1e-4, 1e-3)

    if name == "int4":
        return Int4Groups(codes(out, columns // 2), scales(128), codes(out, columns // 128) & 15, 128)
    if name == "int8":
        return Int8Groups(codes(out, columns).view(torch.int8), scales(columns), None, columns)
    if name == "e4m3":
        values = (codes(out, columns) & 191).view(torch.float8_e4m3fn)
        return Int8Groups(values, scales(128).float(), None, 128)
    if name == "nf4":
        return CodebookGroups(codes(out, columns // 2), scales(64), torch.linspace(-1, 1, 16, device=device), 64)
    qtype = QuantType[name]
    if device == "meta":
        return GgufBlocks(codes(out, qtype.row_bytes(columns)), qtype)
    return GgufBlocks(noise_blocks(qtype, (out, columns), 0.02, 0, torch.device(device)), qtype)


class Bench:
    """Packed layers of one shape, and the clock."""

    def __init__(self, name: str, layer: Layer, device: str) -> None:
        self.layer = layer
        self.device = device
        self.linears = [self._linear(name)]
        self.nbytes = sum(tensor.nbytes for tensor in self.linears[0].tensors)
        if device != "meta":
            self.linears += [self._linear(name) for _ in range(min(DISTINCT_BYTES // self.nbytes, 63))]
        weight = torch.ones(layer.in_features, dtype=DTYPE, device=device)
        self.norm = RmsNorm(weight, EPS) if layer.norm else None

    def _linear(self, name: str) -> PackedLinear:
        layout = random_layout(name, self.layer.out_features, self.layer.in_features, self.device)
        gated = self.layer.activation is not None
        return PackedLinear([layout], None, Choice(name, ()), dtype=DTYPE, gated=gated)

    def call(self, rows: int) -> Callable[[PackedLinear], torch.Tensor]:
        """One layer as the decoder calls it."""
        x = torch.empty((rows, self.layer.in_features), dtype=DTYPE, device=self.device).normal_()
        residual = None
        if self.layer.residual:
            residual = torch.zeros((rows, self.layer.out_features), dtype=DTYPE, device=self.device)
        return lambda linear: linear(x, norm=self.norm, activation=self.layer.activation, residual=residual)

    def chain_us(self, one: Callable[[PackedLinear], object]) -> float:
        """Microseconds of `one` in a graph over all layers, again and again."""
        return graph_us(one, self.linears, self.nbytes)

    def share(self, us: float) -> float:
        """Percent of the bandwidth."""
        return self.nbytes / (us * 1e-6) / CEILING * 100


def in_points(name: str) -> bool:
    """Whether the codes of a format are points of a grid, which have kernels of their own."""
    return QuantType.__members__.get(name) in GRID_FORMS


def row_cuts(kind: str, layer: Layer, rows: int, card: Card) -> list[GridRowCut]:
    """Candidates of `grid_row`: 16 to 32 warps a multiprocessor."""
    found = []
    for warps, blocks, strips, depth, split, half in itertools.product(
        (8, 16), (1, 2, 3, 4), (1, 2), (1, 2), (4, 8, 16), (False, True)
    ):
        runs = 2
        copies = table_copies(kind, (card.shared - 40 * 1024) // blocks) // (2 if half else 1)
        cut = GridRowCut(split, warps // split if split <= warps else 0, strips, runs, depth, blocks, copies)
        if not cut.across or cut.across > 4 or not copies or not 16 <= warps * blocks <= 32:
            continue
        programs = cut.programs(layer.out_features, card.multiprocessors)
        lines = rows * (2 if layer.norm else 1)
        shared = cut.shared(kind, layer.out_features, layer.in_features, rows, lines, programs)
        if blocks * (shared + 1024) > card.shared + 1024 or cut.padded(layer.in_features) > 1.13 * layer.in_features:
            continue
        if strips * depth <= 2 and layer.out_features >= 64 * cut.tile:
            found.append(cut)
    return found


def point_cuts(kind: str, layer: Layer, rows: int, card: Card) -> list[GridMmaCut]:
    """Candidates of `grid_mma`."""
    found = []
    columns = max(8, rows)
    for warps, strips, runs, splits, stages, depth, half in itertools.product(
        (4, 8), (1, 2), (2 if rows <= 16 else 1,), (1, 2, 4, 8), (3,), (1, 2), (False, True)
    ):
        copies = table_copies(kind, min(131072, card.shared - 3 * 256 * runs * columns - grid_mma.SPARE_BYTES))
        copies //= 2 if half else 1
        tiles = ceil_div(layer.out_features, 16 * warps * strips)
        sums = tiles * splits * 16 * warps * strips * columns
        possible = splits == 1 or (sums <= WORKSPACE_VALUES and layer.in_features >= 256 * splits)
        if copies and possible and 128 <= tiles * splits <= 1024 and runs * strips * columns <= 128:
            found.append(GridMmaCut(warps, strips, runs, splits, stages, depth, copies))
    return found


def mma_cuts(name: str, layer: Layer, rows: int) -> list[PackedMmaCut]:
    """Candidates of `packed_mma`: between one and twelve blocks a multiprocessor, no split without inputs."""
    run = planes_of(random_layout(name, 1, layer.in_features, "cpu")).form.run
    found = []
    for strips, runs, splits, stages, depth in itertools.product((1, 2), (1, 2), (1, 2, 4, 8, 16), (3, 4), (1, 2)):
        steps = ceil_div(layer.in_features, 4 * runs * run)
        tiles = ceil_div(layer.out_features, 16 * packed_mma.WARPS * strips)
        sums = tiles * splits * 16 * packed_mma.WARPS * strips * max(8, rows)
        whole = (splits - 1) * ceil_div(steps, splits) < steps
        if whole and 100 <= tiles * splits <= 1600 and (splits == 1 or sums <= WORKSPACE_VALUES):
            found.append(PackedMmaCut(strips, runs, splits, stages, depth))
    return found


def cuts(name: str, layer: Layer, rows: int) -> Sequence[Any]:
    """Candidates: of GEMVs with one or two runs of columns a thread."""
    few = rows <= packed_gemv.PACKED_GEMV_MAX_ROWS
    if in_points(name):
        kind = GRID_FORMS[QuantType[name]].kind
        return (row_cuts if few else point_cuts)(kind, layer, rows, this_card())
    if not few:
        return mma_cuts(name, layer, rows)
    return [
        PackedGemvCut(tile, 1024 * warps * runs, warps, blocks)
        for tile, warps, runs, blocks in itertools.product((2, 4, 8), (2, 4, 8, 16), (1, 2), (1, 2, 3, 4, 6, 8, 12, 16))
        if layer.in_features <= 1024 * warps * runs * 2
        and layer.in_features * 2 > 1024 * warps * runs
        and tile * runs <= 8
        and 16 <= warps * blocks <= 48
    ]


@functools.cache
def this_card() -> Card:
    """Asked for before processes that compile are made, which do not touch the device."""
    return grid_gluon.card_of(torch.device("cuda", torch.cuda.current_device()))


def with_cut(bench: Bench, rows: int, cut: Any) -> Callable[[PackedLinear], torch.Tensor]:
    """A layer of up to 64 rows in the cut, of the kernel that Hopper has for it; None for what is shipped."""
    layer = bench.layer
    x = torch.empty((rows, layer.in_features), dtype=DTYPE, device=bench.device).normal_()
    width = layer.out_features // 2 if layer.activation else layer.out_features
    out = torch.zeros((rows, width), dtype=DTYPE, device=bench.device)
    epilogue = Epilogue(None, layer.activation, out if layer.residual else None)

    def one(linear: PackedLinear) -> torch.Tensor:
        weight = linear.parts[0]
        few = rows <= packed_gemv.PACKED_GEMV_MAX_ROWS
        if is_grid(weight.form.kind) and few:
            grid_row.grid_row(x, weight, out, epilogue, bench.norm, cut)
        elif is_grid(weight.form.kind):
            grid_mma.grid_mma(half_rows.half_rows(x, bench.norm), weight, out, epilogue, cut)
        elif few:
            packed_gemv.packed_gemv(x, weight, out, epilogue, bench.norm, cut)
        else:
            packed_mma.packed_mma(x, weight, out, epilogue, cut)
        return out

    return one


def _compile_task(task: tuple[Any, bool, str, Layer, int, Any]) -> str | None:
    target, pdl, name, layer, rows, cut = task
    kernels = (
        (packed_gemv, "_packed_gemv_kernel"), (packed_mma, "_packed_mma_kernel"), (grid_row, "grid_row_kernel"),
        (grid_mma, "grid_mma_kernel"), (half_rows, "_half_rows_kernel"),
    )  # fmt: skip
    only_compile(target, pdl, kernels)
    card = this_card()
    grid_row.card_of = grid_mma.card_of = lambda device: card
    try:
        bench = Bench(name, layer, "meta")
        with_cut(bench, rows, cut)(bench.linears[0])
    except Exception as error:
        return f"{name} {layer.name} {rows} {cut}: {type(error).__name__}: {str(error).strip()[-160:]}"
    return None


def tune(formats: list[str], layers: list[Layer], all_rows: list[int]) -> None:
    """Try every candidate of every case and print the best three."""
    this_card()
    cases = [
        (f, layer, rows, cut) for f in formats for layer in layers for rows in all_rows for cut in cuts(f, layer, rows)
    ]
    compile_cases(_compile_task, cases)
    for name, layer in itertools.product(formats, layers):
        bench = Bench(name, layer, "cuda")
        for rows in all_rows:
            guarded(f"{name} {layer.name} {rows}", lambda n=name, r=rows, b=bench: _tuned(n, b, r))


def _tuned(name: str, bench: Bench, rows: int) -> None:
    found: list[tuple[float, Any]] = []
    for cut in cuts(name, bench.layer, rows):
        try:
            found.append((bench.chain_us(with_cut(bench, rows, cut)), cut))
        except Exception as failure:
            print(f"  {cut}: {type(failure).__name__}: {str(failure).strip()[:120]}")
    shipped = bench.chain_us(bench.call(rows))
    print(
        f"{name} {bench.layer.name} rows {rows}: as shipped {shipped:.2f} us {bench.share(shipped):.1f} %", flush=True
    )
    for us, cut in sorted(found)[:4]:
        print(f"   {us:8.2f} us {bench.share(us):5.1f} %  {tuple(cut)}", flush=True)


def compare(formats: list[str], layers: list[Layer], all_rows: list[int]) -> None:
    """A row for each format and shape: microseconds (percent of the bandwidth) for each number of rows."""
    few = [rows for rows in all_rows if rows <= packed_gemm.PACKED_SKINNY_MAX_ROWS]
    this_card()
    compile_cases(_compile_task, [(*case, None) for case in itertools.product(formats, layers, few)])
    print(f"{'format':8}{'layer':9}" + "".join(f"{rows:>15}" for rows in all_rows))
    for name, layer in itertools.product(formats, layers):
        bench = Bench(name, layer, "cuda")
        cells = []
        for rows in all_rows:
            us = bench.chain_us(bench.call(rows))
            cells.append(f"{us:8.1f} ({bench.share(us):3.0f} %)")
        print(f"{name:8}{layer.name:9}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="search for better cuts instead of measuring")
    parser.add_argument("--formats", default="Q4_K,Q6_K", help="GGUF types, int4, int8, e4m3, nf4; separated by commas")
    parser.add_argument("--layers", help="only these, by name, separated by commas")
    parser.add_argument("--rows", help="only these numbers of rows, separated by commas")
    options = parser.parse_args()
    formats = options.formats.split(",")
    layers = [layer for layer in LAYERS if layer.model == "8b"]
    if options.layers:
        layers = [layer for layer in layers if layer.name in options.layers.split(",")]
    rows = [int(value) for value in options.rows.split(",")] if options.rows else list(ROWS)
    (tune if options.tune else compare)(formats, layers, rows)


if __name__ == "__main__":
    main()
