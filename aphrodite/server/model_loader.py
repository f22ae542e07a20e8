"""Starting the engine of a model that a request asked for, within a share of the memory."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aphrodite.engine.client import ProgressCallback
from aphrodite.engine.estimate import MemoryEstimate, estimate_memory
from aphrodite.model_list import OfferedModel
from aphrodite.server.engine import Engine

if TYPE_CHECKING:
    from aphrodite.config import EngineConfig


class Prepared(NamedTuple):
    """A model that lies on this machine, and what it will take."""

    config: EngineConfig
    estimate: MemoryEstimate


class Started(NamedTuple):
    """An engine that runs, and the bytes that it takes."""

    engine: Engine
    memory: int


class ModelLoader(Protocol):
    """What the pool needs to load models."""

    @property
    def budget(self) -> int | None:
        """Bytes for all models together; None is no limit."""

    async def prepare(self, offered: OfferedModel) -> Prepared:
        """Look at the model, fetching it where it is not on this machine yet.

        Raises:
            AphroditeError: it cannot be found, fetched or read.
        """

    async def start(self, prepared: Prepared, progress: ProgressCallback) -> Started:
        """Load it; `progress` hears of bytes that are in place.

        Raises:
            AphroditeError: it cannot be loaded.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class EngineLoader:
    """Engines in processes of their own.

    Attributes:
        on_gpu: where models run unless they say otherwise.
        alone: one model at a time is loaded, which may take all.
    """

    budget: int
    on_gpu: bool
    alone: bool

    async def prepare(self, offered: OfferedModel) -> Prepared:
        from aphrodite.engine.preparation import resolve_model

        def look() -> Prepared:
            config, _ = resolve_model(offered.engine)
            on_gpu = self.on_gpu and config.device != "cpu"
            return Prepared(config, estimate_memory(config, budget=self.budget, on_gpu=on_gpu, alone=self.alone))

        return await asyncio.to_thread(look)

    async def start(self, prepared: Prepared, progress: ProgressCallback) -> Started:
        from aphrodite.engine.async_engine import AsyncEngine

        config, estimate = prepared
        if not self.alone:  # an engine that is told nothing takes what there is
            config = dataclasses.replace(config, kv_cache_memory=max(1, estimate.kv_cache))
        engine = await AsyncEngine.start(config, progress)
        info = engine.info
        return Started(engine, info.weight_bytes + info.num_blocks * info.kv_bytes_per_block + estimate.beside)
