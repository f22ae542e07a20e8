"""The one pass over all logits: the maximum of every chunk, and sums for the stages that need the whole distribution.

Cost: one read of the logits (and of counts and marks, int32, for rows whose edits look at them), `4 / CHUNK` bytes
written a logit. After it a stage that keeps what lies near the maximum reads only the chunks that reach its threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import direct_launch, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.sampling_read import edited, read_logits

CHUNK = tl.constexpr(128)  # logits
PIECE = tl.constexpr(8192)  # logits of one program
PART = tl.constexpr(1024)  # of which so many are looked at at a time


@direct_launch
@triton.jit
def measure_kernel(
    logits_ptr,
    rows_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    tops_ptr,
    pieces_ptr,
    logits_stride,
    vocab,
    num_rows,
    num_chunks,
    num_pieces,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    wait_for_producer(PDL)
    entry, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, logits = piece * PIECE, logits_ptr + entry * logits_stride
    end = tl.minimum(first + PIECE, vocab)
    # On their way while the record is read; afterwards four parts ahead of the one that is looked at.
    part1, part2 = _load(logits, first, end), _load(logits, first + PART, end)
    part3, part4 = _load(logits, first + 2 * PART, end), _load(logits, first + 3 * PART, end)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    if row >= num_rows:
        return
    record = records_ptr + row * r.RECORD
    active, flags, edits = tl.load(record + r.ACTIVE), tl.load(record + r.FLAGS), tl.load(record + r.EDITS)
    if active == 0:
        return
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    tops = tl.full([PART // CHUNK], -float("inf"), tl.float32)
    bad = tl.zeros([PART], tl.int32)
    begin = first
    while begin < end:
        x, ids = part1.to(tl.float32), begin + tl.arange(0, PART)
        part1, part2, part3, part4 = part2, part3, part4, _load(logits, begin + 4 * PART, end)
        bad = bad | tl.where(x < float("inf"), 0, 1)
        x = edited(x, record, flags, edits, counts, marks, ids, ids < vocab, 0)
        here = tl.max(tl.reshape(x, [PART // CHUNK, CHUNK]), axis=1)
        chunk = begin // CHUNK + tl.arange(0, PART // CHUNK)
        tl.store(tops_ptr + entry * num_chunks + chunk, here, chunk < num_chunks)
        tops = tl.maximum(tops, here)
        begin += PART
    out = pieces_ptr + (entry * num_pieces + piece) * r.PIECE_WORDS
    tl.store(out + r.PIECE_BAD, tl.max(bad, axis=0).to(tl.float32))
    if (flags & r.STATS) != 0:
        top = tl.max(tops, axis=0)
        tl.store(out + r.PIECE_TOP, top)
        _store_sums(out, logits, record, counts, marks, top, first, vocab)


@triton.jit
def _load(logits, begin, end):
    ids = begin + tl.arange(0, PART)
    return tl.load(logits + ids, ids < end, other=-float("inf"))


@triton.jit
def _store_sums(out, logits, record, counts, marks, top, first, vocab):
    top = tl.where(top > -float("inf"), top, 0.0)
    mass, weighted = tl.zeros([PART], tl.float32), tl.zeros([PART], tl.float32)
    total, count = tl.zeros([PART], tl.float32), tl.zeros([PART], tl.float32)
    begin, end = first, tl.minimum(first + PIECE, vocab)
    while begin < end:
        ids = begin + tl.arange(0, PART)
        x = read_logits(logits, record, counts, marks, ids, ids < vocab, 0)
        there = x > -float("inf")
        below = tl.where(there, x - top, 0.0)
        weight = tl.where(there, tl.exp(below), 0.0)
        mass += weight
        weighted += weight * below
        total += below
        count += tl.where(there, 1.0, 0.0)
        begin += PART
    left = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.maximum(left, 1.0)
    squares = tl.zeros([PART], tl.float32)
    begin = first
    while begin < end:
        ids = begin + tl.arange(0, PART)
        x = read_logits(logits, record, counts, marks, ids, ids < vocab, 0)
        apart = tl.where(x > -float("inf"), (x - top) - mean, 0.0)
        squares += apart * apart
        begin += PART
    tl.store(out + r.PIECE_MASS, tl.sum(mass, axis=0))
    tl.store(out + r.PIECE_WEIGHTED, tl.sum(weighted, axis=0))
    tl.store(out + r.PIECE_COUNT, left)
    tl.store(out + r.PIECE_MEAN, mean)
    tl.store(out + r.PIECE_SQUARES, tl.sum(squares, axis=0))


@triton.jit
def combine_pieces(pieces, num_pieces, top, PIECES: tl.constexpr):
    """Of a whole row with the maximum `top`: mass and weighted sum relative to it, survivors, standard deviation.

    All float64; arguments and results as `sums_of` (sampling_stages.py) defines them.
    """
    index = tl.arange(0, PIECES)
    at = pieces + index * r.PIECE_WORDS
    mask = index < num_pieces
    count = tl.load(at + r.PIECE_COUNT, mask, other=0.0).to(tl.float64)
    there = count > 0
    shift = tl.where(there, tl.load(at + r.PIECE_TOP, mask, other=0.0) - top, 0.0).to(tl.float64)
    scale = tl.where(there, tl.exp(shift), 0.0)
    own = tl.load(at + r.PIECE_MASS, mask, other=0.0).to(tl.float64)
    mass = tl.sum(own * scale, axis=0)
    weighted = tl.load(at + r.PIECE_WEIGHTED, mask, other=0.0).to(tl.float64)
    total = tl.sum((weighted + own * shift) * scale, axis=0)
    left = tl.sum(count, axis=0)
    means = tl.load(at + r.PIECE_MEAN, mask, other=0.0).to(tl.float64) + shift
    mean = tl.sum(count * means, axis=0) / left
    squares = tl.load(at + r.PIECE_SQUARES, mask, other=0.0).to(tl.float64)
    apart = means - mean
    deviation = tl.sqrt(tl.sum(squares + count * apart * apart, axis=0) / left)
    return mass, total, left, deviation
