"""Adapters of a running engine: read beside its steps, and let go of once nobody uses them.

A front end gives every adapter that it loads a number of its own, which is never used again: so neither the prefix
cache nor a late step can take one adapter for another of the same name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from aphrodite.core.scheduler import Scheduler
from aphrodite.engine.messages import AdapterInfo, AdapterNews
from aphrodite.errors import AphroditeError, ConfigError, InvalidRequestError
from aphrodite.loading.lora import Adapter, read_adapter
from aphrodite.models.shape import ModelShape
from aphrodite.models.spec import ModelSpec

if TYPE_CHECKING:
    from aphrodite.layers.lora import AdapterRoom
    from aphrodite.runner.executor import AdapterStore

logger = logging.getLogger(__name__)

_PATIENCE = 0.01  # seconds to wait for a file before looking for other work again


class EngineAdapters:
    """Loads adapters into an executor's store, on a thread of its own.

    Args:
        store: None where the engine was started without room for adapters.
        room: what there is room for.
        in_use: whether a request that has not ended wants an adapter.
    """

    def __init__(
        self,
        store: AdapterStore | None,
        spec: ModelShape,
        room: AdapterRoom | None,
        scheduler: Scheduler,
        in_use: Callable[[int], bool],
    ) -> None:
        self._store = store
        self._spec = spec
        self._room = room
        self._scheduler = scheduler
        self._in_use = in_use
        self._known: set[int] = set()
        self._loading: dict[int, Future[AdapterInfo]] = {}
        self._unloading: dict[int, int | None] = {}  # number -> the first step planned without it, once there is one
        self._news: list[AdapterNews] = []
        self._reader: ThreadPoolExecutor | None = None

    @property
    def busy(self) -> bool:
        """Whether something is under way that steps do not bring about by themselves."""
        return bool(self._loading or self._news or self._unloading)

    def check(self, number: int | None) -> None:
        """Whether requests may want the adapter.

        Raises:
            InvalidRequestError: it is not loaded, or being unloaded.
        """
        if number is not None and number not in self._known:
            raise InvalidRequestError("the adapter that this request wants was unloaded", param="model")

    def take(self, number: int, adapter: Adapter) -> AdapterInfo:
        """Hold an adapter that was read.

        Raises:
            AphroditeError: it cannot be held.
        """
        info = self._held(number, adapter)
        self._known.add(number)
        return info

    def load(self, number: int, path: str) -> None:
        """Start reading an adapter; `take_news` tells when it is there, or why not."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "adapters")
        self._loading[number] = self._reader.submit(self._read, number, Path(path))

    def load_now(self, number: int, path: str) -> AdapterInfo:
        """Read an adapter and wait for it.

        Raises:
            AphroditeError: it cannot be served.
        """
        info = self._read(number, Path(path))
        self._known.add(number)
        return info

    def unload(self, number: int) -> None:
        """Let no further request use an adapter, and let go of it when those that do have ended."""
        self._known.discard(number)
        self._unloading[number] = None

    def advance(self, oldest_step: int | None, *, idle: bool) -> None:
        """Look at what is under way.

        Args:
            oldest_step: id of the oldest step in flight, None for none.
            idle: there is nothing else to do, so wait a little.
        """
        if self._loading:
            self._take_loaded(idle=idle)
        for number in list(self._unloading):
            if self._in_use(number):
                continue
            # Steps in flight may still be computed with it, though nobody will hear of what they bring.
            without = self._unloading[number]
            if without is None:
                without = self._unloading[number] = self._scheduler.next_step_id
            if oldest_step is None or oldest_step >= without:
                del self._unloading[number]
                self._scheduler.forget_adapter(number)
                if self._store is not None:
                    self._store.remove(number)
                self._news.append(AdapterNews(number))

    def take_news(self) -> list[AdapterNews]:
        """What has been loaded or unloaded since the last call."""
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def _take_loaded(self, *, idle: bool) -> None:
        if idle:
            wait(self._loading.values(), timeout=_PATIENCE)
        for number, loading in list(self._loading.items()):
            if not loading.done():
                continue
            del self._loading[number]
            error = loading.exception()
            if error is None:
                self._known.add(number)
                self._news.append(AdapterNews(number, adapter=loading.result()))
                continue
            if not isinstance(error, AphroditeError):
                logger.error("an adapter could not be loaded", exc_info=error)
                error = ConfigError("the adapter could not be loaded; the server's log has the reason")
            self._news.append(AdapterNews(number, error=str(error)))

    def _read(self, number: int, path: Path) -> AdapterInfo:
        if self._room is None or not isinstance(self._spec, ModelSpec):
            raise ConfigError("this engine was started without room for adapters; start it with --enable-lora")
        return self._held(number, read_adapter(path, self._spec, max_rank=self._room.rank))

    def _held(self, number: int, adapter: Adapter) -> AdapterInfo:
        if self._store is None:
            raise ConfigError("this engine was started without room for adapters; start it with --enable-lora")
        self._store.add(number, adapter.copied())
        return AdapterInfo(rank=adapter.rank, modules=len(adapter.pairs), nbytes=adapter.nbytes)
