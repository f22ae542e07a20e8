"""`sampler_trace` of a choice: per token, what each active stage did."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from aphrodite.core.plan import StageTrace, TokenTrace
from aphrodite.sampling.explain import why
from aphrodite.server.openai.logprobs import TokenNames


def sampler_trace(traces: Sequence[TokenTrace], names: TokenNames) -> list[dict[str, Any]]:
    """One object a token. `model` is the distribution before all stages; a rank of null is no candidate."""
    return [
        {
            "token": names.name(trace.token_id),
            "token_id": trace.token_id,
            "selection": "drawn" if trace.drawn else "argmax",
            "why": why(trace),
            "model": _standing(trace.stages[0], names),
            "stages": [_stage(before, after, names) for before, after in pairwise(trace.stages)],
        }
        for trace in traces
    ]


def _stage(before: StageTrace, after: StageTrace, names: TokenNames) -> dict[str, Any]:
    return {
        "stage": after.stage,
        "candidates_before": before.candidates,
        "rank_before": before.rank or None,
        "probability_before": before.probability,
        **_standing(after, names),
    }


def _standing(stage: StageTrace, names: TokenNames) -> dict[str, Any]:
    return {
        "candidates": stage.candidates,
        "rank": stage.rank or None,
        "probability": stage.probability,
        "top": [
            {"token": names.name(token_id), "token_id": token_id, "probability": probability}
            for token_id, probability in zip(stage.top_ids, stage.top_probabilities, strict=True)
        ],
    }
