"""The choice of greedy rows, and the lists of what can survive in the others, from the chunks that can hold any of it.

One block a row. Cost: a read of the chunk maxima and of the chunks that survivors are in. Rows with a list are left to
sampling_listed.py, rows without a truncation and rows with many survivors to sampling_wide.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import direct_launch, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.sampling_draw import NO_TOKEN, settle
from aphrodite.kernels.triton.sampling_measure import CHUNK, combine_pieces
from aphrodite.kernels.triton.sampling_read import op_at, read_logits, value_of
from aphrodite.kernels.triton.sampling_search import kth_largest
from aphrodite.kernels.triton.sampling_stages import (
    LIST_CAPACITY,
    dynamic_temperature,
    is_threshold,
    number_at,
    save_sums,
    threshold,
)

GROUP = tl.constexpr(16)  # chunks read at once
_FEW_CHUNKS, _MANY_CHUNKS = tl.constexpr(48), tl.constexpr(400)  # that top-p looks at, at first and at last
_TOO_MANY_CHUNKS = tl.constexpr(680)  # whose survivors a list would hold only if they had hardly more than one each


@direct_launch
@triton.jit
def choose_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    history_ptr,
    tops_ptr,
    pieces_ptr,
    chunks_ptr,
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
    num_rows,
    num_chunks,
    num_pieces,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    LISTS: tl.constexpr,
    SETTLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """LISTS: rows with truncations may be among the batch. SETTLES: end a row's step here, where its token is known."""
    launch_dependents(PDL)
    wait_for_producer(PDL)
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    tl.store(state + tl.arange(0, r.STATE_WORDS), tl.zeros([r.STATE_WORDS], tl.int32))
    tl.store(floats + tl.arange(0, r.STATE_FLOATS), tl.zeros([r.STATE_FLOATS], tl.float32))
    if row >= num_rows:
        _hand_out_nothing(entry, out_tokens_ptr, out_ok_ptr, out_exhausted_ptr)
        return
    record = records_ptr + row * r.RECORD
    if tl.load(record + r.ACTIVE) == 0:
        _hand_out_nothing(entry, out_tokens_ptr, out_ok_ptr, out_exhausted_ptr)
        return
    position = tl.load(positions_ptr + entry)
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    tl.debug_barrier()
    _choose(
        logits_ptr + entry * logits_stride,
        record,
        position,
        counts,
        marks,
        tops_ptr + entry * num_chunks,
        pieces_ptr + entry * num_pieces * r.PIECE_WORDS,
        chunks_ptr + entry * num_chunks,
        values_ptr + entry * LIST_CAPACITY,
        tokens_ptr + entry * LIST_CAPACITY,
        state,
        floats,
        vocab,
        num_chunks,
        num_pieces,
        CHUNKS,
        PIECES,
        LISTS,
    )
    if SETTLES:
        tl.debug_barrier()
        if tl.load(state + r.MODE) == r.DONE:
            history = history_ptr + row * history_stride
            outputs = out_tokens_ptr, out_ok_ptr, out_exhausted_ptr
            settle(record, position, entry, state, floats, counts, marks, history, outputs, LISTS)


@triton.jit
def _choose(
    logits,
    record,
    position,
    counts,
    marks,
    tops_ptr,
    pieces,
    chunks,
    values,
    tokens,
    state,
    floats,
    vocab,
    num_chunks,
    num_pieces,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    LISTS: tl.constexpr,
):
    """Writes the row's state: its token, or which kernel goes on with it."""
    piece = tl.arange(0, PIECES)
    bad = tl.max(tl.load(pieces + piece * r.PIECE_WORDS + r.PIECE_BAD, piece < num_pieces, other=0.0), axis=0)
    chunk = tl.arange(0, CHUNKS)
    tops = tl.load(tops_ptr + chunk, chunk < num_chunks, other=-float("inf"))
    top = tl.max(tops, axis=0)
    edits, ops = tl.load(record + r.EDITS), tl.load(record + r.OPS)
    tl.store(floats + r.TOP, top)
    if (bad != 0) | (top == float("inf")):
        tl.store(state + r.MODE, r.DONE)
    elif top == -float("inf"):
        if LISTS and _bans_repeats(record, edits):  # which is undone where it leaves nothing
            tl.store(state + r.MODE, r.RUN_WIDE)
        else:
            tl.store(state + r.EXHAUSTED, 1)
    elif edits == ops:
        if tl.load(record + r.GREEDY) != 0:
            best = tl.min(tl.where(tops == top, chunk, CHUNKS), axis=0)
            ids = best * CHUNK + tl.arange(0, CHUNK)
            x = read_logits(logits, record, counts, marks, ids, ids < vocab, 0)
            tl.store(state + r.TOKEN, tl.min(tl.where(x == top, ids, NO_TOKEN), axis=0))
            tl.store(state + r.OK, 1)
        else:
            tl.store(state + r.MODE, r.DRAW_EDITED)
    elif LISTS:
        lists = chunks, values, tokens
        _list(
            logits, record, position, counts, marks, tops, top, pieces, lists, state, floats, vocab, num_pieces, PIECES
        )


@triton.jit
def _hand_out_nothing(entry, out_tokens, out_ok, out_exhausted):
    tl.store(out_tokens + entry, 0)
    tl.store(out_ok + entry, 0)
    tl.store(out_exhausted + entry, 0)


@triton.jit
def _bans_repeats(record, edits):
    found = False
    index = 0
    while index < edits:
        found = found | (tl.load(op_at(record, index) + r.CODE) == r.NO_REPEAT_NGRAM)
        index += 1
    return found


@triton.jit
def _list(
    logits,
    record,
    position,
    counts,
    marks,
    tops,
    top,
    pieces,
    lists,
    state,
    floats,
    vocab,
    num_pieces,
    PIECES: tl.constexpr,
):
    """Lists what can survive, and leaves what the program has to know beside that."""
    mass, weighted = tl.full([], 1.0, tl.float64), tl.full([], 0.0, tl.float64)
    left, deviation = tl.full([], 1.0, tl.float64), tl.full([], 0.0, tl.float64)
    if (tl.load(record + r.FLAGS) & r.STATS) != 0:
        mass, weighted, left, deviation = combine_pieces(pieces, num_pieces, top, PIECES)
    first = tl.load(record + r.EDITS)
    divisor = tl.full([], 1.0, tl.float32)
    divided = tl.load(op_at(record, first) + r.CODE) == r.DYNAMIC_TEMPERATURE
    if divided:  # it keeps the order, so what follows it may tell which tokens matter
        divisor = dynamic_temperature(op_at(record, first), mass, weighted, left)
        first += 1
        tops = tl.div_rn(tops, divisor + tl.zeros_like(tops))
        top = tl.div_rn(top, divisor)
    op = op_at(record, first)
    lowest, wanted = _reach(op, record, position, top, mass, weighted, deviation, divided)
    found = _list_survivors(logits, record, counts, marks, tops, top, op, lowest, wanted, divisor, mass, lists, vocab)
    if (found == 0) | (found > LIST_CAPACITY):
        tl.store(state + r.MODE, r.RUN_WIDE)
    else:
        tl.store(state + r.MODE, r.RUN_LIST)
        tl.store(state + r.LISTED_COUNT, found)
        tl.store(state + r.FIRST_OP, first)
        tl.store(floats + r.TOP, top)
        save_sums(floats, mass, weighted, left, deviation)


@triton.jit
def _reach(op, record, position, top, mass, weighted, deviation, divided):
    """Which tokens can survive the operation `op`, a row's first (0 or a list's code behind the last).

    Returns the lowest logit, inf if it is not known, and from how many chunks it looks for tokens, 0 if neither is.
    """
    code = tl.load(op + r.CODE)
    lowest, wanted = tl.full([], float("inf"), tl.float32), tl.full([], 0, tl.int32)
    if (code == r.MIN_P) | (is_threshold(code) & ~divided):
        number = tl.full([], 0.0, tl.float32)
        if code == r.MIROSTAT:
            number = number_at(op, record, position, 2 * value_of(op, 1))
        lowest = threshold(op, code, top, mass, weighted, deviation, number)
    elif code == r.TOP_K:
        wanted = tl.minimum(value_of(op, 0), 1e6).to(tl.int32)
    elif (code == r.TOP_P) & ~divided:
        wanted = tl.full([], _FEW_CHUNKS, tl.int32)
    return lowest, wanted


@triton.jit
def _list_survivors(logits, record, counts, marks, tops, top, op, lowest, wanted, divisor, mass, lists, vocab):
    """Lists what can survive; returns the number of tokens, 0 or more than LIST_CAPACITY if a list cannot hold them."""
    is_top_p = tl.load(op + r.CODE) == r.TOP_P
    found = tl.full([], 0, tl.int32)
    searching = (lowest < float("inf")) | ((wanted > 0) & (wanted <= LIST_CAPACITY))
    while searching:
        if wanted > 0:
            lowest = kth_largest(tops, wanted)
        found = _collect(logits, record, counts, marks, tops, lowest, divisor, lists, vocab)
        searching = tl.full([], 0, tl.int1)
        if is_top_p & (found <= LIST_CAPACITY):
            missing = value_of(op, 0).to(tl.float64) * mass - _mass_of(lists[1], found, top)
            if missing > 0:  # not certain to hold all that survive; others weigh no more than the lowest here
                possible = (LIST_CAPACITY - found).to(tl.float32) * tl.exp(lowest - top)
                searching = (wanted < _MANY_CHUNKS) & (missing <= possible.to(tl.float64))
                found = tl.full([], 0, tl.int32)
                wanted = tl.full([], _MANY_CHUNKS, tl.int32)
    return found


@triton.jit
def _mass_of(values, count, top):
    at = tl.arange(0, LIST_CAPACITY)
    x = tl.load(values + at, at < count, other=-float("inf"))
    return tl.sum(tl.where(x > -float("inf"), tl.exp(x - top), 0.0), axis=0).to(tl.float64)


@triton.jit
def _collect(logits, record, counts, marks, tops, lowest, divisor, lists, vocab):
    """Lists the tokens whose logits, divided, are at least `lowest`; returns how many, or more than LIST_CAPACITY."""
    chunks, values, tokens = lists
    reach = (tops >= lowest) & (tops > -float("inf"))
    place = tl.cumsum(reach.to(tl.int32), axis=0) - 1
    total = tl.sum(reach.to(tl.int32), axis=0)
    tl.debug_barrier()
    tl.store(chunks + place, tl.arange(0, tops.shape[0]), reach)
    tl.debug_barrier()
    found = tl.where(total > _TOO_MANY_CHUNKS, LIST_CAPACITY + 1, 0)
    begin = tl.full([], 0, tl.int32)
    while (begin < total) & (found <= LIST_CAPACITY):
        member = begin + tl.arange(0, GROUP)
        chunk = tl.load(chunks + member, member < total, other=0)
        ids = tl.reshape(chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], [GROUP * CHUNK])
        there = tl.reshape((member < total)[:, None] & (tl.arange(0, CHUNK) >= 0)[None, :], [GROUP * CHUNK])
        mask = there & (ids < vocab)
        x = read_logits(logits, record, counts, marks, ids, mask, 0)
        x = tl.div_rn(x, divisor + tl.zeros_like(x))
        taken = mask & (x >= lowest) & (x > -float("inf"))
        at = found + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(values + at, x, taken & (at < LIST_CAPACITY))
        tl.store(tokens + at, ids, taken & (at < LIST_CAPACITY))
        found += tl.sum(taken.to(tl.int32), axis=0)
        begin += GROUP
    tl.debug_barrier()
    return found
