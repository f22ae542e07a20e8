"""Top-k: keep the k first tokens by (logit descending, token id ascending)."""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class TopK(Stage):
    """Exactly k survive, equal logits or not, so top_k 1 is the greedy choice."""

    name = "top_k"
    rank = 600
    sampler_id = 0
    parameters = ("top_k",)
    native = NativeOp.TOP_K
    keeps_argmax = True
    truncation = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.top_k <= 0

    def prepare(self, params: SamplingParams, info: RowInfo) -> int:
        return min(params.top_k, info.vocab_size)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        widest: int = max(context.prepared)
        k = values.to(torch.int64).clamp_(max=logits.shape[-1])
        lowest = logits.topk(widest, dim=-1).values.gather(-1, k - 1)
        above = logits > lowest
        level = logits == lowest
        room = k - above.sum(-1, keepdim=True)
        return logits.masked_fill_(~(above | (level & (level.cumsum(-1) <= room))), -torch.inf)


STAGE = TopK()
