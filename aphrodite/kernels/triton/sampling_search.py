"""Exact cuts without sorting: the first entries by (key descending, index ascending) whose weights reach a target.

A search over the ordered bits of float32 keys: each round counts the weight above eight thresholds at once, so 32 bits
take 11 reads of the keys. Equal keys at the cut are told apart by a second search over their indices. Over a vocabulary
three to five rounds by the distance from the top come first, after which a list holds what is undecided.
"""

from __future__ import annotations

import triton
import triton.language as tl

WAYS = tl.constexpr(8)
WAYS_BLOCK = tl.constexpr(1024)  # entries weighed at once by all ways
LIST_BLOCK = tl.constexpr(2048)  # entries listed at once
BY_VALUE = tl.constexpr(0)  # keys are the values, every one weighs 1
BY_MASS = tl.constexpr(1)  # keys are the values, weights their probabilities
BY_TYPICALITY = tl.constexpr(2)  # keys are -|offset - value|, weights probabilities
_ROUNDS = tl.constexpr(5)  # that narrow down by distance


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
def _load_row(values, begin, count, BLOCK: tl.constexpr):
    at = begin + tl.arange(0, BLOCK)[None, :]
    return tl.load(values + at, at < count, other=-float("inf"))


@triton.jit
def _sum_ways(total):
    return tl.sum(total.to(tl.float64), axis=1)


@triton.jit
def _weights_from(values, count, top, offset, thresholds, kind, BLOCK: tl.constexpr):
    """[WAYS] float64: the weight of keys that are at least each of `thresholds` [WAYS] int32."""
    total = tl.zeros([WAYS, BLOCK], tl.float32)
    begin = 0
    ahead = _load_row(values, begin, count, BLOCK)
    while begin < count:
        at, x = begin + tl.arange(0, BLOCK)[None, :], ahead
        begin += BLOCK
        ahead = _load_row(values, begin, count, BLOCK)
        weight = _weight_of(x, top, at < count, kind)
        total += tl.where(key_of(x, top, offset, kind) >= thresholds[:, None], weight, 0.0)
    return _sum_ways(total)


@triton.jit
def _weights_near(values, count, top, offset, thresholds, kind, BLOCK: tl.constexpr):
    """[WAYS] float64: the weight of what is at least each of `thresholds` [WAYS] float32 as `distance_of` sees it."""
    total = tl.zeros([WAYS, BLOCK], tl.float32)
    begin = 0
    ahead = _load_row(values, begin, count, BLOCK)
    while begin < count:
        at, x = begin + tl.arange(0, BLOCK)[None, :], ahead
        begin += BLOCK
        ahead = _load_row(values, begin, count, BLOCK)
        weight = _weight_of(x, top, at < count, kind)
        total += tl.where(_distance_of(x, top, offset, kind) >= thresholds[:, None], weight, 0.0)
    return _sum_ways(total)


@triton.jit
def _weight_up_to(values, count, top, offset, cut, last, kind, BLOCK: tl.constexpr):
    """[WAYS] float64: the weight of keys above `cut`, and of those equal to it up to the index `last` [WAYS]."""
    total = tl.zeros([WAYS, BLOCK], tl.float32)
    begin = 0
    ahead = _load_row(values, begin, count, BLOCK)
    while begin < count:
        at, x = begin + tl.arange(0, BLOCK)[None, :], ahead
        begin += BLOCK
        ahead = _load_row(values, begin, count, BLOCK)
        weight = _weight_of(x, top, at < count, kind)
        key = key_of(x, top, offset, kind)
        within = (key > cut) | ((key == cut) & (at <= last[:, None]))
        total += tl.where(within, weight, 0.0)
    return _sum_ways(total)


@triton.jit
def find_cut(values, count, top, offset, target, kind, low, high, BLOCK: tl.constexpr):
    """The last entry that stays: its ordered key, and its index among equal keys.

    Args:
        values: [count] float32, -inf where masked. `top`: their maximum, finite.
        offset: for BY_TYPICALITY.
        target: float64, the weight to reach; where all do not, all stay.
        low, high: int64, keys that the cut's lies between: at least `low`, below `high`.
    """
    ways = tl.arange(0, WAYS).to(tl.int64)
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
def lowest_key():
    """Of all that is left."""
    return ordered(tl.full([], -float("inf"), tl.float32)).to(tl.int64) + 1


@triton.jit
def highest_key(top):
    """One more than that of any."""
    return ordered(tl.maximum(top, 0.0)).to(tl.int64) + 1


@triton.jit
def find_cut_wide(
    values, count, top, offset, target, kind, lowest, spare, indices, BLOCK: tl.constexpr, CAPACITY: tl.constexpr
):
    """`find_cut` for many entries: narrows down by distance from the top, then searches the few that are left.

    Args:
        lowest: a distance that the cut is probably not below.
        spare, indices: memory for [CAPACITY] float32 and int32.
    """
    low, high, above = lowest, tl.full([], 1e-3, tl.float32), tl.full([], 0.0, tl.float64)
    rounds, found = tl.full([], 0, tl.int32), tl.full([], CAPACITY + 1, tl.int32)
    ways = tl.arange(0, WAYS)
    while (rounds < _ROUNDS) & (found > CAPACITY):
        step = tl.where(rounds == 0, -low, high - low) / WAYS
        tried = low + step * ways
        weights = _weights_near(values, count, top, offset, tried, kind, WAYS_BLOCK)
        met = tl.sum((weights >= target).to(tl.int32), axis=0)  # those of the lowest thresholds
        missed = tried > tl.max(tl.where(weights >= target, tried, -float("inf")), axis=0)
        above = tl.maximum(above, tl.max(tl.where(missed, weights, 0.0), axis=0))
        high = tl.minimum(high, tl.min(tl.where(missed, tried, float("inf")), axis=0))
        low = tl.max(tl.where(weights >= target, tried, -float("inf")), axis=0)
        rounds = tl.where(met == 0, _ROUNDS, rounds + 1)
        if (met > 0) & (rounds >= _ROUNDS - 2):
            found = _between(values, count, top, offset, kind, low, high, spare, indices, LIST_BLOCK, CAPACITY)
    tl.debug_barrier()
    listed = found <= CAPACITY
    if listed:
        values, count, target = spare, found, target - above
    cut, last = find_cut(values, count, top, offset, target, kind, lowest_key(), highest_key(top), WAYS_BLOCK)
    if listed:
        last = tl.load(indices + last)
    return cut, last


@triton.jit
def _distance_of(x, top, offset, kind):
    """In the order of `key_of`, but not as fine: 0 at most."""
    return tl.where(kind == BY_TYPICALITY, -tl.abs((x - top) + offset), x - top)


@triton.jit
def _between(values, count, top, offset, kind, low, high, spare, indices, BLOCK: tl.constexpr, CAPACITY: tl.constexpr):
    """Lists what is at least `low` and below `high` in the order of the indices; its number, or more than CAPACITY."""
    found = tl.full([], 0, tl.int32)
    begin = 0
    tl.debug_barrier()
    while (begin < count) & (found <= CAPACITY):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(values + at, at < count, other=-float("inf"))
        distance = _distance_of(x, top, offset, kind)
        taken = (distance >= low) & (distance < high) & (x > -float("inf"))
        place = found + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(spare + place, x, taken & (place < CAPACITY))
        tl.store(indices + place, at, taken & (place < CAPACITY))
        found += tl.sum(taken.to(tl.int32), axis=0)
        begin += BLOCK
    return found


@triton.jit
def survives(x, at, top, offset, cut, last, kind):
    """Whether values `x`, the entries `at`, stay behind the cut that `find_cut` found."""
    key = key_of(x, top, offset, kind)
    return (key > cut) | ((key == cut) & (at <= last))


@triton.jit
def kth_largest(values, k):
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
