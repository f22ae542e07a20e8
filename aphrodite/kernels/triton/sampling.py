"""The sampler on the device: plans of all rows of a step in seven launches that a CUDA graph can hold.

    mark      what history and position say about single tokens            (sampling_history.py)
    measure   one read of all logits: chunk maxima, sums where needed      (sampling_measure.py)
    choose    rows with few survivors: collects them from the chunks that can hold any, runs the program, draws
    widen     rows with many: the program over the vocabulary, in a float32 copy
    draw      whatever has the whole vocabulary to draw from, in pieces
    finish    picks the best piece, remembers what the stages have to
    unmark    takes back the marks of this step

A row that has nothing to do in a launch costs a few loads there. Which way a row goes depends on its logits and its
plan alone. Cost: one read of the logits and of the chunks that survivors are in; for rows without a truncation one
more and a random number a logit; a row that needs `widen` pays some 10 to 30 reads of its logits by one block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.sampling_draw import (
    NO_TOKEN,
    draw_listed,
    draw_piece,
    remember,
    shape,
    top_shape,
)
from aphrodite.kernels.triton.sampling_history import mark_kernel, unmark_kernel
from aphrodite.kernels.triton.sampling_measure import CHUNK, PIECE, combine_pieces, measure_kernel
from aphrodite.kernels.triton.sampling_read import op_at, read_logits, value_of
from aphrodite.kernels.triton.sampling_search import kth_largest
from aphrodite.kernels.triton.sampling_stages import (
    dynamic_temperature,
    is_threshold,
    number_at,
    run_program,
    threshold,
)

CAPACITY = tl.constexpr(1024)  # candidates of a list
GROUP = tl.constexpr(8)  # chunks read at once
DRAW_PIECE = tl.constexpr(1024)
WIDE_BLOCK = tl.constexpr(2048)
_FEW_CHUNKS, _MANY_CHUNKS = tl.constexpr(48), tl.constexpr(400)  # that top-p looks at, at first and at last

# Without fused multiply-adds a logit is the same number in every kernel that reads it, and that of the torch stages.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def choose_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    tops_ptr,
    pieces_ptr,
    chunks_ptr,
    values_ptr,
    tokens_ptr,
    states_ptr,
    floats_ptr,
    logits_stride,
    vocab,
    num_rows,
    num_chunks,
    num_pieces,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    tl.store(state + tl.arange(0, r.STATE_WORDS), tl.zeros([r.STATE_WORDS], tl.int32))
    tl.store(floats + tl.arange(0, r.STATE_FLOATS), tl.zeros([r.STATE_FLOATS], tl.float32))
    tl.debug_barrier()
    if row >= num_rows:
        return
    record = records_ptr + row * r.RECORD
    if tl.load(record + r.ACTIVE) == 0:
        return
    logits, position = logits_ptr + entry * logits_stride, tl.load(positions_ptr + entry)
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    pieces = pieces_ptr + entry * num_pieces * r.PIECE_WORDS
    chunk = tl.arange(0, CHUNKS)
    tops = tl.load(tops_ptr + entry * num_chunks + chunk, chunk < num_chunks, other=-float("inf"))
    top = tl.max(tops, axis=0)
    piece = tl.arange(0, PIECES)
    bad = tl.max(tl.load(pieces + piece * r.PIECE_WORDS + r.PIECE_BAD, piece < num_pieces, other=0.0), axis=0)
    edits, ops = tl.load(record + r.EDITS), tl.load(record + r.OPS)
    tl.store(floats + r.TOP, top)
    if (bad != 0) | (top == float("inf")):
        tl.store(state + r.MODE, r.DONE)
    elif top == -float("inf"):
        if _bans_repeats(record, edits):  # which is undone where it leaves nothing
            tl.store(state + r.MODE, r.RUN_WIDE)
        else:
            tl.store(state + r.EXHAUSTED, 1)
    elif (edits == ops) & (tl.load(record + r.GREEDY) == 0):
        tl.store(state + r.MODE, r.DRAW_EDITED)
    else:
        _choose_from_list(
            logits,
            record,
            position,
            counts,
            marks,
            tops,
            top,
            pieces,
            chunks_ptr + entry * num_chunks,
            values_ptr + entry * CAPACITY,
            tokens_ptr + entry * CAPACITY,
            state,
            floats,
            vocab,
            num_pieces,
            PIECES,
            CHUNKS,
        )


@triton.jit
def _bans_repeats(record, edits):
    found = False
    index = 0
    while index < edits:
        found = found | (tl.load(op_at(record, index) + r.CODE) == r.NO_REPEAT_NGRAM)
        index += 1
    return found


@triton.jit
def _choose_from_list(
    logits,
    record,
    position,
    counts,
    marks,
    tops,
    top,
    pieces,
    chunks,
    values,
    tokens,
    state,
    floats,
    vocab,
    num_pieces,
    PIECES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    mass, weighted = tl.full([], 1.0, tl.float64), tl.full([], 0.0, tl.float64)
    left, deviation = tl.full([], 1.0, tl.float64), tl.full([], 0.0, tl.float64)
    if (tl.load(record + r.FLAGS) & r.STATS) != 0:
        mass, weighted, left, deviation = combine_pieces(pieces, num_pieces, top, PIECES)
    first = tl.load(record + r.EDITS)
    divisor = tl.full([], 1.0, tl.float32)
    code = tl.load(op_at(record, first) + r.CODE)  # 0 or a list's behind the last
    divided = code == r.DYNAMIC_TEMPERATURE  # it keeps the order, so what follows it may tell which tokens matter
    if divided:
        divisor = dynamic_temperature(op_at(record, first), mass, weighted, left)
        first += 1
        tops = tl.div_rn(tops, divisor + tl.zeros_like(tops))
        top = tl.div_rn(top, divisor)
        code = tl.load(op_at(record, first) + r.CODE)
    op = op_at(record, first)
    lowest, wanted = tl.full([], float("inf"), tl.float32), tl.full([], 0, tl.int32)
    greedy = tl.load(record + r.GREEDY) != 0  # such programs consist of edits
    if greedy:
        lowest = top
    elif (code == r.MIN_P) | (is_threshold(code) & ~divided):
        number = tl.full([], 0.0, tl.float32)
        if code == r.MIROSTAT:
            number = number_at(op, record, position, 2 * value_of(op, 1))
        lowest = threshold(op, code, top, mass, weighted, deviation, number)
    elif code == r.TOP_K:
        wanted = tl.minimum(value_of(op, 0), 1e6).to(tl.int32)
    elif (code == r.TOP_P) & ~divided:
        wanted = tl.full([], _FEW_CHUNKS, tl.int32)
    found = tl.full([], 0, tl.int32)
    searching = (lowest < float("inf")) | ((wanted > 0) & (wanted <= CAPACITY))
    while searching:
        if wanted > 0:
            lowest = kth_largest(tops, wanted, CHUNKS)
        found = _collect(logits, record, counts, marks, tops, lowest, divisor, chunks, values, tokens, vocab, CHUNKS)
        searching = tl.full([], 0, tl.int1)
        short = (code == r.TOP_P) & (_mass_of(values, found, top) < value_of(op, 0).to(tl.float64) * mass)
        if short & (found <= CAPACITY):  # not certain to hold all that survive
            found = tl.full([], 0, tl.int32)
            searching = wanted < _MANY_CHUNKS
            wanted = tl.full([], _MANY_CHUNKS, tl.int32)
    if greedy:
        tl.store(state + r.TOKEN, tl.load(tokens))
        tl.store(state + r.OK, 1)
    elif (found == 0) | (found > CAPACITY):
        tl.store(state + r.MODE, r.RUN_WIDE)
    else:
        top = run_program(
            record,
            position,
            first,
            values,
            tokens,
            found,
            top,
            mass,
            weighted,
            left,
            deviation,
            counts,
            marks,
            floats,
            False,
            CAPACITY,
        )
        _finish_list(record, position, values, tokens, found, top, counts, state, floats)


@triton.jit
def _finish_list(record, position, values, tokens, found, top, counts, state, floats):
    tl.debug_barrier()
    tl.store(state + r.MODE, r.LISTED)
    tl.store(state + r.LISTED_COUNT, found)
    if tl.abs(top) < float("inf"):
        top = top_shape(values, found, top, floats, CAPACITY)
        chosen = draw_listed(record, position, values, tokens, found, top, floats, CAPACITY)
        tl.store(state + r.TOKEN, tl.load(tokens + chosen))
        tl.store(floats + r.CHOSEN, tl.load(values + chosen))
        tl.store(state + r.OK, 1)
    elif top == -float("inf"):
        tl.store(state + r.EXHAUSTED, 1)


@triton.jit
def _mass_of(values, count, top):
    at = tl.arange(0, CAPACITY)
    x = tl.load(values + at, at < count, other=-float("inf"))
    return tl.sum(tl.where(x > -float("inf"), tl.exp(x - top), 0.0), axis=0).to(tl.float64)


@triton.jit
def _collect(logits, record, counts, marks, tops, lowest, divisor, chunks, values, tokens, vocab, CHUNKS: tl.constexpr):
    """Lists the tokens whose logits, divided, are at least `lowest`; returns their number, or more than CAPACITY."""
    reach = (tops >= lowest) & (tops > -float("inf"))
    place = tl.cumsum(reach.to(tl.int32), axis=0) - 1
    total = tl.sum(reach.to(tl.int32), axis=0)
    tl.debug_barrier()
    tl.store(chunks + place, tl.arange(0, CHUNKS), reach)
    tl.debug_barrier()
    found = tl.full([], 0, tl.int32)
    begin = tl.full([], 0, tl.int32)
    while (begin < total) & (found <= CAPACITY):
        member = begin + tl.arange(0, GROUP)
        chunk = tl.load(chunks + member, member < total, other=0)
        ids = tl.reshape(chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], [GROUP * CHUNK])
        there = tl.reshape((member < total)[:, None] & (tl.arange(0, CHUNK) >= 0)[None, :], [GROUP * CHUNK])
        mask = there & (ids < vocab)
        _, x = read_logits(logits, record, counts, marks, ids, mask, False)
        x = tl.div_rn(x, divisor + tl.zeros_like(x))
        taken = mask & (x >= lowest) & (x > -float("inf"))
        at = found + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(values + at, x, taken & (at < CAPACITY))
        tl.store(tokens + at, ids, taken & (at < CAPACITY))
        found += tl.sum(taken.to(tl.int32), axis=0)
        begin += GROUP
    tl.debug_barrier()
    return found


@triton.jit
def widen_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    work_ptr,
    states_ptr,
    floats_ptr,
    logits_stride,
    vocab,
):
    entry = tl.program_id(0).to(tl.int64)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    if tl.load(state + r.MODE) != r.RUN_WIDE:
        return
    row = tl.load(rows_ptr + entry).to(tl.int64)
    record, position = records_ptr + row * r.RECORD, tl.load(positions_ptr + entry)
    counts, marks = counts_ptr + row * vocab, marks_ptr + row * vocab
    logits, work = logits_ptr + entry * logits_stride, work_ptr + entry * vocab
    top = _copy(logits, record, counts, marks, work, vocab, False)
    if top == -float("inf"):
        top = _copy(logits, record, counts, marks, work, vocab, True)
    zero = tl.full([], 0.0, tl.float64)
    top = run_program(
        record,
        position,
        tl.load(record + r.EDITS),
        work,
        work.to(tl.pointer_type(tl.int32)),
        vocab,
        top,
        zero,
        zero,
        zero,
        zero,
        counts,
        marks,
        floats,
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


@triton.jit
def _copy(logits, record, counts, marks, work, vocab, SKIP_REPEATS: tl.constexpr):
    """Writes the row's edited logits to `work`; returns the largest."""
    top = tl.full([], -float("inf"), tl.float32)
    tl.debug_barrier()
    begin = 0
    while begin < vocab:
        ids = begin + tl.arange(0, WIDE_BLOCK)
        _, x = read_logits(logits, record, counts, marks, ids, ids < vocab, SKIP_REPEATS)
        tl.store(work + ids, x, ids < vocab)
        top = tl.maximum(top, tl.max(x, axis=0))
        begin += WIDE_BLOCK
    tl.debug_barrier()
    return top


@triton.jit
def draw_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    marks_ptr,
    work_ptr,
    states_ptr,
    floats_ptr,
    scores_ptr,
    winners_ptr,
    logits_stride,
    vocab,
    num_draws,
):
    entry, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mode = tl.load(states_ptr + entry * r.STATE_WORDS + r.MODE)
    if (mode != r.DRAW_EDITED) & (mode != r.DRAW_WORK):
        return
    row = tl.load(rows_ptr + entry).to(tl.int64)
    record, floats = records_ptr + row * r.RECORD, floats_ptr + entry * r.STATE_FLOATS
    first = piece * DRAW_PIECE
    ids = first + tl.arange(0, DRAW_PIECE)
    x = tl.full([DRAW_PIECE], -float("inf"), tl.float32)
    if mode == r.DRAW_WORK:
        x = tl.load(work_ptr + entry * vocab + ids, ids < vocab, other=-float("inf"))
    else:
        logits = logits_ptr + entry * logits_stride
        _, x = read_logits(logits, record, counts_ptr + row * vocab, marks_ptr + row * vocab, ids, ids < vocab, False)
    score, token = draw_piece(record, tl.load(positions_ptr + entry), x, first, floats, DRAW_PIECE)
    tl.store(scores_ptr + entry * num_draws + piece, score)
    tl.store(winners_ptr + entry * num_draws + piece, token)


@triton.jit
def finish_kernel(
    rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    work_ptr,
    states_ptr,
    floats_ptr,
    scores_ptr,
    winners_ptr,
    out_tokens_ptr,
    out_ok_ptr,
    out_exhausted_ptr,
    vocab,
    num_draws,
    DRAWS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    mode, token, ok = tl.load(state + r.MODE), tl.load(state + r.TOKEN), tl.load(state + r.OK)
    if (mode == r.DRAW_EDITED) | (mode == r.DRAW_WORK):
        piece = tl.arange(0, DRAWS)
        scores = tl.load(scores_ptr + entry * num_draws + piece, piece < num_draws, other=-float("inf"))
        winners = tl.load(winners_ptr + entry * num_draws + piece, piece < num_draws, other=NO_TOKEN)
        token = tl.min(tl.where(scores == tl.max(scores, axis=0), winners, NO_TOKEN), axis=0)
        ok = (token != NO_TOKEN).to(tl.int32)
        token = tl.where(ok != 0, token, 0)
        if mode == r.DRAW_WORK:
            tl.store(floats + r.CHOSEN, tl.load(work_ptr + entry * vocab + token))
            tl.debug_barrier()
    if ok != 0:
        row = tl.load(rows_ptr + entry).to(tl.int64)
        record = records_ptr + row * r.RECORD
        remember(record, tl.load(positions_ptr + entry), token, floats, counts_ptr + row * vocab)
    tl.store(out_tokens_ptr + entry, token)
    tl.store(out_ok_ptr + entry, (ok != 0).to(tl.int8))
    tl.store(out_exhausted_ptr + entry, (tl.load(state + r.EXHAUSTED) != 0).to(tl.int8))


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
    """Writes the logits that each row was drawn from, -inf where masked: [entries, vocab] float32. Before `unmark`."""
    entry, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state, floats = states_ptr + entry * r.STATE_WORDS, floats_ptr + entry * r.STATE_FLOATS
    mode = tl.load(state + r.MODE)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    first = piece * DRAW_PIECE
    ids = first + tl.arange(0, DRAW_PIECE)
    out = out_ptr + entry * vocab
    x = tl.full([DRAW_PIECE], -float("inf"), tl.float32)
    if mode == r.DRAW_WORK:
        x = shape(tl.load(work_ptr + entry * vocab + ids, ids < vocab, other=-float("inf")), floats)
    elif (mode == r.DRAW_EDITED) | ((mode == r.DONE) & (tl.load(state + r.OK) != 0)):
        logits = logits_ptr + entry * logits_stride
        record, counts, marks = records_ptr + row * r.RECORD, counts_ptr + row * vocab, marks_ptr + row * vocab
        _, x = read_logits(logits, record, counts, marks, ids, ids < vocab, False)
    tl.store(out + ids, x, ids < vocab)
    if mode == r.LISTED:
        tl.debug_barrier()
        at = tl.arange(0, CAPACITY)
        listed = at < tl.load(state + r.LISTED_COUNT)
        token = tl.load(tokens_ptr + entry * CAPACITY + at, listed, other=0)
        x = shape(tl.load(values_ptr + entry * CAPACITY + at, listed, other=-float("inf")), floats)
        tl.store(out + token, x, listed & (token >= first) & (token < first + DRAW_PIECE))


class SamplingKernels:
    """The launches, and the memory that they pass from one to the next.

    Args:
        num_rows: rows of the tables; a row number from there on is padding.
        history: [num_rows or more, positions] int32, tokens of each row.
    """

    def __init__(self, num_rows: int, vocab: int, history: torch.Tensor) -> None:
        self.vocab, self.num_rows, self.history = vocab, num_rows, history
        device = history.device
        self._chunks, self._pieces = triton.cdiv(vocab, CHUNK.value), triton.cdiv(vocab, PIECE.value)
        self._draws = triton.cdiv(vocab, DRAW_PIECE.value)

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        def floats(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        self.records = ints(num_rows, r.RECORD.value)
        self.counts, self.marks = ints(num_rows, vocab), ints(num_rows, vocab)
        self._work = floats(num_rows, vocab)
        self._tops, self._piece_sums = floats(num_rows, self._chunks), floats(num_rows, self._pieces, 8)
        self._chunk_list = ints(num_rows, self._chunks)
        self._values, self._tokens = floats(num_rows, CAPACITY.value), ints(num_rows, CAPACITY.value)
        self._states, self._floats = ints(num_rows, r.STATE_WORDS.value), floats(num_rows, r.STATE_FLOATS.value)
        self._scores, self._winners = floats(num_rows, self._draws), ints(num_rows, self._draws)

    @property
    def allocated_bytes(self) -> int:
        """Device memory of all tables."""
        tables = [
            value for value in vars(self).values() if isinstance(value, torch.Tensor) and value is not self.history
        ]
        return sum(table.numel() * table.element_size() for table in tables)

    def run(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        out_token_ids: torch.Tensor,
        out_ok: torch.Tensor,
        out_exhausted: torch.Tensor,
        out_logits: torch.Tensor | None = None,
    ) -> None:
        """Sample B rows; allocates nothing and waits for nothing.

        Args:
            logits: [B, vocab], float32, bfloat16 or float16, contiguous rows; read only.
            rows, positions: [B] int32, different rows; tokens before the one to be chosen.
            out_token_ids: [B] int32. out_ok, out_exhausted: [B] bool.
            out_logits: [B, vocab] float32, written with what each row was drawn from.
        """
        batch, stride = logits.shape[0], logits.stride(0)
        history = (self.history, self.history.stride(0), self.vocab, self.num_rows)
        tables = (self.records, self.counts, self.marks)
        mark_kernel[(batch,)](rows, positions, *tables, *history, num_warps=8, **EXACT)
        sizes = (stride, self.vocab, self.num_rows, self._chunks, self._pieces)
        sums = (self._tops, self._piece_sums)
        measure_kernel[(batch, self._pieces)](logits, rows, *tables, *sums, *sizes, num_warps=8, **EXACT)
        choose_kernel[(batch,)](
            logits,
            rows,
            positions,
            *tables,
            *sums,
            self._chunk_list,
            self._values,
            self._tokens,
            self._states,
            self._floats,
            *sizes,
            CHUNKS=max(triton.next_power_of_2(self._chunks), 32),
            PIECES=max(triton.next_power_of_2(self._pieces), 32),
            **EXACT,
        )
        drawn = (self._work, self._states, self._floats)
        widen_kernel[(batch,)](logits, rows, positions, *tables, *drawn, stride, self.vocab, num_warps=16, **EXACT)
        draw_kernel[(batch, self._draws)](
            logits,
            rows,
            positions,
            *tables,
            *drawn,
            self._scores,
            self._winners,
            stride,
            self.vocab,
            self._draws,
            **EXACT,
        )
        if out_logits is not None:
            self._report(logits, rows, out_logits)
        finish_kernel[(batch,)](
            rows,
            positions,
            self.records,
            self.counts,
            *drawn,
            self._scores,
            self._winners,
            out_token_ids,
            out_ok,
            out_exhausted,
            self.vocab,
            self._draws,
            DRAWS=max(triton.next_power_of_2(self._draws), 32),
        )
        unmark_kernel[(batch,)](rows, positions, self.records, self.marks, *history)

    def _report(self, logits: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        report_kernel[(logits.shape[0], self._draws)](
            logits,
            rows,
            self.records,
            self.counts,
            self.marks,
            self._work,
            self._values,
            self._tokens,
            self._states,
            self._floats,
            out,
            logits.stride(0),
            self.vocab,
            **EXACT,
        )
