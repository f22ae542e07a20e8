"""One or two activation rows times a weight that names points of a grid, on mma.sync: act(norm(x) W^T + b) + residual.

1.6 to 3.5 bits a value are read once. Points come from a table in shared memory as registers of the A operand
(`grid_gluon.py`), two and a half instructions a weight in all. Products are the matrix units' work, and the sums: of
the B operand's eight columns each of four threads that share a row has two, in which all but its own run is zero. So
every sum is of one thread's run, and takes that run's scale. Two columns are two rows of activations, or what 16 bits
hold of a normed one and the rest: weight and activation are exact, sums are float32.

A block has the whole table, and walks over tiles of rows without a barrier; its warps share the inputs and add up at
the end.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple  # noqa: F401 (Any: the type comments of kernels)

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.grid_gluon import (
    Card,
    card_of,
    eight_of,
    fill_table,
    group_words,
    lane_copy,
    load_step,
    nothing,
    odd_scale,
    operand_table,
    run_of_step,
    table_copies,
    table_ints,
    unit,
    weight_operand,
    word_values,
)
from aphrodite.kernels.triton.int4_gluon import gated, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.launch import ceil_div, direct_launch, launch_options, next_power_of_2, pdl_supported
from aphrodite.kernels.triton.packed_grid import grid_arguments
from aphrodite.quantization.planes import Planes

logger = logging.getLogger("aphrodite.kernels")

MAX_TILES = 64  # of a block
REGISTERS = 65536  # of a multiprocessor
SPARE_BYTES = 4096  # of a block's shared memory: zeros, and what sums over warps take
LOAD_EIGHT = gl.constexpr(
    "{ .reg .b32 at; mov.u32 at, global_smem; add.u32 at, at, $4; ld.shared.v4.b32 {$0,$1,$2,$3}, [at]; }"
)
# The compiler would set a barrier between two stores to one array.
STORE = gl.constexpr(
    "{ .reg .b32 at; mov.u32 at, global_smem; add.u32 at, at, $1; st.shared.b32 [at], $2; mov.b32 $0, 0; }"
)
SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor for blocks


class GridRowCut(NamedTuple):
    """How the product is cut.

    Attributes:
        splits: of the inputs, one a warp; a power of two, as are the next ones.
        across: warps side by side over rows.
        strips: of 16 rows of each warp.
        runs: of a row in a step, 1 or 2 for each of four threads.
        depth: steps in flight, besides the one being multiplied.
        blocks: for each multiprocessor.
        copies: of the table.
    """

    splits: int
    across: int
    strips: int
    runs: int
    depth: int
    blocks: int
    copies: int

    @property
    def tile(self) -> int:
        """Rows that a block multiplies at a time."""
        return 16 * self.across * self.strips

    @property
    def registers(self) -> int:
        """Of a thread, where the blocks share those of a multiprocessor."""
        return REGISTERS // (32 * self.splits * self.across * self.blocks) // 8 * 8

    def programs(self, out_features: int, multiprocessors: int) -> int:
        tiles = ceil_div(out_features, self.tile)
        return max(min(tiles, self.blocks * multiprocessors), ceil_div(tiles, MAX_TILES))

    def padded(self, in_features: int) -> int:
        """Inputs, in whole steps."""
        return ceil_div(in_features, self.splits * self.runs * 128) * self.splits * self.runs * 128

    def shared(self, kind: str, out_features: int, in_features: int, rows: int, lines: int, programs: int) -> int:
        """Bytes of shared memory of a block."""
        tiles = next_power_of_2(ceil_div(ceil_div(out_features, self.tile), programs))
        sums = 4 * rows * tiles * self.tile * self.splits
        table: int = 4 * table_ints(kind, self.copies)
        return table + lines * (2 * self.padded(in_features) + 64) + sums + SPARE_BYTES


@functools.cache
def grid_row_cut(
    out_features: int, in_features: int, rows: int, normed: bool, kind: str, card: Card
) -> GridRowCut | None:
    """The cut for a weight `[out, in]` and 1 or 2 activation rows; None where a block's memory is too small.

    As measured on an H100: sixteen warps a multiprocessor, in one block where there is much to do. Few copies of a
    table make lanes wait for one another, many leave room for fewer blocks.
    """
    alone = ((1, 131072), (1, 65536), (1, 32768))
    for blocks, most in alone if out_features >= 16384 else ((2, 65536), *alone):
        copies = table_copies(kind, most)
        warps = 16 // blocks
        splits = min(warps, 8)
        while splits > 1 and ceil_div(in_features, 256 * splits) * 256 * splits > 1.13 * in_features:
            splits //= 2
        cut = GridRowCut(splits, warps // splits, 1, 2, 1, blocks, copies)
        programs = cut.programs(out_features, card.multiprocessors)
        shared = cut.shared(kind, out_features, in_features, rows, rows * (1 + normed), programs)
        if copies and blocks * (shared + 1024) <= card.shared + 1024:
            return cut
    if rows == 1:  # two that do not fit together are multiplied one after the other
        logger.info(
            "a row times %s of %d inputs: not by Gluon's kernel, for blocks have %d bytes",
            kind,
            in_features,
            card.shared,
        )
    return None


@gluon.constexpr_function
def vector_layout(warps):
    return gl.BlockedLayout([8], [32], [warps], [0])


@gluon.jit
def _load_part(row, part, in_features: gl.constexpr, PART: gl.constexpr):
    """Values of a part of a row `[in]`, zeros beyond it."""
    k = part * PART + gl.arange(0, PART, vector_layout(gl.num_warps()))
    return gl.load(row + k, mask=k < in_features, other=0.0)


@gluon.jit
def _stage_row(
    x, norm_weight, line, rest, columns: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr, HAS_NORM: gl.constexpr
):
    """A row of activations into `line` `[PARTS, PART]`, zeros behind it; where there is a norm times its weight, and
    what 16 bits do not hold of that into `rest`. Returns the sum of its squares, with a norm."""
    squares = gl.zeros([PART], gl.float32, vector_layout(gl.num_warps()))
    for part in gl.static_range(PARTS):
        values = _load_part(x, part, columns, PART)
        if HAS_NORM:
            wide = values.to(gl.float32)
            squares += wide * wide
            wide = wide * _load_part(norm_weight, part, columns, PART).to(gl.float32)
            values = wide.to(values.dtype)
            rest.index(part).store((wide - values.to(gl.float32)).to(values.dtype))
        line.index(part).store(values)
    return gl.sum(squares, 0)


@gluon.constexpr_function
def column_layout(k_warps, n_warps):
    """Layout of activations `[k_warps, 4 threads, 8 columns, 8]`, as the B operand has them."""

    def basis(dimension, value):
        return [value if d == dimension else 0 for d in range(4)]

    registers = [basis(3, 1), basis(3, 2), basis(3, 4)]
    lanes = [basis(1, 1), basis(1, 2), basis(2, 1), basis(2, 2), basis(2, 4)]
    warps = [basis(0, 0) for i in range(n_warps.bit_length() - 1)]
    warps += [basis(0, 1 << i) for i in range(k_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [k_warps, 4, 8, 8])


@gluon.jit
def _column_places(
    first: gl.constexpr, zeros: gl.constexpr, line_bytes: gl.constexpr, LINES: gl.constexpr, K_WARPS: gl.constexpr,
    N_WARPS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Where the columns of a step's first word lie, `[K_WARPS, 4, 8]`, of lines from `first`, and how far apart steps
    are: of a thread's two columns lines of its own run, all others zeros, which lie in other banks."""
    L: gl.constexpr = gl.SliceLayout(3, column_layout(K_WARPS, N_WARPS))
    q = gl.arange(0, K_WARPS)[:, None, None]
    t = gl.arange(0, 4)[None, :, None]
    n = gl.arange(0, 8)[None, None, :]
    own = gl.set_auto_layout((n // 2 == t) & (n % 2 < LINES) & (q >= 0), L)
    at = gl.set_auto_layout(first + n % 2 * line_bytes + (q * 4 + t) * (RUNS * 64), L)
    return gl.where(own, at, zeros) + nothing(), gl.where(own, K_WARPS * 4 * RUNS * 64, 0)


@gluon.jit
def _columns(places, mma: gl.constexpr, dtype: gl.constexpr):
    """Eight values from each place as the B operand `[K_WARPS, 32, 8]`."""
    K: gl.constexpr = places.shape[0]
    wide = places[:, :, :, None].broadcast_to((K, 4, 8, 8))
    values = eight_of(LOAD_EIGHT, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", (wide,), dtype)
    ordered = values.reshape(K, 4, 8, 2, 2, 2).permute(0, 3, 4, 1, 5, 2).reshape(K, 32, 8)
    return gl.convert_layout(ordered, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def _add_step(
    totals, loaded, lane, places, held, KIND: gl.constexpr, COPIES: gl.constexpr, mma: gl.constexpr,
    dtype: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """`totals`, `[K_WARPS, rows, 8]` for each pair of lines, and a step's products; with the columns of its words that
    are `held` in registers, if any are."""
    WORDS: gl.constexpr = group_words(KIND)
    shape: gl.constexpr = totals[0].shape
    for run in gl.static_range(RUNS):
        of_run = run_of_step(loaded, run)
        unit_factor = of_run[4] * unit(KIND)
        for part in gl.static_range(4 // WORDS):
            products = ()  # type: Any
            for _ in gl.static_range(len(totals)):
                products = products + (gl.zeros(shape, gl.float32, mma),)
            for word in gl.static_range(part * WORDS, (part + 1) * WORDS):
                weight = weight_operand(word_values(of_run, lane, word, None, KIND, COPIES, dtype), mma)
                new_products = ()  # type: Any
                for pair in gl.static_range(len(totals)):
                    if len(held) > 0:
                        values = held[run * 4 + word]
                    else:
                        values = _columns(places[pair] + (run * 64 + word * 16), mma, dtype)
                    new_products = new_products + (mma_v2(weight, values, products[pair]),)
                products = new_products
            factor = unit_factor.broadcast_to(shape[0], shape[1], 4)
            if KIND != "tq1_0":
                factor = factor * odd_scale(of_run, part, KIND).to(gl.float32)
            factor = gl.convert_layout(gl.join(factor, factor).reshape(shape), mma, assert_trivial=True)
            new_totals = ()  # type: Any
            for pair in gl.static_range(len(totals)):
                new_totals = new_totals + (totals[pair] + factor * products[pair],)
            totals = new_totals
    return totals


@gluon.jit
def _line_sums(totals, M: gl.constexpr):
    """Of `totals` `[K_WARPS, rows, 8]` for each pair of lines the sums of each row of activations `[K_WARPS, rows]`."""
    sums = ()  # type: Any
    for pair in gl.static_range(len(totals)):
        lines = gl.sum(totals[pair].reshape(totals[0].shape[0], totals[0].shape[1], 4, 2), 2)
        if len(totals) < M:
            sums = sums + lines.split()
        else:
            sums = sums + (gl.sum(lines, 2),)
    return sums


@gluon.jit
def _leave(sums, place):
    """Store `[K_WARPS, rows]` at `place` in shared memory, the splits of a row side by side."""
    K: gl.constexpr = sums.shape[0]
    row = gl.arange(0, sums.shape[1])[None, :]
    at = gl.set_auto_layout(place + row * (K * 4) + gl.arange(0, K)[:, None] * 4, sums.type.layout)
    gl.inline_asm_elementwise(STORE, "=r,r,r", [at, sums], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _finish_row(
    total, bias, residual, out, row, out_stride, out_features, index, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of the sums `total` of weight rows `index`, and the store."""
    ROWS: gl.constexpr = total.shape[0]
    layout: gl.constexpr = total.type.layout
    index = gl.set_auto_layout(index, layout)
    if HAS_BIAS:
        total += gl.load(bias + index, mask=index < out_features, other=0.0).to(gl.float32)
    if ACTIVATION is None:
        width = out_features
        result = total
    else:
        width = out_features // 2
        gate, up = total.reshape(ROWS // 2, 2).split()
        result = gated(gate, up, ACTIVATION)
        index, _ = index.reshape(ROWS // 2, 2).split()
        index = index // 2
    inside = index < width
    at = row * out_stride + index
    if HAS_RESIDUAL:
        result += gl.load(residual + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@gluon.constexpr_function
def sum_layout(splits, warps):
    """Threads that add up what the warps of a row have found `[rows, splits]`."""
    return gl.BlockedLayout([2, splits], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def _load_ahead(
    planes, which, count, out_features, columns: gl.constexpr, STEPS: gl.constexpr, KIND: gl.constexpr,
    K_WARPS: gl.constexpr, N_WARPS: gl.constexpr, STRIPS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """`load_step` of step `which` of the block's `count`, tile after tile; behind the last the last again."""
    low, high, scales, super_scales = planes
    which = gl.minimum(which, count - 1)
    first_row = (gl.program_id(0) + which // STEPS * gl.num_programs(0)) * (16 * N_WARPS * STRIPS)
    return load_step(
        low, high, scales, super_scales, first_row, out_features, which % STEPS, columns, KIND, K_WARPS, N_WARPS,
        STRIPS, RUNS, False,
    )  # fmt: skip


@direct_launch
@gluon.jit(do_not_specialize=["tiles"])
def grid_row_kernel(
    x,  # [M, in]
    x_stride,
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    low,
    high,
    scales,
    super_scales,
    table,  # [entries, values / 2] int32, pairs of 16-bit floats
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # as out, or anything when not HAS_RESIDUAL
    out,  # [M, width]
    out_stride,
    out_features,
    tiles,  # of rows
    columns: gl.constexpr,
    KIND: gl.constexpr,
    COPIES: gl.constexpr,  # of the table
    M: gl.constexpr,
    K_WARPS: gl.constexpr,
    N_WARPS: gl.constexpr,
    STRIPS: gl.constexpr,
    RUNS: gl.constexpr,
    DEPTH: gl.constexpr,
    TILES: gl.constexpr,  # of a block, a power of two
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    dtype: gl.constexpr = x.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [K_WARPS, N_WARPS, 1], [1, 16, 8])
    R: gl.constexpr = 16 * N_WARPS * STRIPS
    STEPS: gl.constexpr = (columns + K_WARPS * RUNS * 128 - 1) // (K_WARPS * RUNS * 128)
    PLANES: gl.constexpr = 2 if HAS_NORM else 1
    PAIRS: gl.constexpr = (M * PLANES + 1) // 2
    # Shared memory in units of 64 bytes; a second line lies in other banks than the first, and zeros in others still.
    TABLE: gl.constexpr = table_ints(KIND, COPIES) // 16
    LINE: gl.constexpr = PARTS * PART // 32 + 1
    ZEROS: gl.constexpr = TABLE + M * PLANES * LINE + M * PLANES * LINE % 2
    SUMS: gl.constexpr = ZEROS + 4
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    by_split: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    smem = gl.allocate_shared_memory(gl.int32, [SUMS + M * TILES * R * K_WARPS // 16, 16], flat)
    first = gl.program_id(0)
    count = (tiles - first + gl.num_programs(0) - 1) // gl.num_programs(0) * STEPS
    queue = ()  # type: Any
    planes = (low, high, scales, super_scales)
    for ahead in gl.static_range(DEPTH):
        queue = queue + (
            _load_ahead(planes, ahead, count, out_features, columns, STEPS, KIND, K_WARPS, N_WARPS, STRIPS, RUNS),
        )
    fill_table(table, smem, KIND, COPIES)
    smem.index(ZEROS)._reinterpret(gl.int32, [64], flat).store(
        gl.zeros([64], gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    )
    wait_for_producer(PDL)
    norms = ()  # type: Any
    for m in gl.static_range(M):
        line = smem.index(TABLE + m * PLANES * LINE)._reinterpret(dtype, [PARTS, PART], flat)
        rest = smem.index(TABLE + (m * PLANES + PLANES - 1) * LINE)._reinterpret(dtype, [PARTS, PART], flat)
        squares = _stage_row(x + m * x_stride, norm_weight, line, rest, columns, PARTS, PART, HAS_NORM)
        if HAS_NORM:
            norms = norms + (1.0 / gl.sqrt(squares / columns + eps),)
    gl.thread_barrier()
    lane = lane_copy(KIND, COPIES)
    first_places = ()  # type: Any
    for pair in gl.static_range(PAIRS):
        of_pair, stride = _column_places(
            (TABLE + 2 * pair * LINE) * 64, ZEROS * 64 + 32, LINE * 64, M * PLANES, K_WARPS, N_WARPS, RUNS
        )
        first_places = first_places + (of_pair,)
    held = ()  # type: Any
    if STEPS == 1 and PAIRS == 1:
        for word in gl.static_range(4 * RUNS):
            held = held + (_columns(first_places[0] + word * 16, mma, dtype),)
    for tile in range(count // STEPS):
        totals = ()  # type: Any
        for _ in gl.static_range(PAIRS):
            totals = totals + (gl.zeros([K_WARPS, R, 8], gl.float32, mma),)
        for step in range(STEPS):
            loaded = queue[0]
            which = tile * STEPS + step + DEPTH
            queue = queue[1:] + (
                _load_ahead(planes, which, count, out_features, columns, STEPS, KIND, K_WARPS, N_WARPS, STRIPS, RUNS),
            )
            places = ()  # type: Any
            for pair in gl.static_range(PAIRS):
                places = places + (first_places[pair] + step * stride,)
            totals = _add_step(totals, loaded, lane, places, held, KIND, COPIES, mma, dtype, RUNS)
        found = _line_sums(totals, M)
        for m in gl.static_range(M):
            _leave(found[m], SUMS * 64 + (m * TILES + tile) * (R * K_WARPS * 4))
    gl.thread_barrier()
    numbers = gl.arange(0, TILES * R)
    index = (first + numbers // R * gl.num_programs(0)) * R + numbers % R
    of_rows = smem.index(SUMS)._reinterpret(gl.float32, [M, TILES * R, K_WARPS], by_split)
    for m in gl.static_range(M):
        total = gl.sum(of_rows.index(m).load(sum_layout(K_WARPS, gl.num_warps())), 1)
        if HAS_NORM:
            total = total * norms[m]
        _finish_row(total, bias, residual, out, m, out_stride, out_features, index, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


def staging(in_features: int, cut: GridRowCut) -> dict[str, int]:
    """How a row of activations, padded to whole steps, is cut for staging: 8 values a thread or fewer."""
    padded = cut.padded(in_features)
    part = math.gcd(padded, 256 * cut.splits * cut.across)
    return {"PARTS": padded // part, "PART": part}


def grid_row(
    x: torch.Tensor,
    weight: Planes,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    norm: tuple[torch.Tensor, float] | None = None,
    cut: GridRowCut | None = None,
) -> bool:
    """Writes act(norm(x) W^T + b) + residual for 1 or 2 rows of a 16-bit type; arguments as `packed_gemv`'s.

    With a norm, x times its weight must not be more than the type holds.

    Returns whether it did: activations and table may take more shared memory than a block of this card can have.
    """
    form = weight.form
    card = card_of(x.device)
    cut = cut or grid_row_cut(weight.rows, form.columns, x.shape[0], norm is not None, form.kind, card)
    if cut is None and x.shape[0] == 2:
        return all(grid_row(x[row : row + 1], weight, out[row : row + 1], epilogue, norm) for row in range(2))
    if cut is None:
        return False
    tiles = ceil_div(weight.rows, cut.tile)
    programs = cut.programs(weight.rows, card.multiprocessors)
    norm_weight, eps = norm if norm is not None else (x, 0.0)
    pdl = pdl_supported(x.device)
    grid_row_kernel[(programs,)](
        x,
        x.stride(0),
        norm_weight,
        eps,
        *grid_arguments(weight)[:-1],
        operand_table(form.kind, x.dtype, x.device),
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        weight.rows,
        tiles,
        columns=form.columns,
        KIND=form.kind,
        COPIES=cut.copies,
        M=x.shape[0],
        K_WARPS=cut.splits,
        N_WARPS=cut.across,
        STRIPS=cut.strips,
        RUNS=cut.runs,
        DEPTH=cut.depth,
        TILES=next_power_of_2(ceil_div(tiles, programs)),
        **staging(form.columns, cut),
        HAS_NORM=norm is not None,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.splits * cut.across,
        maxnreg=cut.registers,
        **launch_options(pdl),
    )
    return True
