"""Models that load at once, or when the test lets them, and take as much memory as it says."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from fake_engine import TEMPLATE, FakeEngine, FakeModel

from aphrodite.chat.template import ChatTemplate
from aphrodite.config import EngineConfig, ServerSettings
from aphrodite.engine.client import ProgressCallback
from aphrodite.engine.estimate import MemoryEstimate
from aphrodite.loading.downloads import Listener
from aphrodite.model_list import OfferedModel
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.config import ServerConfig
from aphrodite.server.model_loader import Prepared, Started
from aphrodite.server.model_pool import ModelPool, PoolLimits
from aphrodite.server.served_model import ModelFacts

GIB = 1 << 30


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeLoader:
    """Attributes that tests set:

    sizes: bytes of weights by the model's path; others have one GiB.
    fails: raised instead of loading, by path.
    gate: loading goes on while it is set.
    """

    budget: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    hold_after: int | None = None  # of the engines that are started
    started: list[str] = field(default_factory=list)
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    described: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()

    async def prepare(self, offered: OfferedModel, progress: ProgressCallback) -> Prepared:
        size = self.sizes.get(str(offered.engine.model), GIB)
        return Prepared(offered.engine, MemoryEstimate(size, 0, 0))

    async def describe(self, offered: OfferedModel) -> ModelFacts | None:
        self.described.append(offered.name)
        return ModelFacts(f"{offered.name}.gguf", 4096, 258, SamplingParams(), ChatTemplate(TEMPLATE))

    async def fetch(self, offered: OfferedModel, listener: Listener) -> None:
        if offered.name in self.fails:
            raise self.fails[offered.name]
        for come in range(0, 101, 10):
            listener(come, 100)
            await asyncio.sleep(0)

    async def delete(self, offered: OfferedModel) -> None:
        self.deleted.append(offered.name)

    async def start(self, prepared: Prepared, progress: ProgressCallback) -> Started:
        path = str(prepared.config.model)
        self.started.append(path)
        progress("loading weights", 1, 2)
        await self.gate.wait()
        if path in self.fails:
            raise self.fails[path]
        length = prepared.config.max_model_len or 512
        taken = sum(self.taken[other] for other, engine in self.engines.items() if not engine.dead.is_set())
        assert self.budget is None or taken + prepared.estimate.total <= self.budget
        self.taken[path] = prepared.estimate.total
        engine = FakeEngine(FakeModel(path, (), root=path, max_model_len=length), hold_after=self.hold_after)
        self.engines[path] = engine
        return Started(engine, prepared.estimate.total)


def offered(name: str, *aliases: str, pinned: bool = False, **settings: object) -> OfferedModel:
    """A model whose path is its name; `settings` are of the engine or of the server."""
    of_engine = {key: value for key, value in settings.items() if hasattr(EngineConfig, key)}
    of_server = {key: value for key, value in settings.items() if key not in of_engine}
    return OfferedModel(
        name=name, aliases=aliases, engine=EngineConfig(model=name, **of_engine),
        server=ServerSettings(**of_server), pinned=pinned,
    )  # fmt: skip


def on_hub(name: str) -> OfferedModel | None:
    return offered(name) if re.fullmatch(r"[\w-]+/[\w-]+(:\w+)?", name) else None


def pool_of(
    loader: FakeLoader, *models: OfferedModel, config: ServerConfig | None = None, clock: Clock | None = None,
    max_loaded: int | None = None, max_waiting: int = 256,
) -> ModelPool:  # fmt: skip
    limits = PoolLimits(max_loaded, max_waiting)
    pool = ModelPool(config or ServerConfig(), loader, limits, recognise=on_hub, clock=clock or Clock())
    for model in models:
        pool.offer(model)
    return pool
