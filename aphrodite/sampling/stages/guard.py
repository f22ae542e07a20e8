"""A fence around stages of other packages: what they raise ends the requests that use them, and no others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, RowState, SamplerInfo, Stage, StageContext

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")
_NO_VALUES: tuple[float, ...] = ()
_FAILED = object()  # what `prepare` returns for a row that the stage could not take


class GuardedStage(Stage):
    """A stage whose failures turn the logits of its rows into NaN, which ends their requests with an error.

    Each stage's first failure goes to the log with its trace.
    """

    def __init__(self, stage: Stage) -> None:
        self.guarded = stage
        self._width = len(stage.values(SamplingParams()))
        self._logged = False
        for attribute in Stage.__annotations__:
            setattr(self, attribute, getattr(stage, attribute))

    def is_neutral(self, params: SamplingParams) -> bool:
        return self._call(self.guarded.is_neutral, params, otherwise=False)

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        values = self._call(self.guarded.values, params, otherwise=_NO_VALUES)
        return values if len(values) == self._width else (0.0,) * self._width

    def prepare(self, params: SamplingParams, info: RowInfo) -> Any:
        if len(self._call(self.guarded.values, params, otherwise=_NO_VALUES)) != self._width:
            return _FAILED
        return self._call(self.guarded.prepare, params, info, otherwise=_FAILED)

    def native_steps(self, values: Sequence[float], prepared: Any) -> None:
        return None

    def new_state(self, info: SamplerInfo) -> RowState | None:
        state = self._call(self.guarded.new_state, info, otherwise=_FAILED)
        return None if state is None else _GuardedState(self, state)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        state = context.state
        if isinstance(state, _GuardedState):
            failed = [number for number, row in enumerate(context.rows) if not state.works(row)]
            context = replace(context, state=state.inner)
        else:
            failed = []
        failed += [number for number, prepared in enumerate(context.prepared) if prepared is _FAILED]
        if not failed:
            return self._apply(logits, values, context)
        good = [number for number in range(len(context.rows)) if number not in set(failed)]
        after = logits.fill_(float("nan")) if not good else logits.clone().fill_(float("nan"))
        if good:
            after[good] = self._apply(logits[good], values[good], _take(context, good))
        return after

    def _apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        after = self._call(self.guarded.apply, logits.clone(), values, context, otherwise=None)
        if after is not None and (after.shape, after.dtype) == (logits.shape, logits.dtype):
            return after
        if after is not None:
            self.failed(ValueError(f"apply returned {tuple(after.shape)} {after.dtype}"))
        return logits.fill_(float("nan"))

    def _call(self, function: Callable[..., T], *arguments: Any, otherwise: T) -> T:
        try:
            return function(*arguments)
        except Exception as error:
            self.failed(error)
            return otherwise

    def failed(self, error: Exception) -> None:
        """Log the stage's first failure."""
        if not self._logged:
            self._logged = True
            logger.error("the sampler extension %s failed; requests that use it end with an error", self.name,
                         exc_info=error)  # fmt: skip


class _GuardedState:
    """An extension's row state. A row for which it raises has failed until another request takes the row."""

    def __init__(self, stage: GuardedStage, inner: Any) -> None:
        self.inner = inner
        self._stage = stage
        self._failed: set[int] = set()

    def works(self, row: int) -> bool:
        return self.inner is not _FAILED and row not in self._failed

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        self._failed.discard(row)
        self._try([row], lambda: self.inner.start(row, prompt_token_ids))

    def end(self, row: int) -> None:
        self._try([row], lambda: self.inner.end(row))

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        self._try(rows, lambda: self.inner.observe(rows, token_ids))

    def rewind(self, row: int, position: int) -> None:
        self._try([row], lambda: self.inner.rewind(row, position))

    def _try(self, rows: Sequence[int], action: Callable[[], None]) -> None:
        if self.inner is _FAILED or not self._failed.isdisjoint(rows):
            self._failed.update(rows)
            return
        try:
            action()
        except Exception as error:
            self._failed.update(rows)
            self._stage.failed(error)


def _take(context: StageContext, entries: Sequence[int]) -> StageContext:
    return replace(
        context,
        rows=[context.rows[entry] for entry in entries],
        index=context.index[list(entries)],
        positions=[context.positions[entry] for entry in entries],
        prepared=[context.prepared[entry] for entry in entries],
        seeds=context.seeds[list(entries)],
    )
