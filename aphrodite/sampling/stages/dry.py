"""DRY ("don't repeat yourself"): penalizes tokens that would continue a repetition (llama.cpp's definition).

    window      the last `dry_range` tokens (0: all)
    unbroken    the window's tokens after the last sequence breaker; a match is at most so long
    match(t)    the longest match of the window's last tokens with tokens before an earlier t in the window
    penalty(t)  multiplier * base^(match(t) - allowed_length) if match(t) >= allowed_length,
                none for a token that contains a breaker

The exponent ends where base^exponent would leave float32, the penalty at 1e6. A window of no more than
allowed_length tokens is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aphrodite.kernels.cpu import history as native_history
from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.breakers import Breakers, compile_breakers
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.matches import MatchLengths

MAX_PENALTY = 1e6  # beyond any logit, and small enough for stages that cube logits
_LOG_FLOAT32_MAX = 88.7228391
_ALL = 2**31 - 1


class DryRow(NamedTuple):
    """A row's parameters; `record` [] DRY_ROW is what the native library reads, and points into `breakers`."""

    breakers: Breakers
    multiplier: float
    base: float
    max_exponent: int
    allowed_length: int
    window: int
    record: npt.NDArray[np.void]


class Dry(Stage):
    name = "dry"
    rank = 100
    sampler_id = 7
    parameters = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_range", "dry_sequence_breakers")

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.dry_multiplier == 0

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> DryRow:
        """Compiles the breakers, once for all requests that have the same.

        Raises:
            ValueError: there are breakers and no vocabulary to find them in.
        """
        if params.dry_sequence_breakers and info.vocabulary is None:
            raise ValueError("DRY's sequence breakers are texts: they need a tokenizer's vocabulary")
        if info.vocabulary is None:
            breakers = Breakers.none(info.vocab_size)
        else:
            breakers = compile_breakers(params.dry_sequence_breakers, info.vocabulary)
        base = params.dry_base
        max_exponent = int(_LOG_FLOAT32_MAX / math.log(base)) if base > 1.000001 else _ALL
        window = params.dry_range if params.dry_range > 0 else _ALL
        numbers = (params.dry_multiplier, base, max_exponent, params.dry_allowed_length, window)
        record = np.array((breakers.descriptor.ctypes.data, *numbers), dtype=native_history.DRY_ROW)
        return DryRow(breakers, *numbers, record)

    def new_state(self, info: SamplerInfo) -> MatchLengths | None:
        """None where the native library reads the history itself."""
        return None if info.native else MatchLengths(info)

    def native_steps(self, values: Sequence[float], prepared: DryRow) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.DRY, data=prepared.record),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        rows: list[DryRow] = list(context.prepared)
        native = native_history.load() if context.state is None else None
        if native is not None:
            table = np.array([row.record for row in rows])
            native.dry_penalties(logits, context.token_ids, context.rows, context.positions, table)
            return logits
        return logits - _penalties(logits.shape[1], rows, context)


def _penalties(vocab_size: int, rows: list[DryRow], context: StageContext) -> torch.Tensor:
    """[R, vocab] float32."""
    state: MatchLengths = context.state
    history, lengths = state.at(context)
    device = history.device
    integers = [
        (position, max(position - row.window, 0), row.allowed_length, row.max_exponent)
        for row, position in zip(rows, context.positions, strict=True)
    ]
    ends, begins, allowed, exponents = torch.tensor(integers, dtype=torch.int64, device=device)[:, :, None].unbind(1)
    columns = torch.arange(history.shape[1], device=device)
    single = torch.zeros_like(history, dtype=torch.bool)
    unbroken = torch.empty_like(ends)
    for group in _same_breakers(rows):
        tokens, window = history[group], (columns >= begins[group]) & (columns < ends[group])
        single[group], unbroken[group] = _unbroken(rows[group[0]].breakers, tokens, window, begins[group], ends[group])
    matches = torch.minimum(torch.minimum(lengths, unbroken), columns - begins + 1)[:, :-1]
    counted = (columns[:-1] >= begins) & (columns[:-1] < ends - 1) & (matches >= allowed) & ~single[:, 1:]
    counted &= (ends - begins > allowed) & (unbroken >= allowed)
    longest = torch.full((len(rows), vocab_size), -1, dtype=torch.int64, device=device)
    longest.scatter_reduce_(1, history[:, 1:].long(), torch.where(counted, matches, -1), "amax")
    floats = torch.tensor([(row.multiplier, row.base) for row in rows], dtype=torch.float64, device=device)
    multiplier, base = floats[:, :, None].unbind(1)
    penalty = multiplier * base ** torch.minimum(longest - allowed, exponents)
    return torch.where(longest >= 0, penalty.clamp(max=MAX_PENALTY), 0.0).float()


def _same_breakers(rows: list[DryRow]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for entry, row in enumerate(rows):
        groups.setdefault(id(row.breakers), []).append(entry)
    return list(groups.values())


def _unbroken(
    breakers: Breakers, tokens: torch.Tensor, window: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, n]: which `tokens` are breakers by themselves. [R, 1]: how many of each `window` follow the last breaker."""
    table = breakers.by_tail(tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    single = table.single[tokens.long()]
    longest_tail = torch.where(single, 0, -1)
    for tail, heads in table.tails:
        found = heads[tokens.long()] & (columns + len(tail) < ends)
        for offset, token in enumerate(tail, 1):
            shifted = torch.roll(tokens, -offset, dims=1)
            found &= shifted == token
        longest_tail = torch.where(found, len(tail), longest_tail)
    head = torch.where(window & (longest_tail >= 0), columns, -1).amax(1, keepdim=True)
    tail_length = longest_tail.gather(1, head.clamp(min=0))
    return single, torch.where(head >= 0, ends - 1 - head - tail_length, ends - begins)


STAGE = Dry()
