"""Finds the stages: every module of this package that has a `STAGE`, and those of installed extensions."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import aphrodite.sampling.stages as package
from aphrodite.sampling.extensions import installed_extensions
from aphrodite.sampling.stages.base import Stage
from aphrodite.sampling.stages.guard import GuardedStage


@cache
def all_stages() -> tuple[Stage, ...]:
    """All stages in the default order; an extension's stands behind ours of the same rank.

    Raises:
        ValueError: two of our stages share a name or a rank.
    """
    found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    modules = (importlib.import_module(info.name) for info in found)
    stages = [module.STAGE for module in modules if hasattr(module, "STAGE")]
    for attribute in ("name", "rank"):
        if len({getattr(stage, attribute) for stage in stages}) != len(stages):
            raise ValueError(f"two sampling stages share a {attribute}: {sorted(stage.name for stage in stages)}")
    extensions = [GuardedStage(extension.stage) for extension in installed_extensions()]
    return tuple(sorted((*stages, *extensions), key=lambda stage: stage.rank))
