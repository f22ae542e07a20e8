"""Log-probabilities of chosen and most likely tokens: computed on the device, turned into plain data later.

Ranks and lists order tokens by (logit descending, token id ascending), as the stages do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from aphrodite.core.plan import TokenLogprobs
from aphrodite.kernels.cpu.sampling import NativeSampling


class LogprobTensors(NamedTuple):
    """For W tokens; K is the longest list that any of them wants."""

    token_ids: torch.Tensor  # [W] int64
    logprobs: torch.Tensor  # [W] float32
    ranks: torch.Tensor  # [W] integers, 1 = most likely
    top_ids: torch.Tensor  # [W, K] integers
    top_logprobs: torch.Tensor  # [W, K] float32, descending

    def entry(self, number: int, wanted: int) -> TokenLogprobs:
        """Plain data of one token with `wanted` top tokens, fewer if fewer have a probability above 0."""
        top_logprobs = [value for value in self.top_logprobs[number, :wanted].tolist() if math.isfinite(value)]
        return TokenLogprobs(
            int(self.token_ids[number]),
            float(self.logprobs[number]),
            int(self.ranks[number]),
            self.top_ids[number, : len(top_logprobs)].tolist(),
            top_logprobs,
        )


def join_logprobs(parts: Sequence[LogprobTensors]) -> LogprobTensors:
    """One table of the parts' tokens, in their order; shorter lists are filled up with logprobs of -inf."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.top_ids.shape[1] for part in parts)
    missing = [(0, width - part.top_ids.shape[1]) for part in parts]
    return LogprobTensors(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
        torch.cat([pad(part.top_ids, fill) for part, fill in zip(parts, missing, strict=True)]),
        torch.cat([pad(part.top_logprobs, fill, value=-torch.inf) for part, fill in zip(parts, missing, strict=True)]),
    )


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, native: NativeSampling | None = None
) -> LogprobTensors:
    """Log-probabilities under softmax(logits), in the native library where one is given.

    Args:
        logits: [W, vocab] float32, finite or -inf.
        token_ids: [W] int64, the tokens to report.
        k: most likely tokens to list.
    """
    k = min(k, logits.shape[-1])
    if native is not None:
        return LogprobTensors(token_ids, *native.logprobs(logits, token_ids, k))
    chosen = logits.gather(-1, token_ids[:, None])
    normalizer = logits.logsumexp(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    before = (logits > chosen) | ((logits == chosen) & (ids < token_ids[:, None]))
    top_ids = _top_ids(logits, k)
    return LogprobTensors(
        token_ids,
        (chosen - normalizer)[:, 0],
        before.sum(-1) + 1,
        top_ids,
        logits.gather(-1, top_ids) - normalizer,
    )


def _top_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[W, k] int64. `topk` breaks ties as it likes, so it only finds which logits are in the list."""
    if k == 0:
        return logits.new_empty((len(logits), 0), dtype=torch.int64)
    lowest = logits.topk(k, dim=-1).values[:, -1:]
    above = logits > lowest
    level = logits == lowest
    kept = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    ids = kept.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.gather(-1, logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)
