"""The models that a server has, their names, and who is using them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aphrodite.server.config import ServerConfig
from aphrodite.server.engine import Engine, ModelInfo
from aphrodite.server.errors import ApiError
from aphrodite.server.metrics import ModelMetrics

if TYPE_CHECKING:
    from aphrodite.chat.template import ChatTemplate


class LoadedModel:
    """An engine that runs, and how many requests use it.

    Attributes:
        idle: set while none does.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.idle = asyncio.Event()
        self.idle.set()
        self._users = 0

    def begin_use(self) -> None:
        self._users += 1
        self.idle.clear()

    def end_use(self) -> None:
        self._users -= 1
        if not self._users:
            self.idle.set()

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
    """What stays known of a model that has been loaded once."""

    model: ModelInfo
    chat_template: ChatTemplate


class ServedModel:
    """A model that requests can ask for.

    Attributes:
        created: since when it is offered, in Unix seconds.
        config: the server's settings, with the model's own sampler preset and parsers.
        metrics: counts of its answers, whether it is loaded or not.
        facts: what was found out when it was last loaded.
        loaded: its engine while that runs.
    """

    def __init__(self, names: Sequence[str], config: ServerConfig) -> None:
        self.names = tuple(names)
        self.created = int(time.time())
        self.config = config
        self.metrics = ModelMetrics()
        self.facts: ModelFacts | None = None
        self.loaded: LoadedModel | None = None

    def set_engine(self, engine: Engine) -> None:
        """The model is loaded: `engine` runs."""
        self.facts = ModelFacts(engine.model, engine.chat_template)
        self.loaded = LoadedModel(engine)


class ModelPool:
    """All models of one server.

    Attributes:
        models: in the order in which they are listed; the first is meant where a request names none.
        dead: set when the server cannot go on, because the engine that it was started for has ended.
    """

    def __init__(self, models: Sequence[ServedModel], dead: asyncio.Event | None = None) -> None:
        self.models = list(models)
        self.dead = dead or asyncio.Event()

    @classmethod
    def of_engine(cls, engine: Engine, config: ServerConfig) -> ModelPool:
        """The pool of a server that has one model, whose engine runs and lives as long as the server."""
        model = ServedModel((engine.model.name, *engine.model.aliases), config)
        model.set_engine(engine)
        return cls([model], dead=engine.dead)

    @property
    def names(self) -> list[str]:
        """All names, those of one model beside each other."""
        return [name for model in self.models for name in model.names]

    def find(self, name: str | None) -> ServedModel:
        """The model of a name; None is the one that is meant where a request names none.

        Raises:
            ApiError: 404, no such model.
        """
        if name is None:
            return self.models[0]
        for model in self.models:
            if name in model.names:
                return model
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist here. This server has: {', '.join(self.names)}.",
            param="model",
            code="model_not_found",
        )

    async def use(self, model: ServedModel) -> LoadedModel:
        """The model's engine, in use until the caller ends that (`LoadedModel.end_use`)."""
        if model.loaded is None:
            raise RuntimeError(f"{model.names[0]} is not loaded")
        model.loaded.begin_use()
        return model.loaded
