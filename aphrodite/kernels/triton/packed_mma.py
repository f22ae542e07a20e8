"""3 to 64 activation rows times a weight in planes of bits on mma.sync: act(x W^T + b) + residual.

Bound by reading the planes up to some 16 rows, by unpacking and the matrix units above. Weights never go through
shared memory: a thread loads the runs of its own rows of the A operand and unpacks them where the matrix units take
them, for the order in which columns are summed is free. Fields 2 j and 2 j + 1 of the words of four threads' runs are
the 32 columns of a part; the activations, B, lie in shared memory part by part, so that a thread loads its eight at
once.

Weights are rounded to tf32 beside bfloat16 activations (to float16 beside those of float16), as in `packed_gemm.py`,
whose kernel goes on for every other card and version of Triton. Points of a grid have `grid_mma.py`.
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
from aphrodite.kernels.triton.int4_gluon import finish, launch_dependents, sum_of_splits, wait_for_producer
from aphrodite.kernels.triton.launch import ceil_div, direct_launch, launch_options, next_power_of_2, pdl_supported
from aphrodite.kernels.triton.packed import (
    BITS_OF_ONE,
    form_arguments,
    mantissa_place,
    packed_code,
    packed_mantissa,
    plane_arguments,
)
from aphrodite.quantization.planes import Planes

WARPS = 4


class PackedMmaCut(NamedTuple):
    """How the product is cut.

    Attributes:
        strips: of 16 weight rows, of each of the four warps.
        runs: of a weight row, 1 or 2 for each of four threads in a step.
        splits: of the inputs among blocks.
        stages: steps of activations in flight.
        depth: steps of weights in flight, besides the one being multiplied.
    """

    strips: int
    runs: int
    splits: int
    stages: int
    depth: int


@functools.cache
def packed_mma_cut(out_features: int, in_features: int, rows: int, run: int, group_size: int) -> PackedMmaCut:
    """The cut for a weight `[out, in]` with runs of `run` columns and 3 to 64 activation rows, as measured on an H100.

    Inputs are split where tiles would not fill its 132 multiprocessors; two groups in a run take a strip's registers.
    """
    strips = 1 if rows > 32 and group_size < run else 2
    runs = 2 if rows <= 16 else 1
    tiles = ceil_div(out_features, 16 * WARPS * strips)
    steps = ceil_div(in_features, 4 * runs * run)
    most = WORKSPACE_VALUES // (tiles * 16 * WARPS * strips * max(8, next_power_of_2(rows)))
    splits = max(1, min(256 // tiles, steps * runs // 4, most))
    while (splits - 1) * ceil_div(steps, splits) >= steps:
        splits -= 1
    return PackedMmaCut(strips, runs, splits, 3, 1)


@gluon.constexpr_function
def weight_layout(strips, runs, inner):
    """Layout of words or scales `[rows, 4 threads, runs, inner]`: what a thread has of a row follows one another."""
    registers = [[0, 0, 0, 1 << i] for i in range(inner.bit_length() - 1)]
    registers += [[0, 0, 1 << i, 0] for i in range(runs.bit_length() - 1)]
    registers += [[8, 0, 0, 0]] + [[64 << i, 0, 0, 0] for i in range(strips.bit_length() - 1)]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64 * strips, 4, runs, inner])


@gluon.constexpr_function
def part_layout(columns):
    """Layout of a part of the activations `[columns, 4 threads x 8]` as the B operand wants it."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[8 << i, 0] for i in range(columns.bit_length() - 4)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [columns, 32])


@gluon.constexpr_function
def copy_layout(parts, columns):
    """Threads that copy a step of activations `[parts x columns, 32]`, 16 bytes each: parts of a thread are neighbours
    in global memory."""
    registers = [[0, 1], [0, 2], [0, 4]]
    across = [[columns << i, 0] for i in range(parts.bit_length() - 1)] + [
        [1 << i, 0] for i in range(columns.bit_length() - 1)
    ]
    lanes = [[0, 8], [0, 16]] + across[:3]
    return gl.DistributedLinearLayout(registers + across[5:], lanes, across[3:5], [], [parts * columns, 32])


@gluon.jit
def _request(
    x, x_stride, M, smem, step, columns: gl.constexpr, RUN: gl.constexpr, RUNS: gl.constexpr, COLUMNS: gl.constexpr
):
    """Request the activations of a step, `[parts x COLUMNS, 32]`."""
    SHARE: gl.constexpr = RUNS * RUN  # of a thread; a part has eight columns of each
    PARTS: gl.constexpr = SHARE // 8
    row = gl.arange(0, PARTS * COLUMNS)[:, None]
    place = gl.arange(0, 32)[None, :]
    column = step * (4 * SHARE) + place // 8 * SHARE + row // COLUMNS * 8 + place % 8
    token = row % COLUMNS
    inside = token < M
    if columns % (4 * SHARE) == 0:
        inside = inside & (column >= 0)
    else:
        inside = inside & (column < columns)
    layout: gl.constexpr = copy_layout(PARTS, COLUMNS)
    pointers = x + gl.set_auto_layout(token * x_stride + column, layout)
    async_copy.async_copy_global_to_shared(smem, pointers, mask=gl.set_auto_layout(inside, layout))


@gluon.jit
def _rows(first_row, out_features, PAIRS: gl.constexpr, STRIPS: gl.constexpr):
    """The rows of a tile, anew for each layout: numbers whose layout is left open take one."""
    row = gl.arange(0, 64 * STRIPS)
    if PAIRS:
        row = row // 16 * 16 + row % 8 * 2 + row // 8 % 2  # (gate, up) lie in a thread
    return gl.minimum(first_row + row, out_features - 1).to(gl.int64)


@gluon.jit
def _load_scales(
    field,
    rows,
    step,
    columns: gl.constexpr,
    GROUP: gl.constexpr,
    RUN: gl.constexpr,
    STRIPS: gl.constexpr,
    RUNS: gl.constexpr,
):
    """`[rows, 4, runs]` of the group that each run lies in, or of the two that it has; zeros behind the last."""
    SPANS: gl.constexpr = 2 if GROUP < RUN else 1
    groups: gl.constexpr = columns // GROUP
    layout: gl.constexpr = weight_layout(STRIPS, RUNS, SPANS)
    thread = gl.arange(0, 4)[None, :, None, None]
    run = (step * 4 + thread) * RUNS + gl.arange(0, RUNS)[None, None, :, None]
    if GROUP <= RUN:
        group = run * SPANS + gl.arange(0, SPANS)[None, None, None, :]
    else:
        group = run // (GROUP // RUN) + gl.arange(0, SPANS)[None, None, None, :]
    offsets = gl.set_auto_layout(rows[:, None, None, None] * groups + group, layout)
    if columns % (4 * RUNS * RUN) == 0:
        scales = gl.load(field + offsets)
    else:
        inside = gl.set_auto_layout((group < groups) & (rows[:, None, None, None] >= 0), layout)
        scales = gl.load(field + offsets, mask=inside, other=0)
    if SPANS == 1:
        of_spans = (scales.reshape(scales.shape[:-1]),)  # type: Any
    else:
        of_spans = scales.split()
    return of_spans


@gluon.jit
def _load_super(field, rows, first, blocks: gl.constexpr, SUPER: gl.constexpr, L: gl.constexpr):
    """`[rows, 1, 1]` of the super-block that all columns from `first` on lie in."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))
    offsets = gl.set_auto_layout(rows * blocks + gl.minimum(first // SUPER, blocks - 1), layout)
    return gl.load(field + offsets)[:, None][:, :, None]


@gluon.jit
def _load_step(
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    first_row,
    out_features,
    step,
    columns: gl.constexpr,
    LOW_BITS: gl.constexpr,
    HIGH_BITS: gl.constexpr,
    GROUP: gl.constexpr,
    SUPER: gl.constexpr,
    OFFSET: gl.constexpr,
    PAIRS: gl.constexpr,
    STRIPS: gl.constexpr,
    RUNS: gl.constexpr,
):
    """What a step reads of the weight: low words, high words, scales and offsets (of each span of a run), and those of
    the super-block."""
    IN_WORD: gl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: gl.constexpr = 4 * IN_WORD
    L: gl.constexpr = weight_layout(STRIPS, RUNS, 4)
    words: gl.constexpr = columns // IN_WORD
    rows = _rows(first_row, out_features, PAIRS, STRIPS)
    thread = gl.arange(0, 4)[None, :, None, None]
    run = (step * 4 + thread) * RUNS + gl.arange(0, RUNS)[None, None, :, None]
    if words % (16 * RUNS) != 0:
        run = gl.minimum(run, words // 4 - 1)
    word = run * 4 + gl.arange(0, 4)[None, None, None, :]
    at = gl.set_auto_layout(rows[:, None, None, None] * words + word, L)
    low_words = gl.load(low + at, eviction_policy="evict_first").to(gl.int32)
    high_words = low_words
    if HIGH_BITS > 0:
        high_words = gl.load(high + at, eviction_policy="evict_first").to(gl.int32)
    scale = _load_scales(scales, _rows(first_row, out_features, PAIRS, STRIPS), step, columns, GROUP, RUN, STRIPS, RUNS)
    offset = scale
    if OFFSET == "zeros" or OFFSET == "offsets":
        offset = _load_scales(
            offsets, _rows(first_row, out_features, PAIRS, STRIPS), step, columns, GROUP, RUN, STRIPS, RUNS
        )
    super_scale = low_words
    super_offset = low_words
    if SUPER > 0:
        first = step * (4 * RUNS * RUN)
        super_scale = _load_super(
            super_scales, _rows(first_row, out_features, PAIRS, STRIPS), first, columns // SUPER, SUPER, L
        )
        if OFFSET == "paired" or OFFSET == "offsets":
            super_offset = _load_super(
                super_offsets, _rows(first_row, out_features, PAIRS, STRIPS), first, columns // SUPER, SUPER, L
            )
    return low_words, high_words, scale, offset, super_scale, super_offset


@gluon.jit
def _affine(scale, offset, super_scale, super_offset, SUPER: gl.constexpr, OFFSET: gl.constexpr, ZERO: gl.constexpr):
    """(factor, shift) `[rows, 4, runs]`: a weight is factor * number - shift."""
    if OFFSET == "paired":
        pair = scale.to(gl.int32)
        factor = (pair & 15).to(gl.float32) * super_scale.to(gl.float32)
        shift = (pair >> 4 & 15).to(gl.float32) * super_offset.to(gl.float32) + factor * ZERO
    else:
        factor = scale.to(gl.float32)
        if SUPER > 0:
            factor *= super_scale.to(gl.float32)
        shift = factor * ZERO
        if OFFSET == "zeros":
            shift += factor * offset.to(gl.float32)
        elif OFFSET == "offsets":
            below = offset.to(gl.float32)
            if SUPER > 0:
                below *= super_offset.to(gl.float32)
            shift += below
    return factor, shift


@gluon.jit
def _of_runs(values):
    """`[rows, 4, runs, 4]` as one `[rows, 4, 4]` for each of a thread's runs."""
    if values.shape[2] == 1:
        runs = (values.reshape(values.shape[0], 4, 4),)  # type: Any
    else:
        runs = values.permute(0, 1, 3, 2).split()
    return runs


@gluon.jit
def _for_words(values):
    """`[rows, 4, runs]`, for the words of each of a thread's runs `[rows, 4, 4]`."""
    return _of_runs(values[:, :, :, None].broadcast_to(values.shape + (4,)))


@gluon.jit
def _numbers(
    low,
    high,
    table,
    one,
    index: gl.constexpr,
    LOW_BITS: gl.constexpr,
    HIGH_BITS: gl.constexpr,
    KIND: gl.constexpr,
):
    """What `_affine` scales: field `index` of words, in a float's mantissa if it is an integer."""
    if KIND == "integer":
        return packed_mantissa(low, high, one, index, LOW_BITS, HIGH_BITS)
    return packed_code(low, high, table, index, LOW_BITS, HIGH_BITS, KIND)


@gluon.jit
def _operand(even, odd, mma: gl.constexpr, KW: gl.constexpr):
    """Two fields of a run's words `[rows, 4 threads, 4 words]` as the A operand `[rows, 32]`."""
    values = gl.join(even, odd)
    if KW == 1:
        values = values.permute(0, 2, 3, 1)
    else:
        values = values.permute(0, 2, 1, 3)
    values = values.reshape(even.shape[0], 32)
    return gl.convert_layout(values, gl.DotOperandLayout(0, mma, KW), assert_trivial=True)


@gluon.jit
def _activations(smem, mma: gl.constexpr, KW: gl.constexpr, COLUMNS: gl.constexpr):
    """A part of the activations as the B operand `[32, COLUMNS]`."""
    values = smem.load(part_layout(COLUMNS)).reshape(COLUMNS, 4, 2, 4)
    if KW == 1:
        values = values.to(gl.float32).permute(3, 2, 1, 0)
    else:
        values = values.permute(3, 1, 2, 0)
    values = values.reshape(32, COLUMNS)
    return gl.convert_layout(values, gl.DotOperandLayout(1, mma, KW), assert_trivial=True)


@gluon.jit
def _add_step(
    total,
    loaded,
    smem,
    table,
    one,
    dtype: gl.constexpr,
    LOW_BITS: gl.constexpr,
    HIGH_BITS: gl.constexpr,
    SUPER: gl.constexpr,
    OFFSET: gl.constexpr,
    ZERO: gl.constexpr,
    KIND: gl.constexpr,
):
    """`total` with the products of a step, whose activations lie at `smem` `[parts x COLUMNS, 32]`."""
    IN_WORD: gl.constexpr = 4 if LOW_BITS == 8 else 8
    mma: gl.constexpr = total.type.layout
    COLUMNS: gl.constexpr = total.shape[1]
    KW: gl.constexpr = 2 if dtype == gl.float16 else 1
    TYPE: gl.constexpr = gl.float16 if dtype == gl.float16 else gl.float32
    low_words, high_words, scales, offsets, super_scale, super_offset = loaded
    lows = _of_runs(low_words)
    highs = _of_runs(high_words)
    L: gl.constexpr = low_words.type.layout
    RUNS: gl.constexpr = low_words.shape[2]
    SPANS: gl.constexpr = len(scales)
    HALVES: gl.constexpr = IN_WORD // 2 // SPANS  # of a span
    factors = ()  # type: Any
    shifts = ()  # type: Any
    for span in gl.static_range(SPANS):
        scale = gl.convert_layout(scales[span], gl.SliceLayout(3, L), assert_trivial=True)
        offset = gl.convert_layout(offsets[span], gl.SliceLayout(3, L), assert_trivial=True)
        factor, shift = _affine(scale, offset, super_scale, super_offset, SUPER, OFFSET, ZERO)
        # Of codes in a mantissa, by their place: those of even and of odd fields.
        for parity in gl.static_range(2):
            raised = factor
            lowered = shift
            if KIND == "integer":
                raised = factor * (1 << (23 - mantissa_place(parity, LOW_BITS, HIGH_BITS)))
                lowered = shift + raised
            factors = factors + (_for_words(raised),)
            shifts = shifts + (_for_words(lowered),)
    for run in gl.static_range(RUNS):
        for half in gl.static_range(IN_WORD // 2):
            fields = ()  # type: Any
            for parity in gl.static_range(2):
                numbers = _numbers(lows[run], highs[run], table, one, 2 * half + parity, LOW_BITS, HIGH_BITS, KIND)
                factor = factors[half // HALVES * 2 + parity][run]
                shift = shifts[half // HALVES * 2 + parity][run]
                fields = fields + ((numbers * factor - shift).to(TYPE),)
            weight = _operand(fields[0], fields[1], mma, KW)
            part = smem.slice((run * (IN_WORD // 2) + half) * COLUMNS, COLUMNS)
            total = mma_v2(weight, _activations(part, mma, KW, COLUMNS), total, input_precision="tf32")
    return total


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def _packed_mma_kernel(
    x,  # [M, in]
    x_stride,
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    bias,
    residual,
    out,  # [M, width]
    out_stride,
    workspace,  # [tiles, SPLITS, columns, rows] float32
    counters,  # [tiles] int32, zero between launches
    M,
    out_features,
    one,  # the bits of 1.0
    columns: gl.constexpr,
    LOW_BITS: gl.constexpr,
    HIGH_BITS: gl.constexpr,
    GROUP: gl.constexpr,
    SUPER: gl.constexpr,
    OFFSET: gl.constexpr,
    ZERO: gl.constexpr,
    KIND: gl.constexpr,
    STRIPS: gl.constexpr,
    RUNS: gl.constexpr,
    COLUMNS: gl.constexpr,  # M padded
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    DEPTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    RUN: gl.constexpr = 16 if LOW_BITS == 8 else 32
    R: gl.constexpr = 64 * STRIPS
    PAIRS: gl.constexpr = ACTIVATION is not None
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    dtype: gl.constexpr = x.dtype.element_ty
    steps: gl.constexpr = (columns + 4 * RUNS * RUN - 1) // (4 * RUNS * RUN)
    share: gl.constexpr = (steps + SPLITS - 1) // SPLITS
    first_row = gl.program_id(0) * R
    start = gl.program_id(1) * share
    end = gl.minimum(start + share, steps)
    queue = ()  # type: Any
    for ahead in gl.static_range(DEPTH):
        queue = queue + (
            _load_step(
                low, high, scales, super_scales, offsets, super_offsets, first_row, out_features,
                gl.minimum(start + ahead, steps - 1), columns, LOW_BITS, HIGH_BITS, GROUP, SUPER, OFFSET, PAIRS,
                STRIPS, RUNS,
            ),
        )  # fmt: skip
    parts: gl.constexpr = RUNS * RUN // 8
    smem = gl.allocate_shared_memory(dtype, [STAGES, parts * COLUMNS, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    wait_for_producer(PDL)
    for ahead in gl.static_range(STAGES - 1):
        if start + ahead < end:
            _request(x, x_stride, M, smem.index(ahead), start + ahead, columns, RUN, RUNS, COLUMNS)
        async_copy.commit_group()
    total = gl.zeros([R, COLUMNS], gl.float32, mma)
    for step in range(start, end):
        loaded = queue[0]
        queue = queue[1:] + (
            _load_step(
                low, high, scales, super_scales, offsets, super_offsets, first_row, out_features,
                gl.minimum(step + DEPTH, steps - 1), columns, LOW_BITS, HIGH_BITS, GROUP, SUPER, OFFSET, PAIRS,
                STRIPS, RUNS,
            ),
        )  # fmt: skip
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        turn = step - start
        if step + STAGES - 1 < end:
            _request(
                x, x_stride, M, smem.index((turn + STAGES - 1) % STAGES), step + STAGES - 1, columns, RUN, RUNS, COLUMNS
            )
        async_copy.commit_group()
        total = _add_step(
            total, loaded, smem.index(turn % STAGES), table, one, dtype, LOW_BITS, HIGH_BITS, SUPER, OFFSET, ZERO, KIND
        )
    strip = gl.program_id(0) * (4 * STRIPS)
    if SPLITS == 1:
        finish(
            total, bias, residual, out, out_stride, M, out_features, strip, 0, 4 * STRIPS, HAS_BIAS, HAS_RESIDUAL,
            ACTIVATION,
        )  # fmt: skip
    else:
        last, total = sum_of_splits(total, workspace, counters, gl.program_id(0), gl.program_id(1), SPLITS)
        if last:
            finish(
                total, bias, residual, out, out_stride, M, out_features, strip, 0, 4 * STRIPS, HAS_BIAS, HAS_RESIDUAL,
                ACTIVATION,
            )  # fmt: skip


def packed_mma(
    x: torch.Tensor,
    weight: Planes,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    cut: PackedMmaCut | None = None,
) -> None:
    """Writes act(x W^T + b) + residual for 3 to 64 rows of a 16-bit type; arguments as `packed_skinny`'s."""
    form = weight.form
    cut = cut or packed_mma_cut(weight.rows, form.columns, x.shape[0], form.run, form.group_size)
    workspace, counters = split_workspace(x.device) if cut.splits > 1 else (x, x)
    pdl = pdl_supported(x.device)
    _packed_mma_kernel[(ceil_div(weight.rows, 16 * WARPS * cut.strips), cut.splits)](
        x,
        x.stride(0),
        *plane_arguments(weight),
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        workspace,
        counters,
        x.shape[0],
        weight.rows,
        BITS_OF_ONE,
        **form_arguments(weight),
        STRIPS=cut.strips,
        RUNS=cut.runs,
        COLUMNS=max(8, next_power_of_2(x.shape[0])),
        SPLITS=cut.splits,
        STAGES=cut.stages,
        DEPTH=cut.depth,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=WARPS,
        **launch_options(pdl),
    )
