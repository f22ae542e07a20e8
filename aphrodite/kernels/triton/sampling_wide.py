"""Rows that draw from the whole vocabulary: those without a truncation, and those with many survivors.

The latter run their program over a float32 copy of their logits first: `widen` has one block a row and reads the row
some 10 times (20 where hundreds of tokens share a logit). `draw` has several blocks a row, which make a random number
and two logarithms for each token that could win: one that lies farther below the top than two of them can differ
cannot. Other rows cost a load in each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import direct_launch, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.sampling_draw import NO_TOKEN, draw_piece, settle, shape, top_shape
from aphrodite.kernels.triton.sampling_measure import CHUNK
from aphrodite.kernels.triton.sampling_read import read_logits
from aphrodite.kernels.triton.sampling_stages import LIST_CAPACITY, run_program

DRAW_PIECE = tl.constexpr(1024)
DRAW_BLOCKS = tl.constexpr(16)  # of a row
WIDE_BLOCK = tl.constexpr(4096)
# Gumbel noise from 24-bit uniforms lies within [-2.82, 16.64] (sampling/random.py): what is farther below the top than
# that is wide cannot be drawn.
_HOPELESS = tl.constexpr(19.6)


@direct_launch
@triton.jit
def widen_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    history_ptr,
    work_ptr,
    values_ptr,
    tokens_ptr,
    states_ptr,
    floats_ptr,
    out_tokens_ptr,
    out_ok_ptr,
    out_exhausted_ptr,
    history_stride,
    logits_stride,
    vocab,
    SETTLES: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    wait_for_producer(PDL)
    entry = tl.program_id(0).to(tl.int64)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    if tl.load(state + r.MODE) != r.RUN_WIDE:
        return
    row = tl.load(rows_ptr + entry).to(tl.int64)
    record, position = records_ptr + row * r.RECORD, tl.load(positions_ptr + entry)
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    logits, work = logits_ptr + entry * logits_stride, work_ptr + entry * vocab
    values = values_ptr + entry * LIST_CAPACITY
    top, skipped, copying = tl.load(floats + r.TOP), tl.full([], 0, tl.int32), tl.full([], 1, tl.int1)
    while copying:
        top = _copy(logits, record, counts, marks, work, vocab, skipped)
        copying = (top == -float("inf")) & (skipped == 0)  # an n-gram ban that leaves nothing is undone
        skipped = tl.full([], r.NO_REPEAT_NGRAM, tl.int32)
    zero = tl.full([], 0.0, tl.float64)
    top = run_program(
        record,
        position,
        tl.load(record + r.EDITS),
        work,
        tokens_ptr + entry * LIST_CAPACITY,
        vocab,
        top,
        (zero, zero, zero, zero),
        counts,
        marks,
        floats,
        values,
        True,
        WIDE_BLOCK,
    )
    tl.debug_barrier()
    if tl.abs(top) < float("inf"):
        tl.store(floats + r.TOP, top_shape(work, vocab, top, floats, WIDE_BLOCK))
        tl.store(state + r.MODE, r.DRAW_WORK)
    else:
        tl.store(state + r.MODE, r.DONE)
        tl.store(state + r.EXHAUSTED, (top == -float("inf")).to(tl.int32))
        if SETTLES:
            history = history_ptr + row * history_stride
            outputs = out_tokens_ptr, out_ok_ptr, out_exhausted_ptr
            settle(record, position, entry, state, floats, counts, marks, history, outputs, True)


@triton.jit
def _copy(logits, record, counts, marks, work, vocab, skipped):
    """Writes the row's edited logits to `work`, `skipped` as in `read_logits`; returns the largest."""
    tops = tl.full([WIDE_BLOCK], -float("inf"), tl.float32)
    tl.debug_barrier()
    begin = 0
    while begin < vocab:
        ids = begin + tl.arange(0, WIDE_BLOCK)
        x = read_logits(logits, record, counts, marks, ids, ids < vocab, skipped)
        tl.store(work + ids, x, ids < vocab)
        tops = tl.maximum(tops, x)
        begin += WIDE_BLOCK
    tl.debug_barrier()
    return tl.max(tops, axis=0)


@direct_launch
@triton.jit
def draw_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    history_ptr,
    tops_ptr,
    work_ptr,
    states_ptr,
    floats_ptr,
    scores_ptr,
    winners_ptr,
    out_tokens_ptr,
    out_ok_ptr,
    out_exhausted_ptr,
    history_stride,
    logits_stride,
    vocab,
    num_chunks,
    SETTLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row's last block takes the best of all its blocks."""
    launch_dependents(PDL)
    wait_for_producer(PDL)
    entry, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    mode = tl.load(state + r.MODE)
    if (mode != r.DRAW_EDITED) & (mode != r.DRAW_WORK):
        return
    row = tl.load(rows_ptr + entry).to(tl.int64)
    record, position = records_ptr + row * r.RECORD, tl.load(positions_ptr + entry)
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    work, top = work_ptr + entry * vocab, tl.load(floats + r.TOP)
    best, token = tl.full([], -float("inf"), tl.float32), tl.full([], NO_TOKEN, tl.int32)
    first = block * DRAW_PIECE
    while first < vocab:
        ids = first + tl.arange(0, DRAW_PIECE)
        x = tl.full([DRAW_PIECE], -float("inf"), tl.float32)
        if mode == r.DRAW_WORK:
            x = shape(tl.load(work + ids, ids < vocab, other=-float("inf")), floats)
        else:
            chunk = first // CHUNK + tl.arange(0, DRAW_PIECE // CHUNK)
            highest = tl.load(tops_ptr + entry * num_chunks + chunk, chunk < num_chunks, other=-float("inf"))
            if tl.max(highest, axis=0) - top > -_HOPELESS:
                logits = logits_ptr + entry * logits_stride
                x = read_logits(logits, record, counts, marks, ids, ids < vocab, 0)
        if tl.max(x, axis=0) - top > -_HOPELESS:
            score, here = draw_piece(record, position, x, top, first, DRAW_PIECE)
            token = tl.where(score > best, here, token)  # a lower one stays where they are equal
            best = tl.maximum(best, score)
        first += DRAW_BLOCKS * DRAW_PIECE
    scores, winners = scores_ptr + entry * DRAW_BLOCKS, winners_ptr + entry * DRAW_BLOCKS
    tl.store(scores + block, best)
    tl.store(winners + block, token)
    tl.debug_barrier()
    if tl.atomic_add(state + r.ARRIVED, 1, sem="acq_rel") == DRAW_BLOCKS - 1:
        each = tl.arange(0, DRAW_BLOCKS)
        score = tl.load(scores + each, cache_modifier=".cg")
        winner = tl.load(winners + each, cache_modifier=".cg")
        token = tl.min(tl.where(score == tl.max(score, axis=0), winner, NO_TOKEN), axis=0)
        found = token != NO_TOKEN
        token = tl.where(found, token, 0)
        tl.store(state + r.OK, found.to(tl.int32))
        tl.store(state + r.TOKEN, token)
        if mode == r.DRAW_WORK:
            tl.store(floats + r.CHOSEN, tl.load(work + token))
        if SETTLES:
            history = history_ptr + row * history_stride
            outputs = out_tokens_ptr, out_ok_ptr, out_exhausted_ptr
            settle(record, position, entry, state, floats, counts, marks, history, outputs, True)
