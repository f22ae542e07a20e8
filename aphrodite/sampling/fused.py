"""The fast path: whole plans of the common stages in one native call a row.

It computes what the stages compute (`stages/` in the default order) and takes the same draw. A plan that
it does not know goes through the stages; the choice never depends on the rest of the batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch

from aphrodite.kernels.cpu import library
from aphrodite.kernels.cpu import sampling as native_sampling
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.plan import DEFAULT_ORDER, SamplingPlan
from aphrodite.sampling.stages.base import RowState, SamplerInfo
from aphrodite.sampling.stages.penalties import TokenCounts

logger = logging.getLogger(__name__)

STAGES = frozenset({"logit_bias", "min_tokens", "penalties", "temperature", "top_k", "top_p", "min_p"})


class FusedSampler:
    """Parameters of the rows that the native library samples, and the call that does it."""

    def __init__(self, native: native_sampling.NativeSampling, info: SamplerInfo) -> None:
        self.native = native
        self._table = np.zeros(info.num_rows, native_sampling.ROW)
        self._buffers: dict[int, list[np.ndarray]] = {}  # what a row of the table points to

    @staticmethod
    def open(info: SamplerInfo) -> FusedSampler | None:
        """The fast path for this device, or None with the reason in the log."""
        native = native_sampling.load() if info.device.type == "cpu" else None
        if native is None:
            reason = library.unavailable_reason() if info.device.type == "cpu" else f"it has none for {info.device}"
            logger.info("sampling runs as torch operations, not in the native library: %s", reason)
            return None
        return FusedSampler(native, info)

    def accepts(self, plan: SamplingPlan) -> bool:
        """Whether all of the plan's stages are known here, in the known order."""
        return plan.steps.keys() <= STAGES and plan.order == DEFAULT_ORDER

    def start(self, row: int, params: SamplingParams, plan: SamplingPlan, seed: int, counts: RowState | None) -> None:
        """Fill the row's parameters; `counts` is the penalties' state where the plan has penalties."""
        entry = self._table[row]
        steps = plan.steps
        entry["seed"] = seed
        entry["temperature"] = 0.0 if plan.greedy else params.temperature
        entry["top_k"] = steps["top_k"].prepared if "top_k" in steps else 0
        entry["top_p"] = params.top_p if "top_p" in steps else 1.0
        entry["log_min_p"] = steps["min_p"].values[0] if "min_p" in steps else -math.inf
        entry["repetition"] = params.repetition_penalty
        entry["frequency"] = params.frequency_penalty
        entry["presence"] = params.presence_penalty
        entry["counts_slot"] = counts.slot(row) if isinstance(counts, TokenCounts) and "penalties" in steps else -1
        entry["mask_dropped"] = plan.logprobs is not None and plan.processed_logprobs
        bias_ids, bias = steps["logit_bias"].prepared if "logit_bias" in steps else (_EMPTY, _EMPTY)
        free_from, ending_ids = steps["min_tokens"].prepared if "min_tokens" in steps else (0, _EMPTY)
        buffers = [
            bias_ids.numpy().astype(np.int32),
            bias.numpy().astype(np.float32),
            ending_ids.numpy().astype(np.int32),
        ]
        self._buffers[row] = buffers
        entry["free_from"], entry["bias_count"], entry["ending_count"] = free_from, len(bias_ids), len(ending_ids)
        for name, buffer in zip(("bias_ids", "bias", "ending_ids"), buffers, strict=True):
            entry[name] = buffer.ctypes.data

    def end(self, row: int) -> None:
        self._buffers.pop(row, None)

    def sample(
        self,
        logits: torch.Tensor,
        entries: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        counts: RowState | None,
        token_ids: torch.Tensor,
        ok: torch.Tensor,
    ) -> None:
        """Sample `entries` of `logits` [L, vocab], whose rows are `rows`; writes token_ids and ok there."""
        table = counts.table if isinstance(counts, TokenCounts) else None
        self.native.sample(logits, entries, rows, positions, self._table, table, token_ids, ok)


_EMPTY = torch.empty(0)
