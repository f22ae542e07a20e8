"""A model that requests can ask for: its names and settings, its engine while it is loaded, who uses or awaits it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from aphrodite.engine.preparation import named_adapters
from aphrodite.server.config import ServerConfig
from aphrodite.server.engine import Engine
from aphrodite.server.errors import ApiError
from aphrodite.server.metrics import ModelMetrics

if TYPE_CHECKING:
    from aphrodite.chat.template import ChatTemplate
    from aphrodite.model_list import OfferedModel
    from aphrodite.sampling.params import SamplingParams

ModelState = Literal["loaded", "loading", "unloading", "unloaded"]


class LoadProgress(NamedTuple):
    """`done` of `total` bytes of a phase of loading."""

    label: str
    done: int
    total: int


class LoadedModel:
    """An engine that runs, and how many requests use it.

    Attributes:
        memory: bytes that it takes.
        idle: set while no request uses it.
        keep_alive: seconds that it stays without requests; None is until its memory is needed.
        expires: when it is to be unloaded, by the pool's clock; None is never, or not while it is used.
    """

    def __init__(self, engine: Engine, memory: int = 0, on_idle: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self.memory = memory
        self.idle = asyncio.Event()
        self.idle.set()
        self.keep_alive: float | None = None
        self.expires: float | None = None
        self._on_idle = on_idle
        self._users = 0

    def begin_use(self) -> None:
        self._users += 1
        self.idle.clear()
        self.expires = None

    def end_use(self) -> None:
        self._users -= 1
        if not self._users:
            self.idle.set()
            self._on_idle()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the engine running inside the block; who already uses it may hold it longer."""
        self.begin_use()
        try:
            yield
        finally:
            self.end_use()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model even while it is not loaded."""

    root: str
    max_model_len: int
    vocab_size: int
    sampling_defaults: SamplingParams
    chat_template: ChatTemplate


class ProgressFeed:
    """How far something is, for those who follow it. `latest` is None while nothing goes on."""

    def __init__(self) -> None:
        self.latest: LoadProgress | None = None
        self._changed = asyncio.Event()

    def set(self, latest: LoadProgress | None) -> None:
        self.latest = latest
        self._changed.set()
        self._changed = asyncio.Event()

    def report(self, label: str, done: int, total: int) -> None:
        self.set(LoadProgress(label, done, total))

    async def wait(self) -> None:
        """Return at the next change."""
        await self._changed.wait()


class LoadFailure(NamedTuple):
    """Why loading failed, and until when nobody tries again, by the pool's clock."""

    error: ApiError
    until: float


class ServedModel:
    """A model that requests can ask for.

    Attributes:
        created: since when it is offered, in Unix seconds.
        config: the server's settings, with the model's own sampler preset and parsers.
        offered: how it is loaded; None where its engine was started before the server.
        metrics: counts of its answers, whether it is loaded or not.
        facts: what was found out when it was last loaded, or looked at; None before.
        loaded: its engine while that runs.
        leaving: it gives way to another, and takes no new requests.
        num_loads: how often it was loaded.
        used: the number of the pool's latest request for it.
        waiters: requests that wait until it is loaded.
        abandoned: set while none does.
        progress: how far loading is, while it is being loaded.
    """

    def __init__(self, names: Sequence[str], config: ServerConfig, offered: OfferedModel | None = None) -> None:
        self.names = tuple(names)
        self.created = int(time.time())
        self.config = config
        self.offered = offered
        self.metrics = ModelMetrics()
        self.facts: ModelFacts | None = None
        self.loaded: LoadedModel | None = None
        self.leaving = False
        self.num_loads = 0
        self.used = 0
        self.failure: LoadFailure | None = None
        self.progress = ProgressFeed()
        self.waiters: list[asyncio.Future[LoadedModel]] = []
        self.abandoned = asyncio.Event()
        self.loading: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names by which requests ask for it with an adapter."""
        if self.loaded is not None:
            return tuple(adapter.name for adapter in self.loaded.engine.adapters)
        return () if self.offered is None else tuple(named_adapters(self.offered.engine.lora))

    @property
    def pinned(self) -> bool:
        return self.offered is None or self.offered.pinned

    @property
    def state(self) -> ModelState:
        if self.leaving:
            return "unloading"
        if self.loaded is not None:
            return "loaded"
        return "unloaded" if self.loading is None else "loading"

    @property
    def is_ready(self) -> bool:
        """Whether a request can use it at once."""
        return self.loaded is not None and not self.leaving and not self.loaded.engine.dead.is_set()

    def set_loaded(self, loaded: LoadedModel) -> None:
        engine = loaded.engine
        known = engine.model
        self.facts = ModelFacts(
            known.root, known.max_model_len, known.vocab_size, known.sampling_defaults, engine.chat_template
        )
        self.loaded, self.failure = loaded, None
        self.num_loads += 1
