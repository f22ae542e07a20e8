"""Samplers of other packages: stages that the entry-point group `aphrodite.samplers` names.

An entry point is a `Stage` with `rows`, its own rows of the parameter table. Every process that meets
parameters (API, engine, command line) finds the same ones, as they are installed packages: code that
whoever runs the server has chosen to trust. One that cannot be used is left out, with the reason in the
log. Looking costs some milliseconds, and only those that exist are imported.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Container
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from aphrodite.sampling.params import SamplingParams, builtin_table
from aphrodite.sampling.table import Kind, Param, ParamRow, check

if TYPE_CHECKING:
    from aphrodite.sampling.stages.base import Stage

logger = logging.getLogger(__name__)

GROUP = "aphrodite.samplers"
KINDS: tuple[Kind, ...] = ("int", "float", "bool", "choice", "ints", "strings")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Extension(NamedTuple):
    """A usable stage of another package."""

    source: str  # entry point and package, for logs and docs
    stage: Stage
    rows: tuple[ParamRow, ...]


def parameter_row(
    name: str, kind: Kind, default: Any, doc: str, *, choices: tuple[str, ...] = (), **more: Any
) -> ParamRow:
    """A row of the parameter table for an extension's `rows`.

    Args:
        kind: one of KINDS.
        doc: one line of meaning.
        more: further fields of `Param`: bounds (`ge`, `gt`, `le`, `lt`), `aliases`, `source`, `neutral`
            (by default the default) and the like.
    """
    return ParamRow(name, kind, False, default, choices, Param(doc, **{"neutral": default, **more}))


@cache
def installed_extensions() -> tuple[Extension, ...]:
    """Those that can be used, in the order of their entry points' names."""
    from importlib.metadata import entry_points

    found: list[Extension] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        source = f"{entry.name} ({entry.value}, package {entry.dist.name if entry.dist else 'unknown'})"
        try:
            found.append(_checked(source, entry.load(), found))
        except Exception as error:
            logger.warning("the sampler extension %s is left out: %s: %s", source, type(error).__name__, error)
    return tuple(found)


def _checked(source: str, stage: Any, others: list[Extension]) -> Extension:
    """The extension, if it keeps what a stage promises; raises ValueError or whatever the stage raises."""
    from aphrodite.sampling.stages.base import Stage

    if not isinstance(stage, Stage):
        raise ValueError("it is no instance of aphrodite.sampling.stages.base.Stage")
    taken = {name for row in builtin_table() for name in (row.name, *row.param.aliases)}
    names = taken | builtin_stage_modules() | {other.stage.name for other in others}
    taken |= {name for other in others for row in other.rows for name in (row.name, *row.param.aliases)}
    if not _NAME.fullmatch(stage.name) or stage.name in names:
        raise ValueError(f"the stage name {stage.name!r} is taken, or is not lower-case letters, digits and _")
    if not stage.rows:
        raise ValueError("it declares no parameters in `rows`")
    for row in stage.rows:
        _check_row(row, taken)
        taken |= {row.name, *row.param.aliases}
    plain = SamplingParams()
    if not stage.is_neutral(plain):
        raise ValueError("it would act on requests that do not set its parameters")
    if not all(isinstance(value, float) for value in stage.values(plain)):
        raise ValueError("`values` has to return floats")
    place = "" if stage.constraint or stage.selector else stage.name
    rows = tuple(row._replace(param=row.param._replace(stage=place)) for row in stage.rows)
    return Extension(source, stage, rows)


def _check_row(row: Any, taken: Container[str]) -> None:
    if not isinstance(row, ParamRow) or row.kind not in KINDS:
        raise ValueError(f"`rows` has to hold results of parameter_row() of the kinds {', '.join(KINDS)}")
    for name in (row.name, *row.param.aliases):
        if not _NAME.fullmatch(name) or name in taken:
            raise ValueError(f"the parameter name {name!r} is taken, or is not lower-case letters, digits and _")
    check(row, row.default, row.name)


def builtin_stage_modules() -> set[str]:
    """Our stages are named like their modules or parameters; modules can be listed without importing them."""
    package = importlib.import_module("aphrodite.sampling.stages")
    return {info.name for info in pkgutil.iter_modules(package.__path__)}
