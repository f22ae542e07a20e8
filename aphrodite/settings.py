"""Settings gathered from where people give them: flag, environment, YAML file and default, in this precedence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aphrodite.config import EngineConfig, ServerSettings, settings_table
from aphrodite.config_file import ModelEntry, read_config_file
from aphrodite.config_values import ENV_PREFIX, format_value, parse_value
from aphrodite.errors import ConfigError, did_you_mean

CONFIG_ENV = "APHRODITE_CONFIG"
# Variables that are no settings of a flag or file.
OTHER_ENV = {
    CONFIG_ENV: "YAML file of settings, where --config names none",
    "APHRODITE_CPU_ISA": "a lower instruction set for the native CPU library than the best: avx2 or portable",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Resolved settings.

    Attributes:
        origins: where each one that is not a default came from.
        models: the configuration file's list of models, each with settings of its own.
    """

    engine: EngineConfig
    server: ServerSettings
    origins: Mapping[str, str]
    models: tuple[ModelEntry, ...] = ()

    def shown(self, name: str) -> str:
        """A setting's value as people write it; never a secret."""
        row = settings_table()[name]
        owner = self.engine if hasattr(self.engine, name) else self.server
        return "(hidden)" if row.meta.secret else format_value(row, getattr(owner, name))


def resolve(
    flags: Mapping[str, object] | None = None,
    *,
    config_file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from flags, environment, YAML file and defaults, in this precedence.

    Args:
        flags: by setting name, text or typed; None is a flag that was not given.
        config_file: YAML file; None takes `APHRODITE_CONFIG`, if set.
        environ: None is `os.environ`. An empty variable counts as not set.

    Raises:
        ConfigError: an unknown or wrong name or value, with its origin.
    """
    environ = os.environ if environ is None else environ
    config_file = config_file or environ.get(CONFIG_ENV) or None
    rows, models = ([], ()) if config_file is None else read_config_file(config_file)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source in (rows, _from_environment(environ), _from_flags(flags or {})):
        for name, value, origin in source:
            values[name] = parse_value(settings_table()[name], value, origin)
            origins[name] = origin
    return _build(values, origins, models)


def _build(values: Mapping[str, Any], origins: Mapping[str, str], models: tuple[ModelEntry, ...]) -> Settings:
    table = settings_table()
    engine = {name: value for name, value in values.items() if table[name].owner is EngineConfig}
    server = {name: value for name, value in values.items() if table[name].owner is ServerSettings}
    return Settings(
        engine=EngineConfig(**engine), server=ServerSettings(**server), origins=dict(origins), models=models
    )


def _from_flags(flags: Mapping[str, object]) -> Iterable[tuple[str, object, str]]:
    for name, value in flags.items():
        if value is not None:
            yield name, value, settings_table()[name].flag


def _from_environment(environ: Mapping[str, str]) -> Iterable[tuple[str, object, str]]:
    known = {row.env: name for name, row in settings_table().items()}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_ENV or not value:
            continue
        if variable not in known:
            guess = did_you_mean(variable, [*known, *OTHER_ENV])
            raise ConfigError(f"environment variable {variable} is not a setting.{guess}{_orchestrator_hint(variable)}")
        if value.startswith("tcp://"):
            raise ConfigError(f"environment variable {variable} holds {value!r}.{_orchestrator_hint(variable)}")
        yield known[variable], value, f"environment variable {variable}"


def _orchestrator_hint(variable: str) -> str:
    """Kubernetes sets APHRODITE_PORT and others for a Service named aphrodite; say so where it looks like that."""
    if re.fullmatch(r"APHRODITE_(PORT|SERVICE_)\w*", variable):
        return " Kubernetes sets it for a Service named aphrodite: rename the Service or set enableServiceLinks: false."
    return ""
