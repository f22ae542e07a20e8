"""What the sampling kernels share: reading records, random numbers, and logits as a row's edits leave them."""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r

_LOG_1, _LOG_2, _LOG_3, _LOG_4 = (
    tl.constexpr(value) for value in (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841)
)
_LN2_HIGH, _LN2_LOW = tl.constexpr(6.9313812256e-01), tl.constexpr(9.0580006145e-06)


@triton.jit
def op_at(record, index):
    """The words of an operation."""
    return record + r.HEADER + index * r.OP_WORDS


@triton.jit
def value_of(op, number: tl.constexpr):
    """A float32 of an operation."""
    return tl.load(op + r.VALUES + number).to(tl.float32, bitcast=True)


@triton.jit
def ints_at(words):
    """The pointer to int32 that two words of a record hold."""
    return tl.load(words.to(tl.pointer_type(tl.int64))).to(tl.pointer_type(tl.int32))


@triton.jit
def floats_at(words):
    """The pointer to float32 that two words of a record hold."""
    return tl.load(words.to(tl.pointer_type(tl.int64))).to(tl.pointer_type(tl.float32))


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _words(record, position, use, block):
    low = tl.load(record + r.SEED_LOW).to(tl.uint32, bitcast=True)
    high = tl.load(record + r.SEED_HIGH).to(tl.uint32, bitcast=True)
    index = block.to(tl.uint32)
    zero = index * 0
    return tl.philox_impl(position.to(tl.uint32) + zero, use + zero, index, zero, low + zero, high + zero, 10)


@triton.jit
def uniforms_at(record, position, use: tl.constexpr, ids):
    """The uniforms of any indices `ids` [N] (sampling/random.py)."""
    w0, w1, w2, w3 = _words(record, position, use, ids >> 2)
    low = tl.where((ids & 1) == 0, w0, w1)
    high = tl.where((ids & 1) == 0, w2, w3)
    return _uniform(tl.where((ids & 2) == 0, low, high))


@triton.jit
def uniforms_from(record, position, use: tl.constexpr, first, COUNT: tl.constexpr):
    """[COUNT]: the uniforms of the indices from `first` on, a multiple of 4; four of them a call of the generator."""
    w0, w1, w2, w3 = _words(record, position, use, first // 4 + tl.arange(0, COUNT // 4))
    return tl.reshape(tl.join(tl.join(_uniform(w0), _uniform(w2)), tl.join(_uniform(w1), _uniform(w3))), [COUNT])


@triton.jit
def log(x):
    """Natural logarithm of normal numbers to an ulp, also next to 1, where the hardware's is not. float32.

    ln(1 + f) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)), s = f / (2 + f), with the minimax polynomial R of fdlibm's e_log.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    tail = w * (_LOG_2 + w * _LOG_4) + z * (_LOG_1 + w * _LOG_3)
    half = 0.5 * f * f
    return s * (half + tail) + exponent * _LN2_LOW - half + f + exponent * _LN2_HIGH


@triton.jit
def gumbel(uniform):
    """Standard Gumbel noise."""
    return -tl.log(-log(uniform))


@triton.jit
def edit(op, x, ids, mask, counts, marks):
    """`x` [N] of tokens `ids` after one operation that looks at each token alone.

    Args:
        counts, marks: of the row, [vocab] int32.
    """
    code = tl.load(op + r.CODE)
    if code == r.TEMPERATURE:
        x = tl.div_rn(x, value_of(op, 0) + tl.zeros_like(x))
    elif code == r.PENALTIES:
        seen = tl.load(counts + ids, mask, other=0)
        times = (seen & (r.IN_PROMPT - 1)).to(tl.float32)
        repetition = value_of(op, 0) + tl.zeros_like(x)
        x = tl.where(seen != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        x = x - value_of(op, 1) * times - tl.where(times > 0, value_of(op, 2), 0.0)
    elif code == r.DRY:
        match = (tl.load(marks + ids, mask, other=0) & r.MATCH) - 1
        steps = match - tl.load(op + r.FIRST)  # the penalties start at the allowed length
        x = x - tl.load(floats_at(op + r.POINTER) + steps, mask & (match >= 0), other=0.0)
    elif code == r.NO_REPEAT_NGRAM:
        x = tl.where(tl.load(marks + ids, mask, other=0) < 0, -float("inf"), x)
    return x


@triton.jit
def read_logits(logits, record, counts, marks, ids, mask, skipped):
    """The model's logits of `ids` [N] as the row's constraints and first operations leave them, float32.

    Args:
        logits: the row's, of any floating type. Entries that `mask` leaves out are -inf.
        skipped: code of an operation that is left out, or 0.
    """
    x = tl.load(logits + ids, mask, other=-float("inf")).to(tl.float32)
    return edited(x, record, tl.load(record + r.FLAGS), tl.load(record + r.EDITS), counts, marks, ids, mask, skipped)


@triton.jit
def edited(x, record, flags, edits, counts, marks, ids, mask, skipped):
    """The model's logits `x` [N] of the tokens `ids` after the row's constraints and first operations.

    Args:
        flags, edits: the words of the record.
    """
    if (flags & r.MARKED) != 0:
        mark = tl.load(marks + ids, mask, other=0)
        bias = ((mark >> r.BIAS_SHIFT) & r.BIAS_INDEX) - 1
        x = x + tl.load(floats_at(record + r.BIAS) + bias, mask & (bias >= 0), other=0.0)
        x = tl.where((mark & (r.BANNED | r.BARRED_MARK)) != 0, -float("inf"), x)
    index = 0
    while index < edits:
        op = op_at(record, index)
        if tl.load(op + r.CODE) != skipped:
            x = edit(op, x, ids, mask, counts, marks)
        index += 1
    return x
