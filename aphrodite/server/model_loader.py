"""Starting the engine of a model that a request asked for, within a share of the memory."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aphrodite.engine.client import ProgressCallback
from aphrodite.engine.estimate import MemoryEstimate, estimate_memory
from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.loading.downloads import Listener
from aphrodite.loading.hub import parse_name
from aphrodite.model_list import OfferedModel
from aphrodite.server.engine import Engine
from aphrodite.server.served_model import ModelFacts

if TYPE_CHECKING:
    from aphrodite.config import EngineConfig

logger = logging.getLogger(__name__)


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

    async def prepare(self, offered: OfferedModel, progress: ProgressCallback) -> Prepared:
        """Look at the model, fetching it where it is not on this machine yet, of which `progress` hears.

        Raises:
            AphroditeError: it cannot be found, fetched or read.
        """

    async def describe(self, offered: OfferedModel) -> ModelFacts | None:
        """What a model on this machine says of itself; None where it cannot be told without loading it."""

    async def fetch(self, offered: OfferedModel, listener: Listener) -> None:
        """Have a model of the hub on this machine.

        Raises:
            AphroditeError: it cannot be fetched.
        """

    async def delete(self, offered: OfferedModel) -> None:
        """Remove a model of the hub from this machine.

        Raises:
            AphroditeError: it is not there, or cannot be removed.
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

    async def prepare(self, offered: OfferedModel, progress: ProgressCallback) -> Prepared:
        from aphrodite.engine.preparation import resolve_model

        loop = asyncio.get_running_loop()

        def listener(come: int, total: int) -> None:  # in the download's threads
            loop.call_soon_threadsafe(progress, "fetching", come, total)

        def look() -> Prepared:
            config, _ = resolve_model(offered.engine, listener=listener)
            on_gpu = self.on_gpu and config.device != "cpu"
            return Prepared(config, estimate_memory(config, budget=self.budget, on_gpu=on_gpu, alone=self.alone))

        return await asyncio.to_thread(look)

    async def describe(self, offered: OfferedModel) -> ModelFacts | None:
        def look() -> ModelFacts | None:
            try:
                return _facts(offered)
            except AphroditeError as error:
                logger.info("%s cannot be described before it is loaded: %s", offered.name, error)
                return None

        return await asyncio.to_thread(look)

    async def fetch(self, offered: OfferedModel, listener: Listener) -> None:
        from aphrodite.engine.preparation import resolve_model

        await asyncio.to_thread(lambda: resolve_model(offered.engine, listener=listener))

    async def delete(self, offered: OfferedModel) -> None:
        from aphrodite.loading.model_cache import hub_cache, plan_removal, remove

        def work() -> None:
            name = parse_name(offered.engine.model or "")
            if name is None:
                raise ConfigError(f"{offered.name} is not in the cache of fetched models")
            cache = hub_cache(offered.engine.cache_dir)
            remove(plan_removal(cache, name.repo, variant=name.variant, revision=name.revision))

        await asyncio.to_thread(work)

    async def start(self, prepared: Prepared, progress: ProgressCallback) -> Started:
        from aphrodite.engine.async_engine import AsyncEngine

        config, estimate = prepared
        if not self.alone:  # an engine that is told nothing takes what there is
            config = dataclasses.replace(config, kv_cache_memory=max(1, estimate.kv_cache))
        engine = await AsyncEngine.start(config, progress)
        info = engine.info
        return Started(engine, info.weight_bytes + info.num_blocks * info.kv_bytes_per_block + estimate.beside)


def _facts(offered: OfferedModel) -> ModelFacts:
    """What the headers, the tokenizer and the template of a model on this machine say.

    Raises:
        AphroditeError: it is not here, or cannot be opened.
    """
    from aphrodite.chat.library import load_chat_template, recognised_chat_template
    from aphrodite.engine.preparation import model_root, resolve_model, tokenizer_path
    from aphrodite.engine.sampling_defaults import sampling_defaults
    from aphrodite.loading.checkpoint import open_checkpoint
    from aphrodite.tokenizer.loader import load_tokenizer

    config, path = resolve_model(offered.engine, allow_download=False)
    checkpoint = open_checkpoint(path, load_format=config.load_format)
    tokenizer = load_tokenizer(tokenizer_path(config))
    template = load_chat_template(config.chat_template, tokenizer) or recognised_chat_template(
        tokenizer, name=f"{checkpoint.name} {path.name}", family=checkpoint.spec.family
    )
    return ModelFacts(
        root=model_root(path),
        max_model_len=config.max_model_len or checkpoint.spec.max_position,
        vocab_size=checkpoint.spec.vocab_size,
        sampling_defaults=sampling_defaults(checkpoint.generation_defaults, source=config.generation_config),
        chat_template=template,
    )
