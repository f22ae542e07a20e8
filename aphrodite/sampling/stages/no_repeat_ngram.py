"""no_repeat_ngram_size: no sequence of n tokens comes twice in prompt and answer (as in transformers)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu import history as native_history
from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.matches import MatchLengths


class NoRepeatNgram(Stage):
    """Masks each token that followed an earlier occurrence of the last n - 1 tokens."""

    name = "no_repeat_ngram"
    rank = 300
    sampler_id = 8
    parameters = ("no_repeat_ngram_size",)
    can_empty = True

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> int:
        return params.no_repeat_ngram_size

    def new_state(self, info: SamplerInfo) -> MatchLengths | None:
        """None where the native library reads the history itself."""
        return None if info.native else MatchLengths(info)

    def native_steps(self, values: Sequence[float], prepared: int) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.NO_REPEAT_NGRAM, (prepared,)),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        native = native_history.load() if context.state is None else None
        if native is not None:
            native.ngram_bans(logits, context.token_ids, context.rows, context.positions, context.prepared)
            return logits
        state: MatchLengths = context.state
        history, lengths = state.at(context)
        needed = torch.tensor(context.prepared, dtype=torch.int64, device=logits.device)[:, None] - 1
        ends = torch.tensor(context.positions, dtype=torch.int64, device=logits.device)[:, None]
        columns = torch.arange(history.shape[1], device=logits.device)
        banned = torch.zeros_like(history, dtype=torch.bool)
        banned[:, 1:] = lengths[:, :-1] >= needed
        banned[:, 0] = needed[:, 0] == 0  # no token is needed before it
        banned &= columns < ends
        repeats = torch.zeros_like(logits).scatter_add_(1, history.long(), banned.to(logits.dtype))
        return logits.masked_fill_(repeats > 0, -torch.inf)


STAGE = NoRepeatNgram()
