"""What Gluon kernels over points of a grid share: tables in shared memory, points as the matrix units take them.

Eight columns are one or two entries of a table whose coordinates are 16-bit floats: what a thread fetches is four
registers of the A operand as they lie, and signs are exclusive or. The lookups of a warp go to as many places as it
has lanes, which the first-level cache serves line by line, some twenty a warp; shared memory serves them bank by bank,
and with a copy of the table for each lane of those that are served at once no two lanes want the same bank.

A thread (g, t) of a warp has rows g and g + 8 of the operand and the runs of 32 columns t, t + 4, ... of a step.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aphrodite.quantization import codebooks
from aphrodite.quantization.grid_fields import GridKind


class Card(NamedTuple):
    """What cuts depend on.

    Attributes:
        multiprocessors: of the card.
        shared: bytes of shared memory that a block can have; a multiprocessor has 1 KiB more, of which each block
            takes one beside its own.
    """

    multiprocessors: int
    shared: int


@functools.cache
def card_of(device: torch.device) -> Card:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know the second one
    return Card(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@gluon.constexpr_function
def entries(KIND):
    """Of a kind's table, rounded up to a power of two."""
    if KIND in ("iq2_xxs", "iq3_xxs"):
        return 256
    if KIND in ("iq2_xs", "iq3_s"):
        return 512
    return 1024 if KIND == "iq2_s" else 8192 if KIND == "tq1_0" else 2048


@gluon.constexpr_function
def entry_words(KIND):
    """int32 of an entry, two coordinates each."""
    return 2 if KIND in ("iq3_xxs", "iq3_s") else 4


@gluon.constexpr_function
def table_ints(KIND, copies):
    return entries(KIND) * entry_words(KIND) * copies


def table_copies(kind: str, most: int) -> int:
    """How often a table of `kind` has each entry, side by side: once for each lane that shared memory serves at once,
    or what fits into `most` bytes; 0 where it does not fit."""
    copies: int = 32 // entry_words(kind)
    while copies and 4 * table_ints(kind, copies) > most:
        copies //= 2
    return copies


@gluon.constexpr_function
def _entry_step(KIND, copies):
    """The binary logarithm of the bytes from one entry to the next."""
    return (entry_words(KIND) * 4 * copies).bit_length() - 1


@gluon.constexpr_function
def unit(KIND):
    """What a coordinate of 1 is, beside d and the odd number 2 s + 1."""
    return 0.125 if KIND in ("iq2_xxs", "iq2_xs", "iq2_s") else 0.25 if KIND == "iq3_xxs" else 1.0


@functools.cache
def operand_table(kind: GridKind, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The points' coordinates in a 16-bit dtype, in the order of columns, two to an int32: `[entries, values / 2]`.

    One for all matrices of `device`, made before steps are captured.
    """
    points = _POINTS[kind]()
    padded = np.zeros((entries(kind), 2 * entry_words(kind)), np.float32)
    padded[: len(points)] = points
    return torch.from_numpy(padded).to(dtype).to(device).view(torch.int32)


def _ternary_points() -> np.ndarray:
    return np.arange(3**8)[:, None] // 3 ** np.arange(8) % 3 - 1


_POINTS: dict[GridKind, Callable[[], np.ndarray]] = {
    "iq2_xxs": codebooks.iq2_xxs_grid,
    "iq2_xs": codebooks.iq2_xs_grid,
    "iq2_s": codebooks.iq2_s_grid,
    "iq3_xxs": codebooks.iq3_xxs_grid,
    "iq3_s": codebooks.iq3_s_grid,
    "iq1_s": codebooks.iq1_grid,
    "iq1_m": codebooks.iq1_grid,
    "tq1_0": _ternary_points,
}


@gluon.constexpr_function
def group_words(KIND):
    """Words of a run that share a scale."""
    return 2 if KIND in ("iq2_xs", "iq2_s", "iq1_m") else 4


@gluon.constexpr_function
def fill_layout(copied, words, warps):
    """Threads that fill the table `[entries, copies, words]`, a vector each."""
    return gl.BlockedLayout([1, 1, words], [32 // copied, copied, 1], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def fill_table(table, smem, KIND: gl.constexpr, COPIES: gl.constexpr):
    """Copies of `table`'s entries (int32) at the beginning of `smem`."""
    WORDS: gl.constexpr = entry_words(KIND)
    PIECE: gl.constexpr = gl.num_warps() * (32 // COPIES) * 2  # entries
    PIECES: gl.constexpr = entries(KIND) // PIECE
    layout: gl.constexpr = fill_layout(COPIES, WORDS, gl.num_warps())
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    target = smem._reinterpret(gl.int32, [PIECES, PIECE, COPIES, WORDS], flat)
    entry = gl.arange(0, PIECE)[:, None, None] + gl.arange(0, COPIES)[None, :, None] * 0
    offsets = gl.set_auto_layout(entry * WORDS + gl.arange(0, WORDS)[None, None, :], layout)
    for piece in range(PIECES):
        target.index(piece).store(gl.load(table + piece * (PIECE * WORDS) + offsets))


@gluon.constexpr_function
def _lane_assembly(lanes, size):
    return "{\n.reg .b32 lane;\nmov.u32 lane, %laneid;\n" + (
        f"and.b32 lane, lane, {lanes - 1};\nmul.lo.u32 $0, lane, {size};\n" + "}"
    )


@gluon.jit
def lane_copy(KIND: gl.constexpr, COPIES: gl.constexpr):
    """Where a lane's copy of an entry lies, bytes: a number that differs from lane to lane.

    To be asked for behind the barrier that the table was written before: loads of it depend on this."""
    ASSEMBLY: gl.constexpr = _lane_assembly(COPIES, entry_words(KIND) * 4)
    return gl.inline_asm_elementwise(ASSEMBLY, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def nothing():
    """Zero, which the compiler does not know: places in shared memory that it is added to are not read before."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def eight_of(ASSEMBLY: gl.constexpr, CONSTRAINTS: gl.constexpr, inputs, dtype: gl.constexpr):
    """`inputs` `[..., 8]` to eight 16-bit floats at a time."""
    if dtype == gl.bfloat16:
        values = gl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, inputs, gl.bfloat16, True, 8)
    else:
        values = gl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, inputs, gl.float16, True, 8)
    return values


@gluon.constexpr_function
def _word_assembly(kind, dtype, scaled):
    """$0 to $3: four registers of coordinates; $4 an entry's place (of IQ3 also $12, of the second one), then signs or
    a shift and, where `scaled`, a pair of factors; each eight times, as a broadcast has them."""
    last = 20 if kind in ("iq3_xxs", "iq3_s") else 12
    lines = [".reg .b32 t, at;", "mov.u32 t, global_smem;", "add.u32 at, t, $4;"]
    if kind in ("iq3_xxs", "iq3_s"):
        lines += ["ld.shared.v2.b32 {$0,$1}, [at];", "add.u32 at, t, $12;", "ld.shared.v2.b32 {$2,$3}, [at];"]
    else:
        lines.append("ld.shared.v4.b32 {$0,$1,$2,$3}, [at];")
    if kind.startswith(("iq2", "iq3")):
        # Bits of a word's eight signs that belong to the halves of the four registers: in order, or taking turns.
        places = ((0, 1), (2, 3), (4, 5), (6, 7)) if kind == "iq3_s" else ((0, 2), (4, 6), (1, 3), (5, 7))
        for register in range(4):
            factor = (1 << (15 - places[register][0])) + (1 << (31 - places[register][1]))
            lines.append(f"mul.lo.u32 t, ${last}, {factor};")
            lines.append(f"lop3.b32 ${register}, t, 0x80008000, ${register}, 0x6A;")
    elif kind.startswith("iq1"):
        # Ampere adds bfloat16 only to a product: with one.
        add, one = ("fma.rn.bf16x2", " t,") if dtype == gl.bfloat16 else ("add.rn.f16x2", "")
        lines.append("mov.b32 t, 0x3F803F80;")
        lines += [f"{add} ${register}, ${register},{one} ${last};" for register in range(4)]
    if scaled and kind != "tq1_0":
        lines += [f"mul.rn.f16x2 ${register}, ${register}, ${last + 8};" for register in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _word_constraints(kind, scaled):
    inputs = 1 if kind == "tq1_0" else 2 + (1 if kind in ("iq3_xxs", "iq3_s") else 0) + (1 if scaled else 0)
    return "=r,=r,=r,=r" + ",r" * (8 * inputs)


@gluon.constexpr_function
def runs_layout(k_warps, n_warps, strips, inner):
    """Layout of what runs have `[k_warps, rows, 4 threads, inner]`; rows g and g + 8 of each strip are a thread's."""

    def basis(dimension, value):
        return [value if d == dimension else 0 for d in range(4)]

    registers = [basis(3, 1 << i) for i in range(inner.bit_length() - 1)]
    registers += [basis(1, 8)] + [basis(1, 16 * n_warps << i) for i in range(strips.bit_length() - 1)]
    lanes = [basis(2, 1), basis(2, 2), basis(1, 1), basis(1, 2), basis(1, 4)]
    warps = [basis(1, 16 << i) for i in range(n_warps.bit_length() - 1)]
    warps += [basis(0, 1 << i) for i in range(k_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [k_warps, 16 * n_warps * strips, 4, inner])


@gluon.jit
def _tile_rows(first_row, out_features, ROWS: gl.constexpr, PAIRS: gl.constexpr):
    """The rows of a tile, anew for each layout: numbers whose layout is left open take one."""
    row = gl.arange(0, ROWS)
    if PAIRS:
        row = row // 16 * 16 + row % 8 * 2 + row // 8 % 2  # (gate, up) lie in a thread
    return gl.minimum(first_row + row, out_features - 1)


@gluon.jit
def _of_each_run(
    plane, rows, step, columns: gl.constexpr, SIZE: gl.constexpr, K_WARPS: gl.constexpr, RUNS: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """Of a plane with a number for SIZE columns that of each run; behind the last one of the last again."""
    q = step * K_WARPS + gl.arange(0, K_WARPS)[:, None, None, None]
    run = (q * 4 + gl.arange(0, 4)[None, None, :, None]) * RUNS + gl.arange(0, RUNS)[None, None, None, :]
    if columns % (K_WARPS * 4 * RUNS * 32) != 0:
        run = gl.minimum(run, columns // 32 - 1)
    at = rows[None, :, None, None] * (columns // SIZE) + run // (SIZE // 32)
    return gl.load(plane + gl.set_auto_layout(at, L), eviction_policy="evict_first")


@gluon.jit
def _top_bits(scales, rows, step, columns: gl.constexpr, K_WARPS: gl.constexpr, RUNS: gl.constexpr, L: gl.constexpr):
    """Of TQ1_0, whose super-blocks have 32 bits: those of each run, lowest."""
    q = step * K_WARPS + gl.arange(0, K_WARPS)[:, None, None, None]
    run = (q * 4 + gl.arange(0, 4)[None, None, :, None]) * RUNS + gl.arange(0, RUNS)[None, None, None, :]
    place = gl.set_auto_layout(run % 8 * 4 + rows[None, :, None, None] * 0, L)
    return _of_each_run(scales, rows, step, columns, 256, K_WARPS, RUNS, L) >> place


@gluon.jit
def load_step(
    low, high, scales, super_scales, first_row, out_features, step, columns: gl.constexpr, KIND: gl.constexpr,
    K_WARPS: gl.constexpr, N_WARPS: gl.constexpr, STRIPS: gl.constexpr, RUNS: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """What a step reads: points' numbers, what lies beside them and scales, `[K_WARPS, rows, 4, RUNS]` each as
    `packed_grid.load_runs` has them, and the super-block's factor `[K_WARPS, rows]` float16."""
    ROWS: gl.constexpr = 16 * N_WARPS * STRIPS
    L: gl.constexpr = runs_layout(K_WARPS, N_WARPS, STRIPS, RUNS)
    rows = _tile_rows(first_row, out_features, ROWS, PAIRS)
    numbers = _of_each_run(low, rows, step, columns, 32, K_WARPS, RUNS, L)
    beside = numbers
    if KIND != "iq2_xxs" and KIND != "iq2_xs":
        rows = _tile_rows(first_row, out_features, ROWS, PAIRS)
        beside = _of_each_run(high, rows, step, columns, 32, K_WARPS, RUNS, L).to(gl.int32)
    scale = beside
    rows = _tile_rows(first_row, out_features, ROWS, PAIRS)
    if KIND == "tq1_0":
        scale = _top_bits(scales, rows, step, columns, K_WARPS, RUNS, L)
    elif KIND == "iq2_xs" or KIND == "iq2_s" or KIND == "iq3_s" or KIND == "iq1_m":
        scale = _of_each_run(scales, rows, step, columns, 32, K_WARPS, RUNS, L).to(gl.int32)
    # A step has at most 256 columns of each warp.
    block = (step * K_WARPS + gl.arange(0, K_WARPS)) // (8 // (4 * RUNS))
    if columns % (K_WARPS * 4 * RUNS * 32) != 0:
        block = gl.minimum(block, columns // 256 - 1)
    rows = _tile_rows(first_row, out_features, ROWS, PAIRS)
    E: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, runs_layout(K_WARPS, N_WARPS, STRIPS, 8)))
    at = gl.set_auto_layout(rows[None, :] * (columns // 256) + block[:, None], E)
    return numbers, beside, scale, gl.load(super_scales + at, eviction_policy="evict_first")


@gluon.jit
def _run_of(values, run: gl.constexpr, layout: gl.constexpr):
    """Of `[K_WARPS, rows, 4, runs]` one run, `[K_WARPS, rows, 4]`."""
    if values.shape[3] == 1:
        result = values.reshape(values.shape[:-1])
    else:
        both = values.split()
        result = both[run]
    return gl.convert_layout(result, layout, assert_trivial=True)


@gluon.jit
def run_of_step(step, run: gl.constexpr):
    """(low and high half of points' numbers, what lies beside them, scales) of a run, int32 `[K_WARPS, rows, 4]`, and
    the super-block's factor, float32 `[K_WARPS, rows, 1]`."""
    factor = step[3].to(gl.float32)[:, :, None]
    layout: gl.constexpr = factor.type.layout
    numbers = _run_of(step[0], run, layout)
    upper = numbers
    if numbers.dtype == gl.int64:
        upper = (numbers >> 32).to(gl.int32)
    beside = upper
    if step[1].dtype == gl.int32:
        beside = _run_of(step[1], run, layout)
    scale = beside
    if step[2].dtype == gl.int32:
        scale = _run_of(step[2], run, layout)
    return numbers.to(gl.int32), upper, beside, scale, factor


@gluon.jit
def _field(word, place: gl.constexpr, mask: gl.constexpr, target: gl.constexpr):
    """Bits `mask` of `word` from bit `place`, moved to bit `target`."""
    if place >= target:
        moved = word >> (place - target)
    else:
        moved = word << (target - place)
    return moved & (mask << target)


@gluon.jit
def odd_scale(run, part: gl.constexpr, KIND: gl.constexpr):
    """2 s + 1 of part `part` of a run, `group_words` words; int32."""
    if KIND == "iq2_xxs":
        twice = _field(run[1], 28, 15, 1)
    elif KIND == "iq3_xxs":
        twice = _field(run[2], 28, 15, 1)
    elif KIND == "iq3_s":
        twice = _field(run[3], 8, 15, 1)
    elif KIND == "iq1_s":
        twice = _field(run[2], 12, 7, 1)
    else:
        twice = _field(run[3], 4 * part, 15, 1)
    return twice | 1


@gluon.jit
def odd_scale_pair(run, part: gl.constexpr, KIND: gl.constexpr):
    """`odd_scale` as two float16 in an int32."""
    # 1024 and the number are bits of a float16, and the difference is exact.
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mad.lo.u32 t, $1, 65537, 0x64006400; sub.rn.f16x2 $0, t, $2; }",
        "=r,r,r",
        [odd_scale(run, part, KIND), 0x64006400],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _parities_to_signs(parities):
    return parities ^ (parities << 1)


@gluon.jit
def word_values(
    run, lane, word: gl.constexpr, scale_pair, KIND: gl.constexpr, COPIES: gl.constexpr, dtype: gl.constexpr
):
    """Coordinates of the eight columns of word `word` of a run, signed and shifted: `[K_WARPS, rows, 4, 8]`.

    Args:
        run: of `run_of_step`.
        lane: of `lane_copy`.
        scale_pair: of `odd_scale_pair`, to have them times that in float16; or None.
    """
    SCALED: gl.constexpr = scale_pair is not None
    low, high, beside, scale, _ = run
    STEP: gl.constexpr = _entry_step(KIND, COPIES)
    HALF: gl.constexpr = word // 2
    signs = low
    second = low
    if KIND == "iq2_xs":
        if HALF == 0:
            code = low
        else:
            code = high
        point = _field(code, word % 2 * 16, 511, STEP)
        # Of two words at once: neighbours differ where a sign is set, and the first parity is a sign itself.
        parities = code.to(gl.uint32, bitcast=True) & 0xFE00FE00
        signs = ((parities ^ (parities >> 1)) >> (word % 2 * 16 + 8) & 255).to(gl.int32, bitcast=True)
    elif KIND == "iq2_xxs":
        point = _field(low, 8 * word, 255, STEP)
        signs = _parities_to_signs(_field(high, 7 * word, 127, 0))
    elif KIND == "iq2_s":
        point = _field(low, 8 * word, 255, STEP) | _field(beside, 2 * word, 3, STEP + 8)
        signs = _field(high, 8 * word, 255, 0)
    elif KIND == "iq3_xxs" or KIND == "iq3_s":
        if HALF == 0:
            code = low
        else:
            code = high
        point = _field(code, word % 2 * 16, 255, STEP)
        second = _field(code, word % 2 * 16 + 8, 255, STEP)
        if KIND == "iq3_xxs":
            signs = _parities_to_signs(_field(beside, 7 * word, 127, 0))
        else:
            point |= _field(scale, 2 * word, 1, STEP + 8)
            second |= _field(scale, 2 * word + 1, 1, STEP + 8)
            signs = _field(beside, 8 * word, 255, 0)
    elif KIND == "iq1_s":
        point = _field(low, 8 * word, 255, STEP) | _field(beside, 3 * word, 7, STEP + 8)
        signs = _eighth(beside, 15, dtype)
    elif KIND == "iq1_m":
        point = _field(low, 8 * word, 255, STEP) | _field(beside, 4 * word, 7, STEP + 8)
        signs = _eighth(beside, 4 * word + 3, dtype)
    else:
        point = _field(low, 8 * word, 255, STEP) | _field(beside, 4 * word, 15, STEP + 8)
        point |= _field(scale, word, 1, STEP + 12)
    shape: gl.constexpr = low.shape + (8,)
    inputs = ((point | lane)[:, :, :, None].broadcast_to(shape),)  # type: Any
    if KIND == "iq3_xxs" or KIND == "iq3_s":
        inputs = inputs + ((second | lane)[:, :, :, None].broadcast_to(shape),)
    if KIND != "tq1_0":
        inputs = inputs + (signs[:, :, :, None].broadcast_to(shape),)
        if SCALED:
            inputs = inputs + (scale_pair[:, :, :, None].broadcast_to(shape),)
    return eight_of(_word_assembly(KIND, dtype, SCALED), _word_constraints(KIND, SCALED), inputs, dtype)


@gluon.jit
def _eighth(word, place: gl.constexpr, dtype: gl.constexpr):
    """Two 16-bit floats of an eighth, negative where bit `place` is set."""
    ONE: gl.constexpr = 0x3E003E00 if dtype == gl.bfloat16 else 0x30003000
    sign = _field(word, place, 1, 15)
    return (sign | (sign << 16)) | ONE


@gluon.jit
def weight_operand(values, mma: gl.constexpr):
    """`[K_WARPS, rows, 4 threads, 8]` as the A operand `[K_WARPS, rows, 32]`: of each thread's eight columns four are
    those of one product of 16, four those of the next."""
    K: gl.constexpr = values.shape[0]
    R: gl.constexpr = values.shape[1]
    ordered = values.reshape(K, R, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(K, R, 32)
    return gl.convert_layout(ordered, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
