"""Plans as the sampling kernels run them (kernels/triton/sampling_record.py): plain data, no device.

What the kernels do not do, so that such plans go through the torch stages: stages without a native operation; tail-free
sampling, skew and mirostat 1, which order all tokens; penalties by range; mirostat together with adaptive-p; DRY that
compares more than MAX_MATCH tokens; more than MAX_BIASES biases or MAX_OPS operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.kernels.triton import sampling_record as r
from aphrodite.sampling.breakers import Breakers
from aphrodite.sampling.plan import SamplingPlan
from aphrodite.sampling.stages.dry import MAX_PENALTY, DryRow

_EDITS = {NativeOp.PENALTIES, NativeOp.DRY, NativeOp.NO_REPEAT_NGRAM, NativeOp.TEMPERATURE}
_CONSTRAINTS = {NativeOp.BIAS, NativeOp.MASK, NativeOp.ALLOW, NativeOp.BAD_WORDS}
_DECLINED = {NativeOp.TAIL_FREE, NativeOp.SKEW, NativeOp.RANGED_PENALTIES}
_BY_SUMS = {
    *(NativeOp.TOP_P, NativeOp.TOP_NSIGMA, NativeOp.TOP_A, NativeOp.ETA_CUTOFF, NativeOp.EPSILON_CUTOFF),
    *(NativeOp.MIROSTAT, NativeOp.DYNAMIC_TEMPERATURE),
}
_FOREVER = 2**31 - 1


class Declined(NamedTuple):
    """Why a plan is not run by the kernels."""

    reason: str


class Op(NamedTuple):
    """One operation; what `data`, `first` and `second` are depends on its code (`encode`)."""

    code: int
    values: Sequence[float] = ()
    first: int = 0
    second: int = 0
    length: int = 0
    data: npt.NDArray[Any] | None = None
    numbers: bool = False  # it keeps a number for each position of the row
    breakers: Breakers | None = None
    window: int = 0


class RowProgram(NamedTuple):
    """A plan's record, but for addresses.

    Attributes:
        ops: `num_ops` operations of the program, of which `edits` look at single tokens, then lists of masks.
        flags: of sampling_record.py.
        marks: of tokens, for as long as the request lives.
        only_allowed: tokens without a mark are banned.
        amounts: of the biases that marks point to.
    """

    ops: list[Op]
    num_ops: int
    edits: int
    flags: int
    marks: dict[int, int]
    only_allowed: bool
    amounts: list[float]


class _Constraints:
    """Biases and masks of a row: marks, and lists that depend on the position."""

    def __init__(self) -> None:
        self.marks: dict[int, int] = {}
        self.only_allowed = False
        self.amounts: list[float] = []
        self.lists: list[Op] = []
        self._banned: set[int] = set()
        self._biased: dict[int, float] = {}
        self._allowed: set[int] | None = None

    def add(self, step: NativeStep) -> None:
        if step.op == NativeOp.BIAS:
            self._biased.update(zip(step.token_ids, step.amounts, strict=True))
        elif step.op == NativeOp.ALLOW:
            self._allowed = set(step.token_ids)
        elif step.op == NativeOp.BAD_WORDS:
            self.lists.append(_bad_words(step.token_ids))
        elif step.values[0] <= 0 and step.values[1] == math.inf:
            self._banned.update(step.token_ids)
        elif step.token_ids and step.values[0] < step.values[1]:
            ids = np.array(step.token_ids, np.int32)
            first, end = int(step.values[0]), int(min(step.values[1], _FOREVER))
            self.lists.append(Op(r.MASK.value, first=first, second=end, length=len(ids), data=ids))

    def close(self, protected: Iterable[int]) -> Declined | None:
        """Make the marks."""
        if len(self._biased) > r.MAX_BIASES:
            return Declined(f"more than {r.MAX_BIASES} tokens have a bias")
        if self._allowed is not None:
            self.only_allowed = True
            self.marks.update(dict.fromkeys(self._allowed, 0))
        usable = [token for token in self._biased if self._allowed is None or token in self._allowed]
        for token in usable:
            self.amounts.append(self._biased[token])
            self._set(token, len(self.amounts) << r.BIAS_SHIFT.value)
        for token in self._banned:
            self._set(token, r.BANNED.value)
        for token in protected:
            self._set(token, r.PROTECTED.value)
        return None

    def _set(self, token: int, bits: int) -> None:
        unmarked = r.BANNED.value if self.only_allowed else 0
        self.marks[token] = self.marks.get(token, unmarked) | bits

    @property
    def any(self) -> bool:
        return bool(self._banned or self._biased or self.only_allowed or self.lists)


def encode(plan: SamplingPlan, vocab: int) -> RowProgram | Declined:
    """The plan as the kernels run it, or why they do not."""
    constraints, ops = _Constraints(), list[Op]()
    protected: Sequence[int] = ()
    for step in plan.steps.values():
        native_steps = step.stage.native_steps(step.values, step.prepared)
        if native_steps is None:
            return Declined(f"{step.stage.name} exists as torch operations alone")
        for native in native_steps:
            if native.op in (NativeOp.TOKEN_MASK, NativeOp.FORCE):
                continue  # the logits come with it
            if native.op in _CONSTRAINTS:
                constraints.add(native)
                continue
            op = _operation(native, step.prepared)
            if isinstance(op, Declined):
                return op
            ops.append(op)
            if native.op == NativeOp.XTC:
                protected = native.token_ids
    codes = {op.code for op in ops}
    if {NativeOp.MIROSTAT, NativeOp.ADAPTIVE_P} <= codes:
        return Declined("mirostat and adaptive_p together")
    if (failed := constraints.close(token for token in protected if token < vocab)) is not None:
        return failed
    if len(ops) + len(constraints.lists) >= r.MAX_OPS:
        return Declined(f"it has more than {r.MAX_OPS - 1} operations")
    edits = next((number for number, op in enumerate(ops) if op.code not in _EDITS), len(ops))
    return RowProgram(
        [*ops, *constraints.lists],
        len(ops),
        edits,
        _flags(ops, edits, constraints),
        constraints.marks,
        constraints.only_allowed,
        constraints.amounts,
    )


def _flags(ops: Sequence[Op], edits: int, constraints: _Constraints) -> int:
    codes = {op.code for op in ops}
    flags = r.COUNTS.value if NativeOp.PENALTIES in codes else 0
    if constraints.any:
        flags |= r.MARKED.value
    if constraints.lists or codes & {NativeOp.DRY, NativeOp.NO_REPEAT_NGRAM}:
        flags |= r.HISTORY.value
    if edits < len(ops) and ops[edits].code in _BY_SUMS:
        flags |= r.STATS.value
    return flags


def _operation(step: NativeStep, prepared: Any) -> Op | Declined:
    if step.op in _DECLINED:
        return Declined(f"{step.op.name.lower()} has no kernel")
    if step.op == NativeOp.DRY:
        return _dry(prepared)
    if step.op == NativeOp.NO_REPEAT_NGRAM:
        return Op(step.op, first=int(step.values[0]))
    if step.op == NativeOp.MIROSTAT and step.values[0] == 1:
        return Declined("mirostat 1 has no kernel")
    return Op(step.op, values=step.values, numbers=step.numbers)


def _dry(row: DryRow) -> Op | Declined:
    """first: the allowed length; second: the longest match that counts; data: the penalty by match - allowed length."""
    if row.base < 1:
        return Declined("dry_base is below 1")
    penalties = [min(row.multiplier, MAX_PENALTY)]
    if row.base > 1:
        while len(penalties) <= min(row.max_exponent, r.MAX_MATCH) and penalties[-1] < MAX_PENALTY:
            penalties.append(min(row.multiplier * row.base ** len(penalties), MAX_PENALTY))
        if len(penalties) <= row.max_exponent and penalties[-1] < MAX_PENALTY:
            return Declined(f"dry_base is so small that more than {r.MAX_MATCH} tokens count")
    longest = row.allowed_length + len(penalties) - 1
    if longest > r.MAX_MATCH:
        return Declined(f"dry_allowed_length is more than {r.MAX_MATCH} tokens")
    table = np.array(penalties, np.float32)
    return Op(
        NativeOp.DRY,
        first=row.allowed_length,
        second=longest,
        data=table,
        breakers=row.breakers,
        window=row.window,
    )


def _bad_words(flat: Sequence[int]) -> Op:
    """first: tokens of the longest word; data: words [count, first], padded with -1 at their front."""
    words, at = list[Sequence[int]](), 0
    while at < len(flat):
        words.append(flat[at + 1 : at + 1 + flat[at]])
        at += 1 + flat[at]
    width = max(len(word) for word in words)
    table = np.full((len(words), width), -1, np.int32)
    for line, word in zip(table, words, strict=True):
        line[width - len(word) :] = word
    return Op(NativeOp.BAD_WORDS, first=width, length=len(words), data=table)
