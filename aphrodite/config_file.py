"""The YAML file of settings: each value read with its line, the list of models among them, and an example written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aphrodite.config import EngineConfig, settings_table
from aphrodite.config_values import parse_value
from aphrodite.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import yaml

MODELS = "models"  # the key of the list of models
# What a model of the list may have for its own: the engine's settings but these, and some of the server's.
_SHARED = ("served_model_name", "log_level")
_OWN_OF_SERVER = ("keep_alive", "sampler_preset", "tool_parser", "reasoning_parser")

Row = tuple[str, object, str]  # name, raw value, origin with its line


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of a configuration file's list.

    Attributes:
        values: the settings that it has for its own, by name.
        pinned: it is loaded from the start and never gives way to others.
        origin: where it stands.
    """

    name: str
    aliases: tuple[str, ...]
    pinned: bool
    values: Mapping[str, Any]
    origin: str


def read_config_file(path: str | Path) -> tuple[list[Row], tuple[ModelEntry, ...]]:
    """Read a YAML file of settings, in file order, and the models that it lists.

    Raises:
        ConfigError: unreadable, not a mapping, an unknown or repeated key, or a wrong value of a model.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}.") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return [], ()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold `name: value` lines; see `aphrodite config init`.")
        rows = _rows(loader, node, str(path), [*settings_table(), MODELS])
        entries = [value for key, value in node.value if str(key.value) == MODELS]
        models = _models(loader, entries[0], str(path)) if entries else ()
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return [row for row in rows if row[0] != MODELS], models


def _rows(loader: yaml.SafeLoader, node: yaml.MappingNode, path: str, known: Iterable[str]) -> list[Row]:
    """A mapping's entries, their names checked."""
    known = list(known)
    seen: dict[str, int] = {}
    rows = []
    for key, value in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name not in known:
            raise ConfigError(f"{path}:{line}: {key.value} is not a setting.{did_you_mean(name, known)}")
        if name in seen:
            raise ConfigError(f"{path}:{line}: {key.value} is already set in line {seen[name]}.")
        seen[name] = line
        rows.append((name, loader.construct_object(value, deep=True), f"{path}:{line}: {key.value}"))
    return rows


def _models(loader: yaml.SafeLoader, node: yaml.Node, path: str) -> tuple[ModelEntry, ...]:
    import yaml

    line = node.start_mark.line + 1
    if node.tag == "tag:yaml.org,2002:null":
        return ()
    values = node.value if isinstance(node, yaml.SequenceNode) else []
    items = [item for item in values if isinstance(item, yaml.MappingNode)]
    if not items or len(items) < len(values):
        raise ConfigError(f"{path}:{line}: {MODELS} must be a list with a name and settings for each model.")
    known = ("name", "aliases", "pinned", *per_model_settings())
    return tuple(_model(_rows(loader, item, path, known), f"{path}:{item.start_mark.line + 1}") for item in items)


def _model(rows: list[Row], origin: str) -> ModelEntry:
    table = settings_table()
    values: dict[str, Any] = {}
    name: object = None
    aliases: tuple[str, ...] = ()
    pinned: object = False
    for key, value, where in rows:
        if key == "name":
            name = value
        elif key == "aliases":
            aliases = parse_value(table["served_model_name"], value, where)
        elif key == "pinned":
            pinned = value
        else:
            values[key] = parse_value(table[key], value, where)
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{origin}: a model of the list needs a name, by which requests ask for it.")
    if not isinstance(pinned, bool):
        raise ConfigError(f"{origin}: pinned: must be true or false.")
    return ModelEntry(name=name, aliases=aliases, pinned=pinned, values=values, origin=origin)


def per_model_settings() -> list[str]:
    """The settings that a model of the list may have for its own."""
    rows = settings_table().values()
    return [
        row.name
        for row in rows
        if (row.owner is EngineConfig and row.name not in _SHARED) or row.name in _OWN_OF_SERVER
    ]


_MODELS_EXAMPLE = """
# ---- Models, each with settings of its own ----------------------------------------------------------

# Requests name one, and it is loaded when they do. A model has a name, what else it answers to (aliases), whether it
# is loaded from the start and never gives way (pinned), and any of the settings above that say how a model is loaded
# and used: model, max_model_len, quantization, chat_template, sampler_preset, keep_alive and so on. One without `model`
# is that of the folder models_dir.
#models:
#  - name: writer
#    model: ORG/NAME:Q4_K_M
#    aliases: [gpt-4o]
#    pinned: true
#    sampler_preset: story
#  - name: thinker
#    model: thinker-8b.gguf
#    max_model_len: 32k
#    keep_alive: 5m
"""


def example_config() -> str:
    """A YAML file of every setting, commented out, with its help and default."""
    lines = ["# Settings of Aphrodite. Remove the # in front of a name to change it.",
             "# Flags and APHRODITE_* variables of the same names take precedence over this file."]  # fmt: skip
    group = ""
    for setting in settings_table().values():
        if setting.group != group:
            group = setting.group
            lines += ["", f"# ---- {group} " + "-" * (70 - len(group))]
        lines += ["", *textwrap.wrap(setting.help, 98, initial_indent="# ", subsequent_indent="# ")]
        if setting.choices:
            lines.append("# One of: " + ", ".join(str(choice) for choice in setting.choices))
        if setting.meta.example:
            lines.append(f"# For example: {setting.meta.example}")
        lines.append(f"#{setting.name}: {setting.default_text}")
    return "\n".join(lines) + "\n" + _MODELS_EXAMPLE
