"""Log-probabilities of given tokens, their ranks, and the most likely tokens, without sorting.

One pass over the logits gives the maximum of every chunk, the normalizer and the rank; then one block a row takes the
most likely tokens one after the other, each from the chunk with the largest maximum of what is left. Definitions are
those of sampling/logprobs.py. Cost: one read of the logits; 1 us or so for each of the most likely tokens, however many
rows there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import direct_launch
from aphrodite.kernels.triton.sampling_draw import NO_TOKEN
from aphrodite.kernels.triton.sampling_read import log

MAX_TOP = 64  # longer lists are cheaper to sort
CHUNK = tl.constexpr(128)  # logits
_PIECE = tl.constexpr(8192)  # logits of one program
_PART = tl.constexpr(1024)  # of which so many are looked at at a time


class TopLogprobs(NamedTuple):
    """For W tokens."""

    logprobs: torch.Tensor  # [W] float32
    ranks: torch.Tensor  # [W] int32, 1 = most likely
    top_ids: torch.Tensor  # [W, k] int32
    top_logprobs: torch.Tensor  # [W, k] float32, descending; -inf where fewer than k have a probability above 0


@direct_launch
@triton.jit
def weigh_kernel(
    logits_ptr,
    entries_ptr,
    tokens_ptr,
    tops_ptr,
    pieces_ptr,
    before_ptr,
    logits_stride,
    vocab,
    num_chunks,
    num_pieces,
):
    """Of each piece: its chunks' maxima, its maximum and mass relative to it, and how many come before the token."""
    number, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits = logits_ptr + tl.load(entries_ptr + number).to(tl.int64) * logits_stride
    token = tl.load(tokens_ptr + number)
    level = tl.load(logits + token).to(tl.float32)
    tops, mass = tl.full([_PART], -float("inf"), tl.float32), tl.zeros([_PART], tl.float32)
    before = tl.zeros([_PART], tl.int32)
    begin = piece * _PIECE
    end = tl.minimum(begin + _PIECE, vocab)
    while begin < end:
        ids = begin + tl.arange(0, _PART)
        x = tl.load(logits + ids, ids < end, other=-float("inf")).to(tl.float32)
        here = tl.max(tl.reshape(x, [_PART // CHUNK, CHUNK]), axis=1)
        chunk = begin // CHUNK + tl.arange(0, _PART // CHUNK)
        tl.store(tops_ptr + number * num_chunks + chunk, here, chunk < num_chunks)
        higher = tl.maximum(tops, x)
        there = higher > -float("inf")
        mass = tl.where(there, mass * tl.exp(tops - higher) + tl.exp(x - higher), 0.0)
        tops = higher
        before += ((ids < end) & ((x > level) | ((x == level) & (ids < token)))).to(tl.int32)
        begin += _PART
    top = tl.max(tops, axis=0)
    out = number * num_pieces + piece
    mass = tl.where(tops > -float("inf"), mass * tl.exp(tops - top), 0.0)
    tl.store(pieces_ptr + 2 * out, top)
    tl.store(pieces_ptr + 2 * out + 1, tl.sum(mass, axis=0))
    tl.store(before_ptr + out, tl.sum(before, axis=0))


@direct_launch
@triton.jit(do_not_specialize=["k"])
def take_kernel(
    logits_ptr,
    entries_ptr,
    tokens_ptr,
    tops_ptr,
    pieces_ptr,
    before_ptr,
    logprobs_ptr,
    ranks_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    logits_stride,
    vocab,
    num_chunks,
    num_pieces,
    k,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + tl.load(entries_ptr + number).to(tl.int64) * logits_stride
    piece = tl.arange(0, PIECES)
    at, mask = number * num_pieces + piece, piece < num_pieces
    own = tl.load(pieces_ptr + 2 * at, mask, other=-float("inf"))
    top = tl.max(own, axis=0)
    masses = tl.load(pieces_ptr + 2 * at + 1, mask, other=0.0)
    normalizer = log(tl.sum(tl.where(own > -float("inf"), masses * tl.exp(own - top), 0.0), axis=0))
    level = tl.load(logits + tl.load(tokens_ptr + number)).to(tl.float32)
    tl.store(logprobs_ptr + number, (level - top) - normalizer)
    tl.store(ranks_ptr + number, tl.sum(tl.load(before_ptr + at, mask, other=0), axis=0) + 1)
    chunk = tl.arange(0, CHUNKS)
    tops = tl.load(tops_ptr + number * num_chunks + chunk, chunk < num_chunks, other=-float("inf"))
    lasts = tl.full([CHUNKS], -1, tl.int32)  # of each chunk: the last token taken that is as likely as its next
    taken = 0
    while taken < k:
        value = tl.max(tops, axis=0)
        place = tl.min(tl.where(tops == value, chunk, CHUNKS - 1), axis=0)
        last = tl.max(tl.where(chunk == place, lasts, -1), axis=0)
        ids = place * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + ids, ids < vocab, other=-float("inf")).to(tl.float32)
        token = tl.min(tl.where((x == value) & (ids > last), ids, NO_TOKEN), axis=0)
        there = (value > -float("inf")) & (token != NO_TOKEN)  # not so behind the last that is possible
        tl.store(top_ids_ptr + number * k + taken, tl.where(there, token, 0))
        tl.store(top_logprobs_ptr + number * k + taken, tl.where(there, (value - top) - normalizer, -float("inf")))
        rest = tl.max(tl.where((x < value) | ((x == value) & (ids > token)), x, -float("inf")), axis=0)
        tops = tl.where(chunk == place, rest, tops)
        lasts = tl.where(chunk == place, tl.where(rest == value, token, -1), lasts)
        taken += 1


def top_logprobs(logits: torch.Tensor, entries: torch.Tensor, token_ids: torch.Tensor, k: int) -> TopLogprobs:
    """Under softmax(logits), without waiting for the device.

    Args:
        logits: [L, vocab] of any floating type, contiguous rows, finite or -inf.
        entries: [W] integers, the rows of `logits` to report on. token_ids: [W] integers, a token of each.
        k: most likely tokens to list, up to MAX_TOP and vocab.
    """
    count, vocab, device = len(entries), logits.shape[1], logits.device
    chunks, pieces = triton.cdiv(vocab, CHUNK.value), triton.cdiv(vocab, _PIECE.value)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    tops, masses, before = empty(count, chunks), empty(count, pieces, 2), empty(count, pieces, dtype=torch.int32)
    results = TopLogprobs(
        empty(count), empty(count, dtype=torch.int32), empty(count, k, dtype=torch.int32), empty(count, k)
    )
    inputs, parts = (logits, entries, token_ids), (tops, masses, before)
    sizes = (logits.stride(0), vocab, chunks, pieces)
    weigh_kernel[(count, pieces)](*inputs, *parts, *sizes)
    take_kernel[(count,)](
        *(*inputs, *parts, *results, *sizes, k),
        CHUNKS=max(triton.next_power_of_2(chunks), 32),
        PIECES=max(triton.next_power_of_2(pieces), 32),
    )
    return results
