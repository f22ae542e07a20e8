"""thinking_token_budget: closes the answer's reasoning once so many tokens of it are out.

The tokens of the mark that closes it (`</think>` and the like, as the chat template or `--reasoning-parser` says) are
the only ones that may come then, one after the other. The answer goes on behind it as the model likes. Bans hold all
the same: a request that bans the mark's own tokens ends with an error there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.errors import InvalidRequestError
from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.followers import mask_logits
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.reasoning import ReasoningRow
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class ThinkingBudget(Stage):
    """Where reasoning begins is seen in the prompt or in the answer's first text. Without reasoning it does nothing."""

    name = "thinking_token_budget"
    rank = 7
    parameters = ("thinking_token_budget",)
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.thinking_token_budget is None or params.reasoning is None

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> ReasoningRow:
        """The answer's state, which the sampler tells of its tokens."""
        if params.thinking_token_budget is None or params.reasoning is None:
            raise ValueError("a neutral stage is not prepared")
        if info.vocabulary is None:
            raise InvalidRequestError(
                "thinking_token_budget needs a tokenizer, and this engine has none", param="thinking_token_budget"
            )
        return ReasoningRow(params.reasoning, params.thinking_token_budget, info.vocabulary, info.num_prompt)

    def native_steps(self, values: Sequence[float], prepared: ReasoningRow) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.FORCE, data=prepared.forced),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, position, state in zip(logits, context.positions, context.prepared, strict=True):
            state.refresh(position)
            if state.words is not None:
                mask_logits(row[None], [state.words])
        return logits


STAGE = ThinkingBudget()
