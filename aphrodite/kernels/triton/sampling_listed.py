"""Rows with few survivors: the program over their list, and the draw. One block a row, which reads the list alone."""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import direct_launch, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.sampling_draw import draw_listed, settle, top_shape
from aphrodite.kernels.triton.sampling_stages import LIST_CAPACITY, run_program, saved_sums


@direct_launch
@triton.jit
def listed_kernel(
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    history_ptr,
    values_ptr,
    tokens_ptr,
    states_ptr,
    floats_ptr,
    out_tokens_ptr,
    out_ok_ptr,
    out_exhausted_ptr,
    history_stride,
    vocab,
    SETTLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """SETTLES: end a row's step here."""
    launch_dependents(PDL)
    wait_for_producer(PDL)
    entry = tl.program_id(0).to(tl.int64)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    if tl.load(state + r.MODE) != r.RUN_LIST:
        return
    row = tl.load(rows_ptr + entry).to(tl.int64)
    record, position = records_ptr + row * r.RECORD, tl.load(positions_ptr + entry)
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    values, tokens = values_ptr + entry * LIST_CAPACITY, tokens_ptr + entry * LIST_CAPACITY
    found, first = tl.load(state + r.LISTED_COUNT), tl.load(state + r.FIRST_OP)
    top = run_program(
        record,
        position,
        first,
        values,
        tokens,
        found,
        tl.load(floats + r.TOP),
        saved_sums(floats),
        counts,
        marks,
        floats,
        values,
        False,
        LIST_CAPACITY,
    )
    tl.debug_barrier()
    tl.store(state + r.MODE, r.LISTED)
    if tl.abs(top) < float("inf"):
        top = top_shape(values, found, top, floats, LIST_CAPACITY)
        chosen = draw_listed(record, position, values, tokens, found, top, floats, LIST_CAPACITY)
        tl.store(state + r.TOKEN, tl.load(tokens + chosen))
        tl.store(floats + r.CHOSEN, tl.load(values + chosen))
        tl.store(state + r.OK, 1)
    elif top == -float("inf"):
        tl.store(state + r.EXHAUSTED, 1)
    if SETTLES:
        history = history_ptr + row * history_stride
        outputs = out_tokens_ptr, out_ok_ptr, out_exhausted_ptr
        settle(record, position, entry, state, floats, counts, marks, history, outputs, True)
