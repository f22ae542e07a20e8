"""Sampler presets: named sets of sampling parameters that a server offers, in one YAML form for ours and for users'.

A preset's parameters stand in three groups. `default` holds where neither the request nor the model's authors say
anything, `override` goes before what the authors recommend, and `force` before what the request says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import yaml

from aphrodite.errors import ConfigError, InvalidRequestError
from aphrodite.sampling.fields import canonical_names, from_mapping, parameter_table, parameter_value
from aphrodite.sampling.params import SamplingParams

MAX_PRESETS = 1_000
GROUPS = ("default", "override", "force")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerPreset:
    """One named set; the groups hold canonical names and values as a request would send them."""

    name: str
    about: str = ""
    default: Mapping[str, Any] = field(default_factory=dict)
    override: Mapping[str, Any] = field(default_factory=dict)
    force: Mapping[str, Any] = field(default_factory=dict)

    def base(self, recommended: SamplingParams) -> SamplingParams:
        """What holds where a request says nothing, given what the model's authors recommend."""
        plain = SamplingParams()
        rows = {row.name: row for row in parameter_table()}
        unsaid = {
            name: value
            for name, value in self.default.items()
            if parameter_value(recommended, rows[name]) == parameter_value(plain, rows[name])
        }
        return from_mapping({**unsaid, **self.override}, base=recommended)

    def forced(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A request's sampling fields with the forced values in place of its own, and the names that lost theirs."""
        names = canonical_names()
        lost = [name for name, value in fields.items() if names[name] in self.force and value is not None]
        kept = {name: value for name, value in fields.items() if names[name] not in self.force}
        return {**kept, **self.force}, lost


@dataclass(frozen=True, slots=True)
class PresetLibrary:
    """All presets of a server.

    Attributes:
        presets: by name, in the order of the files.
        of_key: SHA-256 of an API key -> the preset of those who send it.
    """

    presets: Mapping[str, SamplerPreset]
    of_key: Mapping[bytes, SamplerPreset]


@cache
def shipped_presets() -> PresetLibrary:
    """Those of `presets.yaml` beside this module."""
    text = files("aphrodite.sampling").joinpath("presets.yaml").read_text("utf-8")
    return _library(text, "the presets that ship with Aphrodite", {})


def load_presets(path: Path | None) -> PresetLibrary:
    """The shipped presets and those of a YAML file, which win where names are the same.

    The file maps `presets` to presets by name, and `keys`, where there is one, from API keys to names.

    Raises:
        ConfigError: the file cannot be read, or says something that is no preset; the message names the place.
    """
    shipped = shipped_presets()
    if path is None:
        return shipped
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sampler presets {path}: {error}") from None
    return _library(text, str(path), shipped.presets)


def _library(text: str, source: str, known: Mapping[str, SamplerPreset]) -> PresetLibrary:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    sections = _mapping(content, source, ("presets", "keys"))
    entries = _mapping(sections.get("presets") or {}, f"{source}: presets")
    if len(entries) > MAX_PRESETS:
        raise ConfigError(f"{source}: {len(entries)} presets are more than the {MAX_PRESETS} that a file may have")
    presets = {**known, **{name: _preset(name, entry, source) for name, entry in entries.items()}}
    of_key: dict[bytes, SamplerPreset] = {}
    for key, name in _mapping(sections.get("keys") or {}, f"{source}: keys").items():
        if not isinstance(name, str) or name not in presets:
            # The key is a secret and stays out of the message.
            raise ConfigError(f"{source}: keys: there is no preset {name!r}; there are: {', '.join(presets)}")
        of_key[hashlib.sha256(key.encode()).digest()] = presets[name]
    return PresetLibrary(presets, of_key)


def _preset(name: str, entry: Any, source: str) -> SamplerPreset:
    where = f"{source}: preset {name!r}"
    content = _mapping(entry, where, ("about", *GROUPS))
    about = content.get("about", "")
    if not isinstance(about, str):
        raise ConfigError(f"{where}: about must be a text")
    groups = {group: _parameters(content.get(group) or {}, f"{where}: {group}") for group in GROUPS}
    return SamplerPreset(name=name, about=about, **groups)


def _parameters(given: Any, where: str) -> Mapping[str, Any]:
    """Checked parameters under their canonical names."""
    fields = _mapping(given, where)
    names = canonical_names()
    try:
        from_mapping(fields)
    except InvalidRequestError as error:
        raise ConfigError(f"{where}: {error}") from None
    return {names[name]: value for name, value in fields.items()}


def _mapping(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: must map names to values")
    for key in value:
        if keys is not None and key not in keys:
            raise ConfigError(f"{where}: there is no {key!r} here, only {', '.join(keys)}")
    return value


def preset_card(preset: SamplerPreset) -> dict[str, Any]:
    """A preset as the API shows it."""
    groups = {group: msgspec.to_builtins(dict(getattr(preset, group))) for group in GROUPS}
    return {"id": preset.name, "object": "sampler_preset", "about": preset.about, **groups}
