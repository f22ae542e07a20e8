"""A plan before and after it is handed to the runner, with the requests that its rows stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from aphrodite.core.plan import AdapterPlacement, RowRewind, RowStart, RowStep, StepPlan
from aphrodite.core.request import Request


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    step_id: int
    budget: int
    starts: list[RowStart] = field(default_factory=list)
    steps: list[RowStep] = field(default_factory=list)
    rewinds: list[RowRewind] = field(default_factory=list)
    adapters: list[AdapterPlacement] = field(default_factory=list)
    requests: list[tuple[Request, int, int]] = field(default_factory=list)  # beside `steps`; see `InFlight`


class InFlight(NamedTuple):
    """A plan whose result has not arrived. Requests are held here themselves, not by row: nothing else is needed
    for a late result to find its own request, or to find that it has ended."""

    plan: StepPlan
    # Beside `plan.steps`: whose it is, and its `num_preemptions` and `num_rewinds` then.
    requests: list[tuple[Request, int, int]]
