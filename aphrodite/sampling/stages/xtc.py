"""XTC, "exclude top choices" (p-e-w, oobabooga/text-generation-webui#6335).

With probability xtc_probability at each token: of the tokens with p >= xtc_threshold all but the least likely
are removed (the last of them by logit descending, then token id). The coin is the request's own random number
of the position (`Use.XTC`, index 0). With xtc_protect special tokens and those that hold a newline are counted
but never removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.random import Use, uniforms_at
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class XTC(Stage):
    name = "xtc"
    rank = 1400
    sampler_id = 13
    parameters = ("xtc_probability", "xtc_threshold", "xtc_protect")
    greedy_skips = True
    truncation = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.xtc_probability == 0

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return params.xtc_probability, math.log(params.xtc_threshold) if params.xtc_threshold > 0 else -math.inf

    def prepare(self, params: SamplingParams, info: RowInfo) -> torch.Tensor | None:
        """Token ids [P] int64 that are never removed, or None."""
        if not params.xtc_protect:
            return None
        protected = info.eos_token_ids
        if info.vocabulary is not None:
            protected |= info.vocabulary.special_ids | info.vocabulary.newline_ids
        return torch.tensor(sorted(protected), dtype=torch.int64, device=info.device)

    def native_steps(self, values: Sequence[float], prepared: torch.Tensor | None) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.XTC, values, () if prepared is None else prepared.tolist()),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        probability, threshold = values[:, :, None].unbind(1)
        positions = torch.tensor(context.positions, dtype=torch.int64).to(logits.device, non_blocking=True)
        coin = uniforms_at(context.seeds, positions, Use.XTC, torch.zeros_like(positions))[:, None]
        top = (logits.log_softmax(-1) >= threshold) & (logits > -torch.inf)
        least = logits.masked_fill(~top, torch.inf).amin(-1, keepdim=True)
        token_ids = torch.arange(logits.shape[-1], device=logits.device)
        spared = torch.where(top & (logits == least), token_ids, -1).amax(-1, keepdim=True)
        removed = top & (coin < probability) & (token_ids != spared)
        for row, protected in zip(removed, context.prepared, strict=True):
            if protected is not None:
                row.index_fill_(0, protected, False)
        return logits.masked_fill_(removed, -torch.inf)


STAGE = XTC()
