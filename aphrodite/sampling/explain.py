"""What a trace says in words: why a token could be chosen."""

from __future__ import annotations

from itertools import pairwise

from aphrodite.core.plan import StageTrace, TokenTrace


def percent(probability: float) -> str:
    """A probability for people, with three significant digits: `41.2 %`, `0.00312 %`."""
    share = 100.0 * probability
    return "100 %" if share >= 99.95 else f"{share:.3g} %" if share >= 0.0001 or not share else "<0.0001 %"


def why(trace: TokenTrace) -> str:
    """One sentence: how the token was chosen, from what, and what the stages did to its chances."""
    first, last = trace.stages[0], trace.stages[-1]
    if last.candidates == 1:
        how = "The only candidate left"
    elif trace.drawn:
        count = f"{last.candidates:,} candidates"
        how = f"Drawn with {percent(last.probability)} as number {last.rank:,} of {count}"
    else:
        how = f"The most likely of {last.candidates:,} candidates, with {percent(last.probability)}"
    if len(trace.stages) == 1:
        return f"{how}; no stage was active."
    return f"{how}; the model gave it {percent(first.probability)} as number {first.rank:,}{_turning_point(trace)}."


def _turning_point(trace: TokenTrace) -> str:
    """The stage that took away what had stood before the token, if one did."""
    best: tuple[int, StageTrace] | None = None
    for before, after in pairwise(trace.stages):
        gain = before.rank - after.rank
        if after.rank and gain > 0 and (best is None or gain > best[0]):
            best = gain, after
    if best is None:
        return ""
    gain, stage = best
    return f", and {stage.stage} moved it up by {gain:,}"
