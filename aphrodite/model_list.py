"""Which models a server offers: MODEL, those of the configuration file's list, and those of a folder."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from aphrodite.config import EngineConfig, ServerSettings, settings_table
from aphrodite.config_file import ModelEntry
from aphrodite.engine.preparation import local_path, named_adapters
from aphrodite.errors import ConfigError
from aphrodite.loading.checkpoint import checkpoint_name, gguf_name, gguf_stem
from aphrodite.loading.hub import parse_name
from aphrodite.loading.repository import gguf_models
from aphrodite.settings import Settings

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OfferedModel:
    """A model that requests may ask for, before it is loaded.

    Attributes:
        name: what it reports itself as.
        aliases: what else it answers to.
        engine: how it is loaded.
        server: the server's settings, with those that it has for its own.
        pinned: it is loaded from the start and never gives way to others.
    """

    name: str
    aliases: tuple[str, ...] = ()
    engine: EngineConfig
    server: ServerSettings
    pinned: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def has_several(settings: Settings) -> bool:
    """Whether a server of these settings offers several models, and loads them when they are asked for."""
    return settings.server.models_dir is not None or bool(settings.models)


def offered_models(settings: Settings) -> list[OfferedModel]:
    """All models of a server that has several: MODEL first, then the list, then what else the folder holds.

    Raises:
        ConfigError: two models have one name, a listed one is nowhere, or there are none and none can come.
    """
    engine = settings.engine
    if engine.served_model_name and engine.model is None:
        raise ConfigError("--served-model-name names MODEL, and none was given: name models in the list `models`")
    folder = {model.name: model for model in models_in_folder(settings)}
    listed = [_listed(entry, settings, folder) for entry in settings.models]
    models = [] if engine.model is None else [_main(settings)]
    models += listed
    used = {str(local_path(model.engine.model or "")) for model in models}
    models += [model for model in folder.values() if model.engine.model not in used]
    if not models and not settings.server.admin_key:  # with one, models can be fetched
        raise ConfigError(f"{settings.server.models_dir} holds no GGUF file and no folder of a checkpoint")
    return _without_clashes(models)


def models_in_folder(settings: Settings) -> list[OfferedModel]:
    """The models of `models_dir`, by name: GGUF files (split ones once), and folders of a checkpoint or of one GGUF.

    Raises:
        ConfigError: the folder cannot be read.
    """
    if settings.server.models_dir is None:
        return []
    root = local_path(settings.server.models_dir)
    try:
        entries = sorted(root.iterdir())
        files = {entry.name: 0 for entry in entries if entry.is_file()}
        found = [model.files[0] for model in gguf_models(files)]
        folders = [entry.name for entry in entries if entry.is_dir() and _is_model(entry)]
    except OSError as error:
        raise ConfigError(f"cannot read --models-dir {root}: {error.strerror}") from None
    taken = Counter([*map(gguf_name, found), *map(gguf_stem, found), *folders])
    models = []
    for file in found:
        short = gguf_name(file)  # as it is called where it is the only model
        aliases = (short,) if taken[short] == 1 else ()
        models.append(_offered(settings, {"model": str(root / file)}, gguf_stem(file), aliases))
    return models + [_offered(settings, {"model": str(root / folder)}, folder) for folder in folders]


def hub_model(settings: Settings, name: str) -> OfferedModel | None:
    """A model of the hub as one that the server offers; None where `name` names none."""
    parsed = parse_name(name)
    return None if parsed is None else _offered(settings, {"model": str(parsed)}, str(parsed))


def _is_model(folder: Path) -> bool:
    try:
        if (folder / "config.json").is_file():
            return not (folder / "adapter_config.json").is_file()
        return len(gguf_models({file.name: 0 for file in folder.glob("*.gguf")})) == 1
    except PermissionError as error:  # such as lost+found of a disk of models: the others are none the worse for it
        _pass_over(folder, error.strerror)
        return False


@cache
def _pass_over(folder: Path, reason: str) -> None:
    """Say once why a folder is no model."""
    logger.warning("%s is passed over: %s", folder, reason)


def _main(settings: Settings) -> OfferedModel:
    """MODEL itself."""
    engine = settings.engine
    text = engine.model or ""
    path = local_path(text)
    given = engine.served_model_name
    named = parse_name(text)
    if named is not None:
        name = str(named)
    else:
        name = checkpoint_name(path) if path.is_dir() else gguf_name(path.name)
    return _offered(settings, {}, given[0] if given else name, given[1:])


def _listed(entry: ModelEntry, settings: Settings, folder: Mapping[str, OfferedModel]) -> OfferedModel:
    values = dict(entry.values)
    if values.get("model") is None:
        known = next((model for model in folder.values() if entry.name in model.names), None)
        if known is None:
            where = f", and --models-dir has no model of its name: {', '.join(folder)[:500]}" if folder else ""
            raise ConfigError(f"{entry.origin}: {entry.name} names no `model`{where}.")
        values["model"] = known.engine.model
    elif settings.server.models_dir is not None:  # a file of the folder goes by its name alone
        inside = local_path(settings.server.models_dir) / values["model"]
        values["model"] = str(inside) if inside.exists() else values["model"]
    return _offered(settings, values, entry.name, entry.aliases, pinned=entry.pinned)


def _offered(
    settings: Settings, values: Mapping[str, Any], name: str, aliases: tuple[str, ...] = (), *, pinned: bool = False
) -> OfferedModel:
    """The model `name` with the settings of all, and `values` for its own."""
    table = settings_table()
    own = {key: value for key, value in values.items() if table[key].owner is EngineConfig}
    of_server = {key: value for key, value in values.items() if table[key].owner is ServerSettings}
    engine = dataclasses.replace(settings.engine, served_model_name=(name, *aliases), **own)
    server = dataclasses.replace(settings.server, **of_server)
    return OfferedModel(name=name, aliases=aliases, engine=engine, server=server, pinned=pinned)


def _without_clashes(models: list[OfferedModel]) -> list[OfferedModel]:
    """The models, if no two have one name, and none an adapter that nobody could ask for.

    Raises:
        ConfigError: they do; or an adapter is given without a name or path.
    """
    owners: dict[str, OfferedModel] = {}
    for name, model in _all_names(models):
        if name in owners:
            raise ConfigError(f"two models are called {name!r}: {owners[name].engine.model} and {model.engine.model}")
        owners[name] = model
    for adapter in {name for model in models for name in named_adapters(model.engine.lora)}:
        if adapter in owners:
            model = owners[adapter]
            raise ConfigError(f"--lora {adapter}: requests of this name get a model that has it, {model.engine.model}")
    return models


def _all_names(models: list[OfferedModel]) -> Iterator[tuple[str, OfferedModel]]:
    for model in models:
        for name in model.names:
            yield name, model
