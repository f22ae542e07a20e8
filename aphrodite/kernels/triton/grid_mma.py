"""3 to 64 activation rows times a weight that names points of a grid, on mma.sync: act(x W^T + b) + residual.

Bound by reading the planes for few rows, by taking points apart and the matrix units for many. Points come from a table
in shared memory as registers of the A operand (`grid_gluon.py`), times the odd number 2 s + 1 of their group, which
float16 holds exactly; the factor of a super-block goes to the sums of its columns. Activations are float16 with a power
of two for each row (`half_rows.py`), and go through shared memory word by word: the eight columns that a thread has of
a word follow one another.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
from typing import Any, NamedTuple  # noqa: F401 (Any: the type comments of kernels)

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from aphrodite.kernels.triton.epilogue import WORKSPACE_VALUES, Epilogue, split_workspace
from aphrodite.kernels.triton.grid_gluon import (
    Card,
    card_of,
    fill_table,
    group_words,
    lane_copy,
    load_step,
    odd_scale_pair,
    operand_table,
    run_of_step,
    table_copies,
    table_ints,
    unit,
    weight_operand,
    word_values,
)
from aphrodite.kernels.triton.half_rows import HalfRows
from aphrodite.kernels.triton.int4_gluon import finish, launch_dependents, sum_of_splits, wait_for_producer
from aphrodite.kernels.triton.launch import ceil_div, direct_launch, launch_options, next_power_of_2, pdl_supported
from aphrodite.kernels.triton.packed_grid import grid_arguments
from aphrodite.quantization.planes import Planes

SPARE_BYTES = 16384  # of a block's shared memory: what layouts that change take, with 64 columns


class GridMmaCut(NamedTuple):
    """How the product is cut.

    Attributes:
        warps: side by side over rows; 4 or 8.
        strips: of 16 weight rows, of each warp.
        runs: of a weight row, 1 or 2 for each of four threads in a step.
        splits: of the inputs among blocks.
        stages: steps of activations in flight.
        depth: steps of weights in flight, besides the one being multiplied.
        copies: of the table.
    """

    warps: int
    strips: int
    runs: int
    splits: int
    stages: int
    depth: int
    copies: int


@functools.cache
def grid_mma_cut(out_features: int, in_features: int, rows: int, kind: str, card: Card) -> GridMmaCut | None:
    """The cut for a weight `[out, in]` and 3 to 64 activation rows; None where a block's memory is too small.

    Blocks are few, for each fills its table; inputs are split where tiles would not fill the multiprocessors.
    """
    columns = max(8, next_power_of_2(rows))
    runs = 2 if rows <= 16 else 1
    stage = 256 * runs * columns
    copies = table_copies(kind, min(131072, card.shared - 3 * stage - SPARE_BYTES))
    if not copies:
        return None
    warps = 8 if 4 * table_ints(kind, copies) > 32768 else 4
    strips = 1 if rows > 32 or warps == 8 else 2
    tiles = ceil_div(out_features, 16 * warps * strips)
    steps = ceil_div(in_features, 128 * runs)
    most = WORKSPACE_VALUES // (tiles * 16 * warps * strips * columns)
    splits = max(1, min(2 * card.multiprocessors // tiles, steps * runs // 4, most))
    while (splits - 1) * ceil_div(steps, splits) >= steps:
        splits -= 1
    return GridMmaCut(warps, strips, runs, splits, 3, 1, copies)


@gluon.constexpr_function
def word_layout(columns, warps):
    """Layout of a word of the activations `[columns, 4 threads x 8]` as the B operand wants it."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[8 << i, 0] for i in range(columns.bit_length() - 4)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (warps.bit_length() - 1), [], [columns, 32])


@gluon.constexpr_function
def copy_layout(words, columns, warps):
    """Threads that copy a step of activations `[words x columns, 32]`, 16 bytes each: words of a thread are neighbours
    in global memory."""
    across = [[columns << i, 0] for i in range(words.bit_length() - 1)] + [
        [1 << i, 0] for i in range(columns.bit_length() - 1)
    ]
    most = 3 + warps.bit_length() - 1
    of_warps = across[3:most] + [[0, 0]] * (most - len(across))
    registers = [[0, 1], [0, 2], [0, 4]] + across[most:]
    lanes = [[0, 8], [0, 16]] + across[:3]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [words * columns, 32])


@gluon.jit
def _request(x, x_stride, M, smem, step, columns: gl.constexpr, RUNS: gl.constexpr, COLUMNS: gl.constexpr):
    """Request the activations of a step, `[words x COLUMNS, 32]`; zeros behind the last column and row."""
    row = gl.arange(0, 4 * RUNS * COLUMNS)[:, None]
    place = gl.arange(0, 32)[None, :]
    column = step * (128 * RUNS) + place // 8 * (32 * RUNS) + row // COLUMNS * 8 + place % 8
    token = row % COLUMNS
    inside = token < M
    if columns % (128 * RUNS) == 0:
        inside = inside & (column >= 0)
    else:
        inside = inside & (column < columns)
    layout: gl.constexpr = copy_layout(4 * RUNS, COLUMNS, gl.num_warps())
    pointers = x + gl.set_auto_layout(token * x_stride + column, layout)
    async_copy.async_copy_global_to_shared(smem, pointers, mask=gl.set_auto_layout(inside, layout))


@gluon.jit
def _add_step(
    total, loaded, smem, lane, KIND: gl.constexpr, COPIES: gl.constexpr, RUNS: gl.constexpr, COLUMNS: gl.constexpr
):
    """`total` `[1, rows, COLUMNS]` with the products of a step, whose activations lie at `smem`."""
    mma: gl.constexpr = total.type.layout
    WORDS: gl.constexpr = group_words(KIND)
    product = gl.zeros(total.shape, gl.float32, mma)
    for run in gl.static_range(RUNS):
        of_run = run_of_step(loaded, run)
        for part in gl.static_range(4 // WORDS):
            pair = of_run[0]
            if KIND != "tq1_0":
                pair = odd_scale_pair(of_run, part, KIND)
            for word in gl.static_range(part * WORDS, (part + 1) * WORDS):
                weight = weight_operand(word_values(of_run, lane, word, pair, KIND, COPIES, gl.float16), mma)
                values = smem.slice((run * 4 + word) * COLUMNS, COLUMNS).load(word_layout(COLUMNS, gl.num_warps()))
                ordered = values.reshape(COLUMNS, 4, 2, 2, 2).permute(2, 3, 1, 4, 0).reshape(1, 32, COLUMNS)
                columns = gl.convert_layout(ordered, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)
                product = mma_v2(weight, columns, product)
    factor = gl.convert_layout(loaded[3].to(gl.float32) * unit(KIND), gl.SliceLayout(2, mma), assert_trivial=True)
    return total + product * factor[:, :, None]


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def grid_mma_kernel(
    x,  # [M, in] float16
    x_stride,
    x_scales,  # [M] float32, or anything when not HAS_SCALES
    low,
    high,
    scales,
    super_scales,
    table,  # [entries, values / 2] int32, pairs of float16
    bias,
    residual,
    out,  # [M, width]
    out_stride,
    workspace,  # [tiles, SPLITS, columns, rows] float32
    counters,  # [tiles] int32, zero between launches
    M,
    out_features,
    columns: gl.constexpr,
    KIND: gl.constexpr,
    COPIES: gl.constexpr,  # of the table
    STRIPS: gl.constexpr,
    RUNS: gl.constexpr,
    COLUMNS: gl.constexpr,  # M padded
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    DEPTH: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    WARPS: gl.constexpr = gl.num_warps()
    R: gl.constexpr = 16 * WARPS * STRIPS
    PAIRS: gl.constexpr = ACTIVATION is not None
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS, 1], [1, 16, 8])
    steps: gl.constexpr = (columns + 128 * RUNS - 1) // (128 * RUNS)
    share: gl.constexpr = (steps + SPLITS - 1) // SPLITS
    first_row = gl.program_id(0) * R
    start = gl.program_id(1) * share
    end = gl.minimum(start + share, steps)
    queue = ()  # type: Any
    for ahead in gl.static_range(DEPTH):
        queue = queue + (
            load_step(
                low, high, scales, super_scales, first_row, out_features, gl.minimum(start + ahead, steps - 1),
                columns, KIND, 1, WARPS, STRIPS, RUNS, PAIRS,
            ),
        )  # fmt: skip
    # Loads of the table know where it lies: at the beginning of all shared memory.
    TABLE: gl.constexpr = table_ints(KIND, COPIES) // 16
    STAGE: gl.constexpr = 4 * RUNS * COLUMNS
    shared = gl.allocate_shared_memory(gl.int32, [TABLE + STAGES * STAGE, 16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fill_table(table, shared, KIND, COPIES)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    smem = shared.index(TABLE)._reinterpret(gl.float16, [STAGES, STAGE, 32], flat)
    wait_for_producer(PDL)
    for ahead in gl.static_range(STAGES - 1):
        if start + ahead < end:
            _request(x, x_stride, M, smem.index(ahead), start + ahead, columns, RUNS, COLUMNS)
        async_copy.commit_group()
    gl.thread_barrier()
    lane = lane_copy(KIND, COPIES)
    total = gl.zeros([1, R, COLUMNS], gl.float32, mma)
    for step in range(start, end):
        loaded = queue[0]
        queue = queue[1:] + (
            load_step(
                low, high, scales, super_scales, first_row, out_features, gl.minimum(step + DEPTH, steps - 1),
                columns, KIND, 1, WARPS, STRIPS, RUNS, PAIRS,
            ),
        )  # fmt: skip
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        turn = step - start
        if step + STAGES - 1 < end:
            _request(
                x, x_stride, M, smem.index((turn + STAGES - 1) % STAGES), step + STAGES - 1, columns, RUNS, COLUMNS
            )
        async_copy.commit_group()
        total = _add_step(total, loaded, smem.index(turn % STAGES), lane, KIND, COPIES, RUNS, COLUMNS)
    result = total.reshape(R, COLUMNS)
    if HAS_SCALES:
        layout: gl.constexpr = gl.SliceLayout(0, result.type.layout)
        column = gl.arange(0, COLUMNS, layout)
        result = result * gl.load(x_scales + column, mask=column < M, other=0.0)[None, :]
    strip = gl.program_id(0) * (WARPS * STRIPS)
    if SPLITS == 1:
        finish(
            result, bias, residual, out, out_stride, M, out_features, strip, 0, WARPS * STRIPS, HAS_BIAS, HAS_RESIDUAL,
            ACTIVATION,
        )  # fmt: skip
    else:
        last, result = sum_of_splits(result, workspace, counters, gl.program_id(0), gl.program_id(1), SPLITS)
        if last:
            finish(
                result, bias, residual, out, out_stride, M, out_features, strip, 0, WARPS * STRIPS, HAS_BIAS,
                HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip


def grid_mma(
    x: torch.Tensor | HalfRows,
    weight: Planes,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    cut: GridMmaCut | None = None,
) -> None:
    """Writes act(x W^T + b) + residual for 3 to 64 rows in float16, with or without scales, whose rows are multiples of
    16 bytes; `out` is of any 16-bit type. Arguments as `packed_gemv`'s."""
    form = weight.form
    values, scales = x if isinstance(x, HalfRows) else (x, x)
    card = card_of(values.device)
    cut = cut or grid_mma_cut(weight.rows, form.columns, values.shape[0], form.kind, card)
    if cut is None:
        raise ValueError(f"{form.kind}'s table takes more shared memory than {card.shared} bytes")
    workspace, counters = split_workspace(values.device) if cut.splits > 1 else (values, values)
    pdl = pdl_supported(values.device)
    grid_mma_kernel[(ceil_div(weight.rows, 16 * cut.warps * cut.strips), cut.splits)](
        values,
        values.stride(0),
        scales,
        *grid_arguments(weight)[:-1],
        operand_table(form.kind, torch.float16, values.device),
        out if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        workspace,
        counters,
        values.shape[0],
        weight.rows,
        columns=form.columns,
        KIND=form.kind,
        COPIES=cut.copies,
        STRIPS=cut.strips,
        RUNS=cut.runs,
        COLUMNS=max(8, next_power_of_2(values.shape[0])),
        SPLITS=cut.splits,
        STAGES=cut.stages,
        DEPTH=cut.depth,
        HAS_SCALES=scales is not values,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
