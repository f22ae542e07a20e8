"""The models of a server: found by name, loaded when a request asks for one, unloaded when another needs their memory.

One model is loaded at a time, in the order in which they were asked for. One that does not fit waits until others have
given way: those that nobody uses before those that are in use, and among them the one first that was used least
recently. Who gives way answers the requests that it has, and takes no new ones; these wait until it is loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from aphrodite.errors import AphroditeError, EngineDeadError
from aphrodite.loading.downloads import DownloadCancelledError, Listener
from aphrodite.model_list import OfferedModel
from aphrodite.server.config import ServerConfig
from aphrodite.server.engine import Engine
from aphrodite.server.errors import NO_RETRY, ApiError, invalid, retry_after
from aphrodite.server.model_loader import ModelLoader, Prepared
from aphrodite.server.served_model import LoadedModel, LoadFailure, ModelFacts, ServedModel

logger = logging.getLogger(__name__)

FAILURE_SECONDS = 15.0  # in which a model that failed to load is not tried again
REFRESH_SECONDS = 2.0  # between two looks at the folder of models
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\s'\"]+/)+")


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How much of it there may be.

    Attributes:
        max_loaded: most models that are loaded at the same time; None is as many as fit.
        max_waiting: requests that may wait for models; further ones are refused.
    """

    max_loaded: int | None = None
    max_waiting: int = 256


class ModelPool:
    """All models of one server.

    Attributes:
        models: in the order in which they are listed.
        dead: set when the server cannot go on, because the one engine that it was started for has ended.
    """

    def __init__(
        self,
        config: ServerConfig,
        loader: ModelLoader | None = None,
        limits: PoolLimits = PoolLimits(),
        *,
        discover: Callable[[], Iterable[OfferedModel]] = tuple,
        recognise: Callable[[str], OfferedModel | None] = lambda name: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            loader: None for a server whose only engine runs already.
            discover: lists the models of a folder, which may have more of them than at the start.
            recognise: the model of a name on the hub.
            clock: seconds.
        """
        self.models: list[ServedModel] = []
        self.dead = asyncio.Event()
        self._config = config
        self._loader = loader
        self._limits = limits
        self._discover = discover
        self._recognise = recognise
        self._clock = clock
        self._looked = -math.inf
        self._uses = itertools.count(1)
        self._turn = asyncio.Lock()  # who loads or unloads
        self._fetching = asyncio.Lock()
        self._due = asyncio.Event()  # a model has become idle, and may expire
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def of_engine(cls, engine: Engine, config: ServerConfig, *, memory: int = 0) -> ModelPool:
        """The pool of a server that has one model, whose engine runs and lives as long as the server.

        Args:
            memory: bytes that it takes.
        """
        pool = cls(config)
        pool.dead = engine.dead
        model = ServedModel((engine.model.name, *engine.model.aliases), config)
        model.set_loaded(LoadedModel(engine, memory))
        pool.models.append(model)
        return pool

    @property
    def names(self) -> list[str]:
        """All names, those of one model beside each other."""
        return [name for model in self.models for name in model.names]

    @property
    def loads(self) -> bool:
        """Whether models are loaded and unloaded here."""
        return self._loader is not None

    @property
    def budget(self) -> int | None:
        """Bytes for all models together; None is no limit."""
        return None if self._loader is None else self._loader.budget

    # --- which models there are ---------------------------------------------------------------------------------

    def offer(self, offered: OfferedModel) -> ServedModel:
        """Have a model that requests can ask for; one of its name that is there already stays as it is."""
        for model in self.models:
            if offered.name in model.names:
                return model
        taken = set(self.names)
        names = (offered.name, *(alias for alias in offered.aliases if alias not in taken))
        self.models.append(ServedModel(names, self._config.for_model(offered.server), offered))
        return self.models[-1]

    def refresh(self) -> None:
        """Offer what the folder of models has gained."""
        if self._clock() < self._looked + REFRESH_SECONDS:
            return
        self._looked = self._clock()
        known = {model.offered.engine.model for model in self.models if model.offered is not None}
        try:
            for offered in self._discover():
                if offered.engine.model not in known:
                    self.offer(offered)
        except AphroditeError as error:
            logger.warning("looking for models: %s", error)

    def find(self, name: str | None) -> ServedModel:
        """The model of a name, its own or an adapter's; without one that which was used last and is loaded, else the
        first.

        Raises:
            ApiError: 404, no such model.
        """
        if name is None and self.models:
            loaded = [model for model in self.models if model.loaded is not None and not model.leaving]
            return max(loaded or self.models, key=lambda model: model.used)
        for attempt in range(2):
            for model in self.models:
                if name in model.names:
                    return model
            for model in self.models:
                if name in model.adapter_names:
                    return model
            if not attempt:
                self.refresh()
        raise self._unknown(name or "")

    def find_or_offer(self, name: str) -> ServedModel:
        """The model of a name, be it one on the hub that was not offered yet: for whoever may change what there is.

        Raises:
            ApiError: 404, no such model.
        """
        offered = self._recognise(name) if self.loads and name not in self.names else None
        return self.find(name) if offered is None else self.offer(offered)

    async def facts(self, model: ServedModel) -> ModelFacts | None:
        """What is known of a model, found out without loading it; None where that cannot be."""
        if model.facts is None and self._loader is not None and model.offered is not None:
            model.facts = await self._loader.describe(model.offered)
        return model.facts

    async def fetch(self, name: str, listener: Listener) -> ServedModel:
        """Fetch a model of the hub, and offer it.

        Args:
            listener: hears how far it is, in several threads.

        Raises:
            ApiError: 400, no name of a model on the hub, or the server has one model and lives with it; 502, it cannot
                be fetched.
        """
        if self._loader is None:
            raise only_one()
        offered = self._recognise(name)
        if offered is None:
            raise invalid("model", f"{name[:200]!r} is not the name of a model on the hub, as ORG/NAME is")
        gone = threading.Event()

        def heard(come: int, total: int) -> None:
            if gone.is_set():
                raise DownloadCancelledError(f"nobody waits for {name} any more")
            listener(come, total)

        try:
            async with self._fetching:
                await self._loader.fetch(offered, heard)
        except asyncio.CancelledError:
            gone.set()
            raise
        except AphroditeError as error:
            logger.warning("%s cannot be fetched: %s", name, error)
            message = f"The model {name!r} cannot be fetched: {_FOLDERS.sub('', str(error))}"
            raise ApiError(502, message, param="model", code="model_fetch_failed", headers=NO_RETRY) from None
        return self.offer(offered)

    async def delete(self, model: ServedModel) -> None:
        """Offer a model no more, unload it, and remove its files from the cache of fetched models.

        Raises:
            ApiError: 400, the server has one model and lives with it, or it was not fetched from a hub; 404, it went.
        """
        if self._loader is None or model.offered is None:
            raise only_one()
        if self._recognise(str(model.offered.engine.model)) is None:
            raise invalid("model", f"{model.name} was not fetched from a hub: whoever put it there removes its files")
        if model not in self.models:  # somebody else was sooner
            raise self._unknown(model.name)
        self.models.remove(model)  # first, so that nobody loads it any more
        try:
            await self.unload(model)
        except asyncio.CancelledError:  # nobody wants that any more, and its engine may run on
            self.models.append(model)
            raise
        try:
            await self._loader.delete(model.offered)
        except AphroditeError as error:
            logger.info("nothing was removed: %s", error)
            raise self._unknown(model.name) from None

    # --- using them ---------------------------------------------------------------------------------------------

    async def use(self, model: ServedModel) -> LoadedModel:
        """The model's engine, in use until the caller ends that (`LoadedModel.end_use`); loads it if need be.

        Raises:
            ApiError: it cannot be loaded, or too many wait already.
            EngineDeadError: the server's only engine has ended.
        """
        if self.dead.is_set():
            raise EngineDeadError("the engine process has ended")
        model.used = next(self._uses)
        loaded = model.loaded
        if loaded is None or not model.is_ready:
            return await self._wait(model)
        loaded.keep_alive = self._keep_alive(model)
        loaded.begin_use()
        return loaded

    def set_keep_alive(self, model: ServedModel, seconds: float | None) -> None:
        """Let a model stay so long without requests, until one comes that does not say; None is for ever."""
        if model.loaded is not None and not model.pinned:
            model.loaded.keep_alive = seconds
            self._idle(model.loaded)

    def seconds_left(self, model: ServedModel) -> float | None:
        """Until a loaded model is unloaded, if nobody asks for it; None is never."""
        loaded = model.loaded
        if loaded is None or loaded.keep_alive is None:
            return None
        return loaded.keep_alive if loaded.expires is None else max(0.0, loaded.expires - self._clock())

    async def load(self, model: ServedModel) -> None:
        """Load a model before a request asks for it.

        Raises:
            ApiError: it cannot be loaded, or too many wait already.
        """
        model.failure = None  # whoever asks for this wants it tried
        (await self.use(model)).end_use()

    def begin_load(self, model: ServedModel) -> None:
        """Have a model loaded while nobody waits for it; what becomes of it its state and its failure tell."""

        async def load() -> None:
            with contextlib.suppress(ApiError):  # which the log has
                await self.load(model)

        self._keep(load())

    async def unload(self, model: ServedModel) -> None:
        """End a model's engine once it has answered the requests that it has; those that come meanwhile load it again.

        Raises:
            ApiError: 400, the server has one model and lives with it.
        """
        if not self.loads:
            raise only_one()
        async with self._turn:
            if model.loaded is not None:
                model.leaving = True
                try:
                    await model.loaded.idle.wait()
                    await self._end(model)
                finally:
                    model.leaving = False

    async def expire(self) -> None:
        """Unload every model whose time without requests is over."""
        for model in list(self.models):
            if self._is_over(model):
                async with self._turn:
                    if self._is_over(model):  # still
                        logger.info("%s was not used for a while and is unloaded", model.name)
                        await self._end(model)

    def start(self) -> None:
        """Watch over the time of models that nobody uses."""
        self._keep(self._expire_in_time())

    async def close(self) -> None:
        """End all engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in self.models:
            if model.loaded is not None:
                await self._end(model)

    # --- loading ------------------------------------------------------------------------------------------------

    async def _wait(self, model: ServedModel) -> LoadedModel:
        """Wait until the model is loaded; one load serves all who wait."""
        if model.failure is not None and self._clock() < model.failure.until:
            raise model.failure.error.with_traceback(None)  # which would grow with every request
        waiting = sum(len(each.waiters) for each in self.models)
        if waiting >= self._limits.max_waiting:
            raise ApiError(
                503,
                f"{waiting} requests wait for models to be loaded, and no more may; try again in a moment.",
                code="models_busy",
                headers=retry_after(5),
            )
        waiter: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
        model.waiters.append(waiter)
        model.abandoned.clear()
        if model.loading is None:
            model.loading = self._keep(self._load(model))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().end_use()  # it was given the model, and is gone
            raise
        finally:
            if waiter in model.waiters:
                model.waiters.remove(waiter)
            if not model.waiters:
                model.abandoned.set()

    async def _load(self, model: ServedModel) -> None:
        """Bring the model in, and hand it to all who wait for it."""
        try:
            if self._loader is None or model.offered is None:
                raise EngineDeadError("the engine process has ended")
            prepared = await self._loader.prepare(model.offered, model.progress.report)
            async with self._turn:
                while model.waiters:
                    if model not in self.models:
                        raise self._unknown(model.name)
                    if model.loaded is not None and model.loaded.engine.dead.is_set():
                        await self._end(model)
                    if model.loaded is None and await self._make_room(model, prepared):
                        await self._start(model, self._loader, prepared)
                    if model.loaded is not None:
                        self._grant(model, model.loaded)
                        break
        except Exception as error:
            self._fail(model, error)
        finally:
            model.loading = None
            model.progress.set(None)

    async def _start(self, model: ServedModel, loader: ModelLoader, prepared: Prepared) -> None:
        logger.info("loading %s", model.name)
        engine, memory = await loader.start(prepared, model.progress.report)
        loaded = LoadedModel(engine, memory, lambda: self._idle(loaded))
        model.set_loaded(loaded)
        self._keep(self._watch(model, loaded))
        logger.info("loaded %s", model.name)

    def _grant(self, model: ServedModel, loaded: LoadedModel) -> None:
        loaded.keep_alive = self._keep_alive(model)
        for waiter in model.waiters:
            if not waiter.done():
                loaded.begin_use()
                waiter.set_result(loaded)
        if loaded.idle.is_set():
            self._idle(loaded)

    def _fail(self, model: ServedModel, error: Exception) -> None:
        """Tell those who wait, and nobody else."""
        if isinstance(error, ApiError):
            shown = error
        elif isinstance(error, AphroditeError):
            logger.error("%s cannot be loaded: %s", model.name, error)
            reason = _FOLDERS.sub("", str(error))
            shown = _not_loaded(f"The model {model.name!r} cannot be loaded: {reason}")
        else:
            logger.error("%s cannot be loaded", model.name, exc_info=error)
            shown = _not_loaded(f"The model {model.name!r} cannot be loaded; the server's log says why.")
        model.failure = LoadFailure(shown, self._clock() + FAILURE_SECONDS)
        for waiter in model.waiters:
            if not waiter.done():
                waiter.set_exception(shown)

    # --- making room --------------------------------------------------------------------------------------------

    async def _make_room(self, model: ServedModel, prepared: Prepared) -> bool:
        """Have others give way until the model fits; False if meanwhile nobody waits for it any more.

        Raises:
            ApiError: it cannot fit, whoever gives way.
        """
        self._check_fits(model, prepared)
        while not self._fits(prepared.estimate.total):
            others = {other: other.loaded for other in self.models if other.loaded is not None and not other.pinned}
            victim = min(others, key=lambda other: (not others[other].idle.is_set(), other.used))
            if not await self._give_way(victim, model, [loaded.idle for loaded in others.values()]):
                return False
        return True

    def _fits(self, needed: int) -> bool:
        memory = [model.loaded.memory for model in self.models if model.loaded is not None]
        most = self._limits.max_loaded
        return (most is None or len(memory) < most) and (self.budget is None or sum(memory) + needed <= self.budget)

    def _check_fits(self, model: ServedModel, prepared: Prepared) -> None:
        estimate, budget = prepared.estimate, self.budget
        pinned = [other.loaded for other in self.models if other.loaded is not None and other.pinned]
        if self._limits.max_loaded is not None and len(pinned) >= self._limits.max_loaded:
            raise _no_room(
                f"The model {model.name!r} cannot be loaded beside the {len(pinned)} that always stay: the server has"
                f" no more at the same time (--models-max {self._limits.max_loaded})."
            )
        taken = sum(loaded.memory for loaded in pinned)
        if budget is not None and taken + estimate.total > budget:
            beside = f", of which {size_text(taken)} are taken by models that always stay" if taken else ""
            raise _no_room(
                f"The model {model.name!r} needs {size_text(estimate.total)} ({size_text(estimate.weights)} of weights,"
                f" {size_text(estimate.kv_cache)} of KV cache, {size_text(estimate.beside)} beside), and there are"
                f" {size_text(budget)} for models (--models-memory){beside}. Give it a smaller max_model_len or"
                " kv_cache_memory, or take a smaller quantization."
            )

    async def _give_way(self, victim: ServedModel, model: ServedModel, idle: list[asyncio.Event]) -> bool:
        """Unload `victim` once it is idle, unless another one is sooner.

        Args:
            idle: of all that may give way.

        Returns:
            False if nobody waits for `model` any more. Else one of them is gone or idle.
        """
        victim.leaving = True
        waits = [asyncio.ensure_future(event.wait()) for event in (*idle, model.abandoned)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            gone = not model.waiters
            if not gone and victim.loaded is not None and victim.loaded.idle.is_set():
                logger.info("%s gives way to %s", victim.name, model.name)
                await self._end(victim)
            return not gone
        finally:
            victim.leaving = False
            for wait in waits:
                wait.cancel()

    async def _end(self, model: ServedModel) -> None:
        """End a model's engine. Who is cancelled meanwhile waits for that: its memory is not free before."""
        loaded, model.loaded = model.loaded, None
        if loaded is None:
            return
        closing = asyncio.ensure_future(loaded.engine.close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait((closing,))
            raise

    # --- watching -----------------------------------------------------------------------------------------------

    async def _watch(self, model: ServedModel, loaded: LoadedModel) -> None:
        """Notice when an engine ends by itself: its requests fail, and the next one has it loaded again."""
        await loaded.engine.dead.wait()
        if model.loaded is loaded:
            logger.error("the engine of %s has ended; it is loaded again when a request asks for it", model.name)
            await self._end(model)

    def _keep_alive(self, model: ServedModel) -> float | None:
        return None if model.offered is None or model.pinned else model.offered.server.keep_alive

    def _idle(self, loaded: LoadedModel) -> None:
        """From now on nobody uses the model."""
        if loaded.keep_alive is not None and loaded.idle.is_set():
            loaded.expires = self._clock() + loaded.keep_alive
            self._due.set()

    def _is_over(self, model: ServedModel) -> bool:
        loaded = model.loaded
        return loaded is not None and loaded.expires is not None and loaded.expires <= self._clock()

    async def _expire_in_time(self) -> None:
        while True:
            times = [model.loaded.expires for model in self.models if model.loaded and model.loaded.expires is not None]
            self._due.clear()
            try:
                async with asyncio.timeout(max(0.0, min(times) - self._clock()) if times else None):
                    await self._due.wait()
            except TimeoutError:
                await self.expire()

    def _unknown(self, name: str) -> ApiError:
        adapters = [adapter for model in self.models for adapter in model.adapter_names]
        has = ", ".join([*self.names, *adapters]) or "none yet"
        message = f"The model {name[:200]!r} does not exist here. This server has: {has}."
        return ApiError(404, message, param="model", code="model_not_found")

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` for as long as the pool is open."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def only_one() -> ApiError:
    """What needs several models was asked of a server that has one."""
    return ApiError(
        400,
        "This server was started for one model. Start it with --models-dir, or with a list of models in --config, to"
        " have several.",
        code="single_model",
    )


def _not_loaded(message: str) -> ApiError:
    return ApiError(500, message, param="model", code="model_load_failed", headers=NO_RETRY)


def _no_room(message: str) -> ApiError:
    return ApiError(503, message, param="model", code="insufficient_memory", headers=NO_RETRY)


def size_text(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
