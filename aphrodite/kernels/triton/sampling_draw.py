"""The draw: Gumbel-max over the survivors, or the argmax, ties to the lowest token; and how a row's step ends."""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.sampling_history import unmark
from aphrodite.kernels.triton.sampling_read import floats_at, gumbel, op_at, uniforms_at, uniforms_from, value_of
from aphrodite.kernels.triton.sampling_stages import number_at, token_at

USE_DRAW = tl.constexpr(0)  # sampling/random.py
_PEAK, _SHARPNESS, _WIDTH = tl.constexpr(5.0), tl.constexpr(10.0), tl.constexpr(0.3)  # stages/adaptive_p.py
_LN2 = tl.constexpr(0.6931471805599453)
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def shape(x, floats):
    """Logits to draw from: `x`, or adaptive-p's curve over their probabilities."""
    if tl.load(floats + r.SHAPED) != 0:
        apart = tl.abs(tl.exp(x - tl.load(floats + r.NORMALIZER)) - tl.load(floats + r.TARGET)) / _WIDTH
        shaped = _PEAK - _SHARPNESS * apart * apart / (1.0 + apart)
        x = tl.where(x == -float("inf"), x, shaped)
    return x


@triton.jit
def top_shape(values, count, top, floats, BLOCK: tl.constexpr):
    """The largest of the logits to draw from, where the largest of `values` is `top`."""
    highest = top
    if tl.load(floats + r.SHAPED) != 0:
        tops = tl.full([BLOCK], -float("inf"), tl.float32)
        begin = 0
        while begin < count:
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(values + at, at < count, other=-float("inf"))
            tops = tl.maximum(tops, shape(x, floats))
            begin += BLOCK
        highest = tl.max(tops, axis=0)
    return highest


@triton.jit
def draw_listed(record, position, values, tokens, count, top, floats, BLOCK: tl.constexpr):
    """The entry with the largest sum of logit and noise, and its logit before adaptive-p."""
    best, entry = tl.full([], -float("inf"), tl.float32), tl.full([], NO_TOKEN, tl.int32)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        mask = at < count
        x = shape(tl.load(values + at, mask, other=-float("inf")), floats)
        noise = gumbel(uniforms_at(record, position, USE_DRAW, token_at(tokens, at, mask, False)))
        scores = tl.where(x > -float("inf"), (x - top) + noise, -float("inf"))
        here = tl.max(scores, axis=0)
        first = tl.min(tl.where((scores == here) & (scores > -float("inf")), at, NO_TOKEN), axis=0)
        entry = tl.where(here > best, first, entry)
        best = tl.maximum(best, here)
        begin += BLOCK
    return entry


@triton.jit
def draw_piece(record, position, x, top, first, PIECE: tl.constexpr):
    """The best score among the tokens `first` + [0, PIECE) with logits `x`, and the lowest token that has it.

    A score is the logit above `top` and, unless the row is greedy, noise.
    """
    scores = tl.where(x > -float("inf"), x - top, -float("inf"))
    if tl.load(record + r.GREEDY) == 0:
        scores += gumbel(uniforms_from(record, position, USE_DRAW, first, PIECE))
    best = tl.max(scores, axis=0)
    ids = first + tl.arange(0, PIECE)
    return best, tl.min(tl.where((scores == best) & (scores > -float("inf")), ids, NO_TOKEN), axis=0)


@triton.jit
def remember(record, position, token, floats, counts):
    """What the row's stages have to know of the chosen token at the next position."""
    if (tl.load(record + r.FLAGS) & r.COUNTS) != 0:
        tl.store(counts + token, tl.load(counts + token) + 1)
    logprob = tl.load(floats + r.CHOSEN) - tl.load(floats + r.NORMALIZER)
    num_ops = tl.load(record + r.OPS)
    index = tl.load(record + r.EDITS)
    while index < num_ops:
        op = op_at(record, index)
        code = tl.load(op + r.CODE)
        if code == r.MIROSTAT:
            mu = number_at(op, record, position, 2 * value_of(op, 1))
            mu = mu - value_of(op, 2) * (logprob / -_LN2 - value_of(op, 1))
            tl.store(floats_at(op + r.POINTER) + position + 1, mu)
        elif code == r.ADAPTIVE_P:
            average, decay = number_at(op, record, position, value_of(op, 0)), value_of(op, 1)
            average = decay * average + (1 - decay) * tl.exp(logprob)
            tl.store(floats_at(op + r.POINTER) + position + 1, average)
        index += 1


@triton.jit
def settle(record, position, entry, state, floats, counts, marks, history, outputs, MARKED: tl.constexpr):
    """The end of a row's step: remember the token, take back its marks, hand out what was chosen."""
    out_tokens, out_ok, out_exhausted = outputs
    tl.debug_barrier()
    token, ok = tl.load(state + r.TOKEN), tl.load(state + r.OK)
    if ok != 0:
        remember(record, position, token, floats, counts)
    if MARKED and (tl.load(record + r.FLAGS) & r.HISTORY) != 0:
        unmark(record, position, marks, history)
    tl.store(out_tokens + entry, token)
    tl.store(out_ok + entry, (ok != 0).to(tl.int8))
    tl.store(out_exhausted + entry, (tl.load(state + r.EXHAUSTED) != 0).to(tl.int8))
