"""Marks of one step: what a row's history and position say about single tokens (DRY, n-grams, bad words, bans).

One program a row reads the row's history from the device and marks tokens; the one that settles the row takes the marks
back after the draw.
Cost: one read of the history for each of DRY and n-grams, and of what repeats (at most MAX_MATCH tokens deep), whatever
the vocabulary. sampling/stages has the definitions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import direct_launch, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.sampling_read import ints_at, op_at

BLOCK = tl.constexpr(1024)


@direct_launch
@triton.jit
def mark_kernel(
    rows_ptr, positions_ptr, records_ptr, marks_ptr, history_ptr, history_stride, vocab, num_rows, PDL: tl.constexpr
):
    launch_dependents(PDL)
    wait_for_producer(PDL)
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    if row >= num_rows:
        return
    record = records_ptr + row * r.RECORD
    if (tl.load(record + r.ACTIVE) == 0) | ((tl.load(record + r.FLAGS) & r.HISTORY) == 0):
        return
    position = tl.load(positions_ptr + entry)
    history, marks = history_ptr + row * history_stride, marks_ptr + row * vocab
    num_ops = tl.load(record + r.OPS)
    index = 0
    while index < num_ops:  # first, for it compares whole marks
        op = op_at(record, index)
        if tl.load(op + r.CODE) == r.DRY:
            _dry(op, history, position, marks, vocab)
        index += 1
    num_ops = tl.load(record + r.ALL)
    index = 0
    while index < num_ops:
        tl.debug_barrier()  # the one before may have marked the same tokens
        op = op_at(record, index)
        code = tl.load(op + r.CODE)
        if code == r.NO_REPEAT_NGRAM:
            _repeats(tl.load(op + r.FIRST), history, position, marks)
        elif code == r.MASK:
            if (position >= tl.load(op + r.FIRST)) & (position < tl.load(op + r.SECOND)):
                _mark_list(ints_at(op + r.POINTER), tl.load(op + r.COUNT), marks, r.BARRED_MARK, -1)
        elif code == r.BAD_WORDS:
            _bad_words(op, history, position, tl.load(record + r.NUM_PROMPT), marks)
        index += 1
    tl.debug_barrier()
    if position == tl.load(record + r.BARRED_AT):
        _mark_list(ints_at(record + r.BARRED), tl.load(record + r.BARRED_COUNT), marks, r.BARRED_MARK, -1)


@triton.jit
def unmark(record, position, marks, history):
    """Take back what `mark_kernel` marked for the row at this position."""
    reads_history = 0
    num_ops = tl.load(record + r.ALL)
    index = 0
    while index < num_ops:
        op = op_at(record, index)
        code = tl.load(op + r.CODE)
        if code == r.MASK:
            _mark_list(ints_at(op + r.POINTER), tl.load(op + r.COUNT), marks, 0, r.KEPT)
        elif code == r.BAD_WORDS:
            width = tl.load(op + r.FIRST)
            words = ints_at(op + r.POINTER)
            num_words = tl.load(op + r.COUNT)
            begin = 0
            while begin < num_words:
                word = begin + tl.arange(0, BLOCK)
                _set_marks(words + word * width + width - 1, word < num_words, marks, 0, r.KEPT)
                begin += BLOCK
        elif (code == r.DRY) | (code == r.NO_REPEAT_NGRAM):
            reads_history = 1
        index += 1
    if reads_history != 0:
        _mark_list(history, position, marks, 0, r.KEPT)
    _mark_list(ints_at(record + r.BARRED), tl.load(record + r.BARRED_COUNT), marks, 0, r.KEPT)


@triton.jit
def _set_marks(tokens, mask, marks, bits, kept):
    """Keep the bits `kept` of the tokens' marks and set `bits`; tokens that come twice get the same."""
    token = tl.load(tokens, mask, other=0)
    mark = tl.load(marks + token, mask, other=0)
    tl.store(marks + token, (mark & kept) | bits, mask)


@triton.jit
def _mark_list(tokens, count, marks, bits, kept):
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        _set_marks(tokens + at, at < count, marks, bits, kept)
        begin += BLOCK


@triton.jit
def _match_lengths(history, at, inside, end, limits, ceiling):
    """[BLOCK] How many tokens up to and including positions `at` equal those up to `end`; at most limits, ceiling."""
    length = tl.zeros_like(at)
    going = inside & (limits > 0)
    rounds = 0
    going = going & (tl.load(history + at, inside, other=-1) == tl.load(history + end))
    while (rounds < ceiling) & (tl.max(going.to(tl.int32), axis=0) > 0):
        length += going.to(tl.int32)
        rounds += 1
        going = going & (length < limits) & (at >= length)
        earlier = tl.load(history + at - length, going, other=-1)
        going = going & (earlier == tl.load(history + tl.maximum(end - rounds, 0)))
    return length


@triton.jit
def _repeats(size, history, position, marks):
    """Marks every token that followed an earlier occurrence of the last `size` - 1 tokens."""
    needed = size - 1
    if position >= size:
        begin = 0
        while begin < position:
            nexts = begin + tl.arange(0, BLOCK)  # the tokens that may be banned
            at = nexts - 1
            inside = (nexts < position) & (at >= needed - 1)
            length = _match_lengths(history, at, inside & (at >= 0), position - 1, tl.zeros_like(at) + needed, needed)
            token = tl.load(history + nexts, inside, other=0)
            tl.atomic_or(marks + token, r.REPEATS, inside & (length >= needed))
            begin += BLOCK


@triton.jit
def _bad_words(op, history, position, num_prompt, marks):
    """Bars the last token of each word whose others end the answer. Words are padded with -1 at their front."""
    width = tl.load(op + r.FIRST)
    count = tl.load(op + r.COUNT)
    words = ints_at(op + r.POINTER)
    begin = 0
    while begin < count:
        word = begin + tl.arange(0, BLOCK)
        there = word < count
        complete = there
        back = 1
        while back < width:
            token = tl.load(words + word * width + width - 1 - back, there, other=-1)
            at = position - back
            written = tl.where(at >= num_prompt, tl.load(history + tl.maximum(at, 0)), -1)
            complete = complete & ((token < 0) | (token == written))
            back += 1
        tl.atomic_or(marks + tl.load(words + word * width + width - 1, there, other=0), r.BARRED_MARK, complete)
        begin += BLOCK


@triton.jit
def _dry(op, history, position, marks, vocab):
    """Marks each token with one more than the longest match that it would continue.

    Its integers are the allowed length and the longest match that counts. In place of values it has the window, a
    pointer to its breakers (words 2 and 3) and how many heads and tails those have.
    """
    allowed, ceiling = tl.load(op + r.FIRST), tl.load(op + r.SECOND)
    begin = position - tl.minimum(position, tl.load(op + r.VALUES))
    breakers = ints_at(op + r.VALUES + 2)
    if position - begin > allowed:
        unbroken = _unbroken(op, breakers, history, begin, position, vocab)
        if unbroken >= allowed:
            first = begin
            while first < position - 1:
                at = first + tl.arange(0, BLOCK)
                inside = at < position - 1
                limits = tl.minimum(tl.minimum(at - begin + 1, unbroken), ceiling)
                length = _match_lengths(history, at, inside, position - 1, limits, ceiling)
                token = tl.load(history + at + 1, inside, other=0)
                single = (tl.load(breakers + token, inside, other=1) & 1) != 0
                counted = inside & (length >= allowed) & ~single
                kept = tl.load(marks + token, counted, other=0) & r.KEPT
                tl.atomic_max(marks + token, kept | (length + 1), counted)
                first += BLOCK


@triton.jit
def _unbroken(op, breakers, history, begin, end, vocab):
    """Tokens of [begin, end) behind the last sequence breaker, all of them if there is none.

    `breakers`: a word for each token of the vocabulary (bit 0: it contains a breaker; above it one more than its place
    among the heads), then where each head's tails begin, where each tail begins, and the tails' tokens.
    """
    heads, tails = tl.load(op + r.VALUES + 4), tl.load(op + r.VALUES + 5)
    first_tail = breakers + vocab
    tail_start = first_tail + heads + 1
    tail_tokens = tail_start + tails + 1
    unbroken = end - begin
    stop = end
    while stop > begin:
        at = stop - 1 - tl.arange(0, BLOCK)
        inside = at >= begin
        word = tl.load(breakers + tl.load(history + at, inside, other=0), inside, other=0)
        tail = tl.where((word & 1) != 0, 0, -1)
        head = word >> 1
        if tl.max(head, axis=0) > 0:
            tail = _longest_tails(tail, head, first_tail, tail_start, tail_tokens, history, at, end)
        last = tl.max(tl.where(inside & (tail >= 0), at, -1), axis=0)
        if last >= 0:
            unbroken = end - 1 - last - tl.max(tl.where(at == last, tail, -1), axis=0)
            stop = begin
        else:
            stop = stop - BLOCK
    return unbroken


@triton.jit
def _longest_tails(tail, head, first_tail, tail_start, tail_tokens, history, at, end):
    """[BLOCK] `tail`, or the length of the longest tail of a position's head that follows it before `end`."""
    is_head = head > 0
    number = tl.load(first_tail + head - 1, is_head, other=0)
    stop = tl.load(first_tail + head, is_head, other=0)
    while tl.max((number < stop).to(tl.int32), axis=0) > 0:
        there = number < stop
        start = tl.load(tail_start + number, there, other=0)
        length = tl.load(tail_start + number + 1, there, other=0) - start
        equal = there & (length < end - at) & (length > tail)
        offset = 0
        while offset < tl.max(tl.where(equal, length, 0), axis=0):
            compared = equal & (offset < length)
            wanted = tl.load(tail_tokens + start + offset, compared, other=0)
            equal = equal & (~compared | (wanted == tl.load(history + at + 1 + offset, compared, other=-1)))
            offset += 1
        tail = tl.where(equal, length, tail)
        number += 1
    return tail
