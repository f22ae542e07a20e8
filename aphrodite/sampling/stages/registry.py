"""Finds the stages: every module of this package that has a `STAGE`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import aphrodite.sampling.stages as package
from aphrodite.sampling.stages.base import Stage


@cache
def all_stages() -> tuple[Stage, ...]:
    """All stages in the default order.

    Raises:
        ValueError: two stages share a name or a rank.
    """
    found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    modules = (importlib.import_module(info.name) for info in found)
    stages = [module.STAGE for module in modules if hasattr(module, "STAGE")]
    for attribute in ("name", "rank"):
        if len({getattr(stage, attribute) for stage in stages}) != len(stages):
            raise ValueError(f"two sampling stages share a {attribute}: {sorted(stage.name for stage in stages)}")
    return tuple(sorted(stages, key=lambda stage: stage.rank))
