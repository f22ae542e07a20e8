"""The one pass over all logits: the maximum of every chunk, and sums for the stages that need the whole distribution.

Cost: one read of the logits (and of counts and marks, int32, for rows whose edits look at them), `4 / CHUNK` bytes
written a logit. After it a stage that keeps what lies near the maximum reads only the chunks that reach its threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.sampling_read import read_logits

CHUNK = tl.constexpr(128)  # logits
PIECE = tl.constexpr(4096)  # logits of one program


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
):
    entry, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    if row >= num_rows:
        return
    record = records_ptr + row * r.RECORD
    if tl.load(record + r.ACTIVE) == 0:
        return
    ids = piece * PIECE + tl.arange(0, PIECE)
    mask = ids < vocab
    logits = logits_ptr + entry * logits_stride
    raw, x = read_logits(logits, record, counts_ptr + row * vocab, marks_ptr + row * vocab, ids, mask, False)
    chunk = piece * (PIECE // CHUNK) + tl.arange(0, PIECE // CHUNK)
    tops = tl.max(tl.reshape(x, [PIECE // CHUNK, CHUNK]), axis=1)
    tl.store(tops_ptr + entry * num_chunks + chunk, tops, chunk < num_chunks)
    out = pieces_ptr + (entry * num_pieces + piece) * r.PIECE_WORDS
    bad = tl.max(tl.where(raw < float("inf"), 0, 1), axis=0)
    tl.store(out + r.PIECE_BAD, bad.to(tl.float32))
    if (tl.load(record + r.FLAGS) & r.STATS) != 0:
        _store_sums(out, x, tl.max(tops, axis=0))


@triton.jit
def _store_sums(out, x, top):
    there = x > -float("inf")
    below = tl.where(there, x - tl.where(top > -float("inf"), top, 0.0), 0.0)
    weight = tl.where(there, tl.exp(below), 0.0)
    count = tl.sum(tl.where(there, 1.0, 0.0), axis=0)
    mean = tl.sum(below, axis=0) / tl.maximum(count, 1.0)
    apart = tl.where(there, below - mean, 0.0)
    tl.store(out + r.PIECE_TOP, top)
    tl.store(out + r.PIECE_MASS, tl.sum(weight, axis=0))
    tl.store(out + r.PIECE_WEIGHTED, tl.sum(weight * below, axis=0))
    tl.store(out + r.PIECE_COUNT, count)
    tl.store(out + r.PIECE_MEAN, mean)
    tl.store(out + r.PIECE_SQUARES, tl.sum(apart * apart, axis=0))


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
