"""The pool of a server that has several models, from its settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aphrodite.errors import ConfigError
from aphrodite.model_list import OfferedModel, hub_model, models_in_folder
from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import ApiError
from aphrodite.server.model_loader import EngineLoader
from aphrodite.server.model_pool import ModelPool, PoolLimits, size_text
from aphrodite.server.served_model import ServedModel
from aphrodite.settings import Settings


@asynccontextmanager
async def open_pool(
    settings: Settings, config: ServerConfig, offered: Sequence[OfferedModel]
) -> AsyncIterator[ModelPool]:
    """The pool of `offered`, with MODEL and those that always stay loaded; its engines end with the block.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    from aphrodite.engine.room import model_room

    room = await asyncio.to_thread(model_room, settings.engine)
    limits = PoolLimits(settings.server.models_max, settings.engine.max_queued_requests)
    loader = EngineLoader(
        budget=settings.server.models_memory or room.bytes,
        on_gpu=room.where == "GPU memory",
        alone=limits.max_loaded == 1,
    )

    def recognise(name: str) -> OfferedModel | None:
        return hub_model(settings, name)

    pool = ModelPool(config, loader, limits, discover=lambda: models_in_folder(settings), recognise=recognise)
    try:
        for each in offered:
            pool.offer(each)
        for model in pool.models:
            if model.pinned or (model is pool.models[0] and settings.engine.model is not None):
                await _load(pool, model)
        pool.start()
        yield pool
    finally:
        await pool.close()


async def _load(pool: ModelPool, model: ServedModel) -> None:
    try:
        await pool.load(model)
    except ApiError as error:
        raise ConfigError(error.message) from None


def summary(pool: ModelPool) -> list[str]:
    """What there is, for people."""
    names = [model.name for model in pool.models]
    loaded = [model.name for model in pool.models if model.loaded is not None]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    memory = [] if pool.budget is None else [f"Memory    {size_text(pool.budget)} for all that are loaded at a time"]
    return [
        f"Models    {', '.join(names[:20]) or 'none yet'}{more}",
        f"Loaded    {', '.join(loaded) or 'none yet'}; others when a request asks for them",
        *memory,
    ]
