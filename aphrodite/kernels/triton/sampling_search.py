"""Exact cuts without sorting: the first entries by (key descending, index ascending) whose weights reach a target.

A search over the ordered bits of float32 keys: each round counts the weight above eight thresholds at once, so 32 bits
take 11 reads of the keys. Equal keys at the cut are told apart by a second search over their indices.
"""

from __future__ import annotations

import triton
import triton.language as tl

WAYS = tl.constexpr(8)
BY_VALUE = tl.constexpr(0)  # keys are the values, every one weighs 1
BY_MASS = tl.constexpr(1)  # keys are the values, weights their probabilities
BY_TYPICALITY = tl.constexpr(2)  # keys are -|offset - value|, weights probabilities


@triton.jit
def ordered(x):
    """int32 in the order of float32; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(x, top, offset, kind):
    """The ordered key of values `x`; that of masked ones is less than all others."""
    typicality = tl.where(x > -float("inf"), -tl.abs((x - top) + offset), -float("inf"))
    return ordered(tl.where(kind == BY_TYPICALITY, typicality, x))


@triton.jit
def _weight_of(x, top, there, kind):
    weight = tl.where(kind == BY_VALUE, 1.0, tl.exp(x - top))
    return tl.where(there & (x > -float("inf")), weight, 0.0)


@triton.jit
def _weights_from(values, count, top, offset, thresholds, kind, BLOCK: tl.constexpr):
    """[WAYS] float64: the weight of keys that are at least each of `thresholds` [WAYS] int32."""
    total = tl.zeros([WAYS], tl.float64)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        weight = _weight_of(x, top, at < count, kind)
        above = key_of(x, top, offset, kind)[:, None] >= thresholds[None, :]
        total += tl.sum(tl.where(above, weight[:, None], 0.0), axis=0).to(tl.float64)
        begin += BLOCK
    return total


@triton.jit
def _weight_up_to(values, count, top, offset, cut, last, kind, BLOCK: tl.constexpr):
    """[WAYS] float64: the weight of keys above `cut`, and of those equal to it up to the index `last` [WAYS]."""
    total = tl.zeros([WAYS], tl.float64)
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        weight = _weight_of(x, top, at < count, kind)
        key = key_of(x, top, offset, kind)
        within = (key > cut)[:, None] | ((key == cut)[:, None] & (at[:, None] <= last[None, :]))
        total += tl.sum(tl.where(within, weight[:, None], 0.0), axis=0).to(tl.float64)
        begin += BLOCK
    return total


@triton.jit
def find_cut(values, count, top, offset, target, kind, BLOCK: tl.constexpr):
    """The last entry that stays: its ordered key, and its index among equal keys.

    Args:
        values: [count] float32, -inf where masked. `top`: their maximum, finite.
        offset: for BY_TYPICALITY.
        target: float64, the weight to reach; where all do not, all stay.
    """
    ways = tl.arange(0, WAYS).to(tl.int64)
    low = ordered(tl.full([], -float("inf"), tl.float32)).to(tl.int64) + 1  # all that is left
    high = ordered(tl.maximum(top, 0.0)).to(tl.int64) + 1
    while high - low > 1:
        step = tl.cdiv(high - low, WAYS)
        thresholds = low + step * (ways + 1)
        tried = tl.minimum(thresholds, high).to(tl.int32)
        reached = _weights_from(values, count, top, offset, tried, kind, BLOCK) >= target
        met = tl.sum((reached & (thresholds < high)).to(tl.int64), axis=0)
        high = tl.minimum(high, low + step * (met + 1))
        low = low + step * met
    cut = low.to(tl.int32)
    below, last = tl.full([], -1, tl.int64), (count - 1).to(tl.int64)
    while last - below > 1:
        step = tl.cdiv(last - below, WAYS)
        indices = below + step * (ways + 1)
        tried = tl.minimum(indices, last).to(tl.int32)
        reached = _weight_up_to(values, count, top, offset, cut, tried, kind, BLOCK) >= target
        missed = tl.sum((~reached & (indices < last)).to(tl.int64), axis=0)
        last = tl.minimum(last, below + step * (missed + 1))
        below = below + step * missed
    return cut, last.to(tl.int32)


@triton.jit
def keep(values, count, top, offset, cut, last, kind, BLOCK: tl.constexpr):
    """Mask what `find_cut` leaves out; returns the largest of what stays."""
    left = tl.full([], -float("inf"), tl.float32)
    tl.debug_barrier()
    begin = 0
    while begin < count:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        key = key_of(x, top, offset, kind)
        x = tl.where((key > cut) | ((key == cut) & (at <= last)), x, -float("inf"))
        tl.store(values + at, x, at < count)
        left = tl.maximum(left, tl.max(x, axis=0))
        begin += BLOCK
    tl.debug_barrier()
    return left


@triton.jit
def kth_largest(values, k, N: tl.constexpr):
    """The `k`-th largest of `values` [N] float32 in registers, or -inf where fewer are left."""
    keys = ordered(values)
    ways = tl.arange(0, WAYS).to(tl.int64)
    low = ordered(tl.full([], -float("inf"), tl.float32)).to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64) + 1
    while high - low > 1:
        step = tl.cdiv(high - low, WAYS)
        thresholds = low + step * (ways + 1)
        tried = tl.minimum(thresholds, high).to(tl.int32)
        counts = tl.sum((keys[:, None] >= tried[None, :]).to(tl.int32), axis=0)
        met = tl.sum(((counts >= k) & (thresholds < high)).to(tl.int64), axis=0)
        high = tl.minimum(high, low + step * (met + 1))
        low = low + step * met
    cut = low.to(tl.int32)
    return (cut ^ ((cut >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
