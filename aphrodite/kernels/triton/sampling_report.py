"""What rows were drawn from, for log-probabilities of processed logits, and the end of their step after it.

The kernels that choose leave a row's step open then (SETTLES is False): its counts and marks are still those it was
chosen by. Cost: a write of [entries, vocab] float32, and a read of the logits of rows without a truncation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import direct_launch
from aphrodite.kernels.triton.sampling_draw import settle, shape
from aphrodite.kernels.triton.sampling_read import read_logits
from aphrodite.kernels.triton.sampling_stages import LIST_CAPACITY

REPORT_PIECE = tl.constexpr(1024)


@direct_launch
@triton.jit
def report_kernel(
    logits_ptr,
    rows_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    work_ptr,
    values_ptr,
    tokens_ptr,
    states_ptr,
    floats_ptr,
    out_ptr,
    logits_stride,
    vocab,
):
    """Writes the logits that each row was drawn from, -inf where masked: [entries, vocab] float32. Before `settle`."""
    entry, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    mode = tl.load(state + r.MODE)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    first = piece * REPORT_PIECE
    ids = first + tl.arange(0, REPORT_PIECE)
    out = out_ptr + entry * vocab
    x = tl.full([REPORT_PIECE], -float("inf"), tl.float32)
    if mode == r.DRAW_WORK:
        x = shape(tl.load(work_ptr + entry * vocab + ids, ids < vocab, other=-float("inf")), floats)
    elif (mode == r.DRAW_EDITED) | ((mode == r.DONE) & (tl.load(state + r.OK) != 0)):
        logits = logits_ptr + entry * logits_stride
        record, counts, marks = records_ptr + row * r.RECORD, counts_ptr + row * vocab, marks_ptr + row * vocab
        x = read_logits(logits, record, counts, marks, ids, ids < vocab, 0)
    tl.store(out + ids, x, ids < vocab)
    if mode == r.LISTED:
        tl.debug_barrier()
        at = tl.arange(0, LIST_CAPACITY)
        listed = at < tl.load(state + r.LISTED_COUNT)
        token = tl.load(tokens_ptr + entry * LIST_CAPACITY + at, listed, other=0)
        x = shape(tl.load(values_ptr + entry * LIST_CAPACITY + at, listed, other=-float("inf")), floats)
        tl.store(out + token, x, listed & (token >= first) & (token < first + REPORT_PIECE))


@direct_launch
@triton.jit
def settle_kernel(
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    history_ptr,
    states_ptr,
    floats_ptr,
    out_tokens_ptr,
    out_ok_ptr,
    out_exhausted_ptr,
    history_stride,
    vocab,
    num_rows,
):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    if row >= num_rows:
        return
    record = records_ptr + row * r.RECORD
    if tl.load(record + r.ACTIVE) == 0:
        return
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    counts, marks, history = counts_ptr + row * vocab, marks_ptr + row * vocab, history_ptr + row * history_stride
    outputs = out_tokens_ptr, out_ok_ptr, out_exhausted_ptr
    settle(record, tl.load(positions_ptr + entry), entry, state, floats, counts, marks, history, outputs, True)
