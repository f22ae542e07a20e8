"""Adapters as a front end knows them: by name, each with the number that the engine knows it by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aphrodite.engine.messages import AdapterInfo, AdapterNews
from aphrodite.engine.preparation import named_adapters
from aphrodite.errors import ConfigError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that requests may name.

    Attributes:
        root: what the API calls the files that it is from: never where they lie.
        rank: the largest of its modules'.
        nbytes: as it is stored.
    """

    name: str
    number: int
    root: str
    rank: int
    nbytes: int


class LoadedAdapters:
    """Names come with the engine's word that an adapter is there, and go when it is told to unload it.

    Args:
        configured: the setting `lora`.
        infos: what the engine says of these, in the same order.
    """

    def __init__(self, configured: Sequence[str], infos: Sequence[AdapterInfo]) -> None:
        self._loaded: dict[str, LoadedAdapter] = {}
        self._coming: dict[int, tuple[str, str]] = {}  # number -> name and root
        for (name, path), info in zip(named_adapters(configured).items(), infos, strict=True):
            self._loaded[name] = LoadedAdapter(name, len(self._loaded), path.name, info.rank, info.nbytes)
        self._next_number = len(self._loaded)

    def __iter__(self) -> Iterator[LoadedAdapter]:
        return iter(list(self._loaded.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def number(self, name: str | None) -> int | None:
        """What the engine knows an adapter by; None stands for the model alone.

        Raises:
            InvalidRequestError: there is none of this name.
        """
        if name is None:
            return None
        adapter = self._loaded.get(name)
        if adapter is None:
            known = ", ".join(self._loaded) or "none"
            raise InvalidRequestError(
                f"There is no adapter {name[:200]!r}; loaded: {known}.", param="model", code="model_not_found"
            )
        return adapter.number

    def begin(self, name: str, path: str) -> int:
        """A number for an adapter that the engine is about to load.

        Raises:
            InvalidRequestError: the name is empty or taken.
        """
        if not name.strip() or not path.strip():
            raise InvalidRequestError("an adapter needs a name and a path", param="lora_name")
        if name in self._loaded or any(name == coming for coming, _ in self._coming.values()):
            raise InvalidRequestError(
                f"There is an adapter {name[:200]!r} already: unload it first, or choose another name.",
                param="lora_name",
            )
        number = self._next_number
        self._next_number += 1
        self._coming[number] = (name, Path(path).name)
        return number

    def arrived(self, news: AdapterNews) -> LoadedAdapter | None:
        """Take over what the engine says of an adapter; None: it is gone.

        Raises:
            ConfigError: it could not be loaded.
        """
        if news.number not in self._coming:
            return None
        name, root = self._coming.pop(news.number)
        if news.adapter is None:
            raise ConfigError(news.error or "the engine could not load the adapter")
        adapter = LoadedAdapter(name, news.number, root, news.adapter.rank, news.adapter.nbytes)
        self._loaded[name] = adapter
        return adapter

    def leave(self, name: str) -> int:
        """Offer an adapter no longer; returns its number.

        Raises:
            InvalidRequestError: there is none of this name.
        """
        number = self.number(name)
        assert number is not None
        del self._loaded[name]
        return number
