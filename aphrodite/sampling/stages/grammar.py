"""grammar: only tokens stay that can continue the answer as `grammar` and its aliases describe it.

A JSON schema, a regular expression, a list of texts or rules in GBNF or Lark. Tokens that end the answer are allowed
exactly where it may end. Where it must end, it does so by itself, whatever `min_tokens` and `ignore_eos` say. `oneOf`
of a JSON schema is taken for `anyOf`. Answers that `max_tokens` cuts short are only a beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.followers import mask_logits
from aphrodite.sampling.grammar import GrammarRow, compiler_of
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext
from aphrodite.sampling.stages.min_tokens import ending_token_ids


class GrammarStage(Stage):
    """It comes first of all, so that the others choose among what is allowed."""

    name = "grammar"
    rank = 5
    parameters = ("grammar", "stop_token_ids", "ignore_eos")
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.grammar is None

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> GrammarRow:
        """The answer's state, which the sampler tells of its tokens."""
        assert params.grammar is not None
        endings = ending_token_ids(params, info)
        return compiler_of(info.vocabulary).follow(params.grammar, info.num_prompt, endings)

    def native_steps(self, values: Sequence[float], prepared: GrammarRow) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.TOKEN_MASK, data=prepared.words),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, position in zip(context.prepared, context.positions, strict=True):
            row.refresh(position)
        return mask_logits(logits, [row.words for row in context.prepared])


STAGE = GrammarStage()
