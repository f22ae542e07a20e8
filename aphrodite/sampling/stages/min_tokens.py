"""min_tokens: masks the tokens that would end the answer until enough of it is out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class MinTokens(Stage):
    """Masks stop_token_ids, and the end-of-sequence tokens unless they are ignored anyway."""

    name = "min_tokens"
    rank = 20
    parameters = ("min_tokens", "stop_token_ids", "ignore_eos")
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.min_tokens <= 0

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> tuple[int, torch.Tensor]:
        """Position from which the row is free, and the token ids [M] int64 masked before it."""
        return info.num_prompt + params.min_tokens, torch.tensor(
            ending_token_ids(params, info), dtype=torch.int64, device=info.device
        )

    def native_steps(self, values: Sequence[float], prepared: tuple[int, torch.Tensor]) -> Sequence[NativeStep]:
        free_from, token_ids = prepared
        return (NativeStep(NativeOp.MASK, (0, free_from), token_ids.tolist()),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, position, (free_from, token_ids) in zip(logits, context.positions, context.prepared, strict=True):
            if position < free_from:
                row.index_fill_(0, token_ids, -torch.inf)
        return logits


def ending_token_ids(params: SamplingParams, info: RowInfo) -> list[int]:
    """Token ids that end the answer, ascending."""
    eos = frozenset[int]() if params.ignore_eos else info.eos_token_ids
    return sorted(eos.union(params.stop_token_ids))


STAGE = MinTokens()
