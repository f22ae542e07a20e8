"""A row's program as passes over its survivors: values in memory, -inf where masked, in the order of their tokens.

The same code runs over a short list of candidates and, where they are too many, over the whole vocabulary. Definitions
are those of sampling/stages; each operation is one of `NativeOp`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.sampling_read import edit, floats_at, log, op_at, uniforms_at, value_of
from aphrodite.kernels.triton.sampling_search import (
    BY_MASS,
    BY_TYPICALITY,
    BY_VALUE,
    find_cut,
    find_cut_wide,
    highest_key,
    lowest_key,
    survives,
)

_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST_TEMPERATURE = tl.constexpr(1e-5)
_FARTHEST = tl.constexpr(-1e6)  # stages/quadratic.py
_USE_XTC = tl.constexpr(1)  # sampling/random.py
_FAR = tl.constexpr(-32.0)  # from the top: where a search for a cut begins if nothing better is known
LIST_CAPACITY = tl.constexpr(1024)  # candidates of a list


@triton.jit
def token_at(tokens, at, mask, WIDE: tl.constexpr):
    """The tokens of entries `at`."""
    return at if WIDE else tl.load(tokens + at, mask, other=0)


@triton.jit
def sums_of(values, count, top, BLOCK: tl.constexpr):
    """Of the survivors, float64: sum of exp(d), of exp(d) * d, their number; d = value - top."""
    mass, weighted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    left = tl.zeros([BLOCK], tl.int32)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        there = x > -float("inf")
        below = tl.where(there, x - top, 0.0)
        weight = tl.where(there, tl.exp(below), 0.0)
        mass += weight
        weighted += weight * below
        left += there.to(tl.int32)
        begin += BLOCK
    return (
        tl.sum(mass.to(tl.float64), axis=0),
        tl.sum(weighted.to(tl.float64), axis=0),
        tl.sum(left, axis=0).to(tl.float64),
    )


@triton.jit
def deviation_of(values, count, top, left, BLOCK: tl.constexpr):
    """Population standard deviation of the survivors, float64."""
    total = tl.zeros([BLOCK], tl.float32)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        total += tl.where(x > -float("inf"), x - top, 0.0)
        begin += BLOCK
    mean = (tl.sum(total.to(tl.float64), axis=0) / left).to(tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        apart = tl.where(x > -float("inf"), (x - top) - mean, 0.0)
        squares += apart * apart
        begin += BLOCK
    return tl.sqrt(tl.sum(squares.to(tl.float64), axis=0) / left)


@triton.jit
def save_sums(floats, mass, weighted, left, deviation):
    """Leave a row's sums for the kernel that runs its program."""
    sums = (floats + r.SUMS).to(tl.pointer_type(tl.float64))
    tl.store(sums, mass)
    tl.store(sums + 1, weighted)
    tl.store(sums + 2, left)
    tl.store(sums + 3, deviation)


@triton.jit
def saved_sums(floats):
    """What `save_sums` left."""
    sums = (floats + r.SUMS).to(tl.pointer_type(tl.float64))
    return tl.load(sums), tl.load(sums + 1), tl.load(sums + 2), tl.load(sums + 3)


@triton.jit
def dynamic_temperature(op, mass, weighted, left):
    """What to divide by, float32. values: lowest, highest - lowest, exponent."""
    entropy = log(mass) - (weighted / mass).to(tl.float32)
    share = tl.minimum(tl.maximum(entropy / log(tl.maximum(left, 2.0)), 0.0), 1.0)
    bent = tl.where(share > 0, tl.exp(value_of(op, 2) * log(tl.maximum(share, 1e-37))), 0.0)
    return tl.maximum(value_of(op, 0) + value_of(op, 1) * bent, _LOWEST_TEMPERATURE)


@triton.jit
def is_threshold(code):
    """Whether an operation keeps what reaches `threshold`."""
    by_sums = (code == r.TOP_A) | (code == r.EPSILON_CUTOFF) | (code == r.ETA_CUTOFF) | (code == r.MIROSTAT)
    return by_sums | (code == r.MIN_P) | (code == r.TOP_NSIGMA)


@triton.jit
def needs_sums(code):
    """Whether an operation reads mass, weighted sum or count."""
    edits = (code == r.TEMPERATURE) | (code == r.PENALTIES) | (code == r.DRY) | (code == r.NO_REPEAT_NGRAM)
    return ~(edits | (code == r.MIN_P) | (code == r.TOP_K) | (code == r.QUADRATIC))


@triton.jit
def threshold(op, code, top, mass, weighted, deviation, number):
    """The lowest logit that stays, float32. `number`: mirostat's mu."""
    first = value_of(op, 0)
    normalizer = log(mass)  # of logits relative to the top
    lowest = top + first
    if code != r.MIN_P:
        level = normalizer - number * _LN2
        if code == r.TOP_NSIGMA:
            level = -(first.to(tl.float64) * deviation).to(tl.float32)
        elif code == r.TOP_A:
            level = first - normalizer
        elif code == r.EPSILON_CUTOFF:
            level = first + normalizer
        elif code == r.ETA_CUTOFF:
            level = tl.minimum(first, first / 2 - normalizer + (weighted / mass).to(tl.float32)) + normalizer
        lowest = top + tl.minimum(level, 0.0)
    return lowest


@triton.jit
def number_at(op, record, position, first):
    """The number that mirostat or adaptive-p keeps for this position; `first` where the answer begins."""
    number = first
    if position != tl.load(record + r.NUM_PROMPT):
        number = tl.load(floats_at(op + r.POINTER) + position)
    return number


@triton.jit
def _change(
    op,
    code,
    values,
    tokens,
    count,
    top,
    number,
    cut,
    last,
    offset,
    kind,
    counts,
    marks,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass in which an operation changes or masks the survivors; returns the largest of what is left.

    All operations share it: compilers take longer the more loops a kernel has, and not in proportion.

    Args:
        number: the lowest logit that stays, a divisor, or the logarithm of XTC's threshold.
        cut, last, offset, kind: of `find_cut`; of XTC `last` is the entry that it spares.
    """
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    tl.debug_barrier()
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        mask = at < count
        x = tl.load(values + at, mask, other=-float("inf"))
        if is_threshold(code):
            x = tl.where(x < number, -float("inf"), x)
        elif is_cut(code):
            x = tl.where(survives(x, at, top, offset, cut, last, kind), x, -float("inf"))
        elif code == r.DYNAMIC_TEMPERATURE:
            x = tl.div_rn(x, number + tl.zeros_like(x))
        elif code == r.QUADRATIC:  # values: k, s; negative ones may raise the largest
            k, s = value_of(op, 0), value_of(op, 1)
            distance = tl.maximum(x - top, _FARTHEST)
            x = tl.where(x == -float("inf"), x, top + distance * distance * (s * distance - k))
        elif code == r.XTC:
            removed = (x - top >= number) & (at != last)
            mark = tl.load(marks + token_at(tokens, at, mask, WIDE), mask & removed, other=0)
            x = tl.where(removed & ((mark & r.PROTECTED) == 0), -float("inf"), x)
        else:
            x = edit(op, x, token_at(tokens, at, mask, WIDE), mask, counts, marks)
        tl.store(values + at, x, mask)
        tops = tl.maximum(tops, x)
        begin += BLOCK
    tl.debug_barrier()
    return tl.max(tops, axis=0)


@triton.jit
def _leaves_some(values, tokens, count, marks, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a survivor would not repeat an n-gram."""
    left = tl.zeros([BLOCK], tl.int32)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        mask = at < count
        there = tl.load(values + at, mask, other=-float("inf")) > -float("inf")
        free = tl.load(marks + token_at(tokens, at, mask, WIDE), mask, other=-1) >= 0
        left = tl.maximum(left, (there & free).to(tl.int32))
        begin += BLOCK
    return tl.max(left, axis=0) > 0


@triton.jit
def _least_likely(values, count, top, level, BLOCK: tl.constexpr):
    """The last of the entries with the smallest value that is at least `level` above the top, -1 if there is none."""
    least, spared = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], -1, tl.int32)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        chosen = (x > -float("inf")) & (x - top >= level) & (x <= least)
        least, spared = tl.where(chosen, x, least), tl.where(chosen, at, spared)
        begin += BLOCK
    return tl.max(tl.where(least == tl.min(least, axis=0), spared, -1), axis=0)


@triton.jit
def is_cut(code):
    """Whether an operation keeps the first entries in some order."""
    return (code == r.TOP_K) | (code == r.TOP_P) | (code == r.TYPICAL_P)


@triton.jit
def _cut(op, code, values, count, top, mass, weighted, left, spare, indices, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Where top-k, top-p and typical-p cut: `cut`, `last`, `offset` and `kind` of sampling_search.py."""
    kind, offset = tl.full([], BY_MASS, tl.int32), top
    share = value_of(op, 0)
    target = share.to(tl.float64)
    lowest = tl.full([], _FAR, tl.float32)
    if code == r.TOP_K:
        kind = tl.full([], BY_VALUE, tl.int32)
    else:
        target = target * mass
    if code == r.TOP_P:  # less than `left` tokens at the cut's weight at most make up what is left out
        lowest = tl.maximum(log(tl.maximum((mass - target) / left, 1e-30)) - 0.01, _FAR)
    if code == r.TYPICAL_P:
        kind = tl.full([], BY_TYPICALITY, tl.int32)
        offset = -(weighted / mass).to(tl.float32)  # -ln p - H = -(value - top) + weighted / mass
    if WIDE:
        cut, last = find_cut_wide(
            values, count, top, offset, target, kind, lowest, spare, indices, BLOCK, LIST_CAPACITY
        )
    else:
        cut, last = find_cut(values, count, top, offset, target, kind, lowest_key(), highest_key(top), BLOCK)
    return cut, last, offset, kind


@triton.jit
def run_program(
    record,
    position,
    first,
    values,
    tokens,
    count,
    top,
    first_sums,
    counts,
    marks,
    floats,
    spare,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run the row's operations from `first` on and note in `floats` how to draw; returns the largest of what is left.

    Args:
        values: [count] float32, changed. tokens: [count] int32, the entries' tokens.
            If WIDE entries are tokens, and `tokens` is, like `spare` (float32), memory for LIST_CAPACITY entries.
        top: the largest of `values`, finite.
        first_sums: mass, weighted sum, survivors and deviation that operation `first` has to go by where `values` are
            not the whole distribution (not WIDE).
        floats: the row's state.
    """
    first_mass, first_weighted, first_left, first_deviation = first_sums
    num_ops = tl.load(record + r.OPS)
    index = first
    while index < num_ops:
        op = op_at(record, index)
        code = tl.load(op + r.CODE)
        if tl.abs(top) < float("inf"):
            mass, weighted, left = first_mass, first_weighted, first_left
            if needs_sums(code) & (WIDE | (index > first)):
                mass, weighted, left = sums_of(values, count, top, BLOCK)
            changes, number = code != r.ADAPTIVE_P, tl.full([], 0.0, tl.float32)
            cut, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
            offset, kind = top, tl.full([], BY_VALUE, tl.int32)
            if is_threshold(code):
                deviation = first_deviation
                if (code == r.TOP_NSIGMA) & (WIDE | (index > first)):
                    deviation = deviation_of(values, count, top, left, BLOCK)
                if code == r.MIROSTAT:
                    number = number_at(op, record, position, 2 * value_of(op, 1))
                number = threshold(op, code, top, mass, weighted, deviation, number)
            elif is_cut(code):
                cut, last, offset, kind = _cut(
                    op, code, values, count, top, mass, weighted, left, spare, tokens, WIDE, BLOCK
                )
            elif code == r.DYNAMIC_TEMPERATURE:
                number = dynamic_temperature(op, mass, weighted, left)
            elif code == r.XTC:  # values: probability, logarithm of the threshold
                coin = tl.max(uniforms_at(record, position, _USE_XTC, tl.zeros([1], tl.int32)), axis=0)
                changes = coin < value_of(op, 0)
                if changes:
                    number = value_of(op, 1) + log(mass)
                    last = _least_likely(values, count, top, number, BLOCK)
            elif code == r.NO_REPEAT_NGRAM:  # undone where it would leave nothing
                changes = _leaves_some(values, tokens, count, marks, WIDE, BLOCK)
            elif code == r.ADAPTIVE_P:
                average = number_at(op, record, position, value_of(op, 0))
                tl.store(floats + r.SHAPED, 1.0)
                tl.store(floats + r.TARGET, tl.minimum(tl.maximum(2 * value_of(op, 0) - average, 0.0), 1.0))
            if changes:
                top = _change(
                    op, code, values, tokens, count, top, number, cut, last, offset, kind, counts, marks, WIDE, BLOCK
                )
            if code == r.MIROSTAT:
                mass, weighted, left = sums_of(values, count, top, BLOCK)
            if (code == r.MIROSTAT) | (code == r.ADAPTIVE_P):
                tl.store(floats + r.NORMALIZER, top + log(mass))
        index += 1
    return top
