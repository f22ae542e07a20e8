"""What each stage did to one row: candidates, the most likely tokens, and where the chosen token stood.

A traced row is sampled alone and by stages, so the work (a copy of its logits a stage) is only ever there
where somebody asked for it. The token is the one that the row gets untraced.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from aphrodite.core.plan import StageTrace, TokenTrace
from aphrodite.kernels.cpu.sampling import NativeSampling
from aphrodite.sampling.logprobs import LogprobTensors, gather_logprobs

BEFORE_STAGES = "model"  # the first entry of a trace: the model's own distribution
TOP_TOKENS = 10


class TraceTensors(NamedTuple):
    """One token's trace, still on the device: S stages, the model's own distribution first."""

    stages: list[str]
    candidates: torch.Tensor  # [S] integers
    table: LogprobTensors  # of the chosen token and the most likely ones after each stage
    drawn: bool

    def entry(self) -> TokenTrace:
        """The trace as plain data; waits for the device."""
        stages = []
        for number, (stage, candidates) in enumerate(zip(self.stages, self.candidates.tolist(), strict=True)):
            row = self.table.entry(number, TOP_TOKENS)
            possible = row.logprob > -math.inf
            stages.append(
                StageTrace(
                    stage,
                    candidates,
                    row.rank if possible else 0,
                    math.exp(row.logprob),
                    row.top_ids,
                    [math.exp(logprob) for logprob in row.top_logprobs],
                )
            )
        return TokenTrace(int(self.table.token_ids[0]), self.drawn, stages)


class StageTracer:
    """Follows one row through its stages.

    Args:
        logits: [1, vocab] float32, as the model gave them.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self._stages: list[str] = []
        self._logits: list[torch.Tensor] = []
        self.after(BEFORE_STAGES, logits)

    def after(self, stage: str, logits: torch.Tensor) -> None:
        """The row's logits after a stage: [1, vocab], which the next one may overwrite."""
        self._stages.append(stage)
        self._logits.append(logits.clone())

    def finish(self, token_id: torch.Tensor, *, drawn: bool, native: NativeSampling | None) -> TraceTensors:
        """The trace, given the chosen token [1] and whether it was drawn or is the most likely one."""
        logits = torch.cat(self._logits)
        chosen = token_id.to(torch.int64).expand(len(logits)).contiguous()
        table = gather_logprobs(logits, chosen, TOP_TOKENS, native)
        return TraceTensors(self._stages, (logits > -torch.inf).sum(-1), table, drawn)
