"""Mirostat (Basu et al., arXiv 2007.14966): keeps the surprise of the chosen tokens near tau.

It remembers mu, which starts at 2 tau. With the surprise of a token -log2 p:

    version 1   keeps the k most likely tokens, k = (e 2^mu / (1 - N^-e))^(1/s) rounded, where s is the Zipf exponent
                estimated from the 100 most likely tokens, e = s - 1, and N the vocabulary's size
    version 2   keeps the tokens with a surprise of at most mu
    then        mu <- mu - eta (surprise of the drawn token among the kept ones - tau)

The most likely token always stays. Plans with mirostat have no other truncation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.distribution import keep_longest_prefix
from aphrodite.sampling.stages.selection import SelectionState

_ESTIMATE_FROM = 100  # tokens, as in the paper
_LN2 = math.log(2.0)


class Mirostat(Stage):
    name = "mirostat"
    rank = 2000
    parameters = ("mirostat_mode", "mirostat_tau", "mirostat_eta")
    keeps_argmax = True
    replaces_truncation = True
    selector = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.mirostat_mode == 0

    def prepare(self, params: SamplingParams, info: RowInfo) -> tuple[int, int]:
        """Length of the prompt, version."""
        return info.num_prompt, params.mirostat_mode

    def new_state(self, info: SamplerInfo) -> SelectionState:
        return SelectionState(info)

    def native_steps(self, values: Sequence[float], prepared: tuple[int, int]) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.MIROSTAT, values, numbers=True),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        _, tau, eta = values[:, :, None].unbind(1)
        state: SelectionState = context.state
        mu = state.read(context, [num_prompt for num_prompt, _ in context.prepared], 2 * tau)
        for version, truncate in ((1, _truncate_by_rank), (2, _truncate_by_surprise)):
            entries = [entry for entry, (_, mode) in enumerate(context.prepared) if mode == version]
            if len(entries) == len(logits):
                logits = truncate(logits, mu)
            elif entries:
                logits[entries] = truncate(logits[entries], mu[entries])
        state.expect(context, mu - eta * (logits.log_softmax(-1) / -_LN2 - tau))
        return logits


def _truncate_by_surprise(logits: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """Version 2. [R, vocab], [R, 1]."""
    log_probability = logits.log_softmax(-1)
    best = log_probability.amax(-1, keepdim=True)
    return logits.masked_fill_(log_probability < torch.minimum(-mu * _LN2, best), -torch.inf)


def _truncate_by_rank(logits: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """Version 1. [R, vocab], [R, 1]."""
    vocab = logits.shape[-1]
    top = logits.topk(min(_ESTIMATE_FROM, vocab), dim=-1).values.to(torch.float64)
    rank = torch.arange(1, top.shape[-1], dtype=torch.float64, device=logits.device)
    # b and t of the paper: logarithms of the ratios of neighbouring probabilities and of their ranks.
    b, t = top[:, :-1] - top[:, 1:], torch.log((rank + 1) / rank).expand(len(top), -1)
    there = top[:, 1:] > -torch.inf
    b, t = torch.where(there, b, 0.0), torch.where(there, t, 0.0)
    exponent = (b * t).sum(-1, keepdim=True) / (t * t).sum(-1, keepdim=True)
    excess = exponent - 1
    mass = torch.where(excess.abs() < 1e-9, 1 / math.log(vocab), excess / -torch.expm1(-excess * math.log(vocab)))
    k = (mass * torch.exp2(mu.to(torch.float64))) ** (1 / exponent)
    wanted = torch.nan_to_num(k, nan=1.0, posinf=vocab).clamp(1, vocab).round().to(torch.int64)[:, 0]

    def decide(ordered: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return wanted[rows], wanted[rows] <= ordered.shape[-1]

    return keep_longest_prefix(logits, logits, decide)


STAGE = Mirostat()
