"""The definition of sampling: one row at a time, in float64, sharing nothing with the engine.

Besides the result it says how close the nearest decision was, so that a comparison in float32 can tell a
wrong answer from a rounding difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_WORDS = 2**32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers or arrays of uint64, written from the paper's description."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right // _WORDS) ^ b ^ k, right % _WORDS, (left // _WORDS) ^ d ^ m, left % _WORDS
        k, m = (k + 0x9E3779B9) % _WORDS, (m + 0xBB67AE85) % _WORDS
    return a, b, c, d


def gumbel(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """float64 noise of token ids."""
    groups, place = np.unique(tokens // 4, return_inverse=True)
    words = np.stack(philox((position, 0, groups.astype(np.uint64), 0), (seed % _WORDS, seed // _WORDS)))
    uniform = ((words[tokens % 4, place] >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23
    return -np.log(-np.log(uniform))


@dataclass
class Row:
    """A request in the reference's terms; every parameter is explicit."""

    prompt: list[int]
    output: list[int]
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    min_tokens: int = 0
    ending: tuple[int, ...] = ()


@dataclass
class Outcome:
    """`logits` after all stages (float64, -inf = masked), survivors, the token, and the closest decision."""

    logits: np.ndarray
    survivors: set[int]
    token: int | None
    margin: float  # smallest distance of any threshold or of the draw's runner-up, in logits


def sample(raw: np.ndarray, row: Row) -> Outcome:
    """What one row's float32 `raw` logits [vocab] lead to."""
    logits = raw.astype(np.float64)
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return Outcome(logits, set(), None, math.inf)
    _constrain_and_penalize(logits, row)
    margin = math.inf
    if row.temperature >= 1e-5:
        logits /= row.temperature
        margin = _truncate(logits, row)
    survivors = {int(token) for token in np.flatnonzero(np.isfinite(logits))}
    if not survivors:
        return Outcome(logits, survivors, None, math.inf)
    position = len(row.prompt) + len(row.output)
    if row.temperature < 1e-5:
        order = sorted(survivors, key=lambda t: (-logits[t], t))
        return Outcome(logits, survivors, order[0], _gap(logits, order, 1))
    tokens = np.array(sorted(survivors))
    scores = dict(zip(tokens.tolist(), logits[tokens] + gumbel(row.seed, position, tokens), strict=True))
    ranking = sorted(scores, key=lambda t: (-scores[t], t))
    if len(ranking) > 1:
        margin = min(margin, scores[ranking[0]] - scores[ranking[1]])
    return Outcome(logits, survivors, ranking[0], margin)


def _constrain_and_penalize(logits: np.ndarray, row: Row) -> None:
    for token, bias in (row.logit_bias or {}).items():
        logits[token] += bias
    if len(row.output) < row.min_tokens:
        logits[list(row.ending)] = -math.inf
    for token in set(row.prompt) | set(row.output):
        logits[token] = (
            logits[token] / row.repetition_penalty if logits[token] > 0 else logits[token] * row.repetition_penalty
        )
    for token in set(row.output):
        logits[token] -= row.frequency_penalty * row.output.count(token) + row.presence_penalty


def _gap(logits: np.ndarray, order: list[int], count: int) -> float:
    """Distance between the last of `count` kept tokens and the first dropped one; ties are decided by token id."""
    if not 0 < count < len(order):
        return math.inf
    gap = logits[order[count - 1]] - logits[order[count]]
    return float(gap) if gap > 0 else math.inf


def _truncate(logits: np.ndarray, row: Row) -> float:
    """Mask by top_k, top_p, min_p in turn; returns the distance of the closest decision in logits."""
    margin = math.inf
    order = sorted((t for t in range(len(logits)) if math.isfinite(logits[t])), key=lambda t: (-logits[t], t))
    if row.top_k > 0:
        margin = _gap(logits, order, row.top_k)
        order = order[: row.top_k]
    if row.top_p < 1 and order:
        weights = np.exp(logits[order] - logits[order[0]])
        reached = np.cumsum(weights) / weights.sum()
        count = int(np.searchsorted(reached, row.top_p, side="left")) + 1
        margin = min(margin, float(np.abs(reached[:-1] - row.top_p).min(initial=math.inf)))
        margin = min(margin, _gap(logits, order, count))
        order = order[:count]
    if row.min_p > 0 and order:
        threshold = logits[order[0]] + math.log(row.min_p)
        margin = min(margin, *(abs(logits[t] - threshold) for t in order))
        order = [t for t in order if logits[t] >= threshold]
    kept = np.zeros(len(logits), bool)
    kept[order] = True
    logits[~kept] = -math.inf
    return margin
