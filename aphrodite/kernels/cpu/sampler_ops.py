"""The operations of the native sampler (`native/sampling_stages.h`), for stages to name; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple


class NativeOp(IntEnum):
    """An operation of the native sampler (`SamplerOpCode` of native/sampling.h) and what its step gives.

    Numbers are those of the torch stage of the same name, in the order of its `values`, unless said here.
    """

    MASK = 1  # values: first position, end position; ids
    ALLOW = 2  # ids, ascending: all others are masked
    BIAS = 3  # ids, amounts to add
    PENALTIES = 4
    TEMPERATURE = 5
    TOP_K = 6
    TOP_P = 7
    MIN_P = 8
    BAD_WORDS = 9  # ids: each word's length, then its tokens
    NO_REPEAT_NGRAM = 10
    DRY = 11  # data: DryRow of native/history.h
    DYNAMIC_TEMPERATURE = 12
    TOP_NSIGMA = 13
    TOP_A = 14
    TAIL_FREE = 15
    ETA_CUTOFF = 16
    EPSILON_CUTOFF = 17
    TYPICAL_P = 18
    QUADRATIC = 19
    XTC = 20  # values: probability, logarithm of the threshold; ids, ascending: never removed
    SKEW = 21
    RANGED_PENALTIES = 22  # values: repetition, frequency, presence, slope, range, decay
    MIROSTAT = 23  # values: version, tau, eta; numbers
    ADAPTIVE_P = 24  # numbers
    TOKEN_MASK = 25  # data: words whose bits say which tokens are kept, read anew at each token
    FORCE = 26  # data: [1], the only token that is kept, -1: no such token; read anew at each token


class NativeStep(NamedTuple):
    """One operation of a row's program, and what it reads beside its values."""

    op: NativeOp
    values: Sequence[float] = ()
    token_ids: Sequence[int] = ()
    amounts: Sequence[float] = ()
    data: Any = None  # a numpy array with a structure of the operation's own
    numbers: bool = False  # it keeps a number for each position of the row
