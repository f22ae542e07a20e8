"""What every endpoint of one server shares, and what a request has once its model is known."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from aphrodite.server.config import ServerConfig
from aphrodite.server.engine import Engine
from aphrodite.server.lifecycle import Lifecycle
from aphrodite.server.metrics import ModelMetrics, ServerMetrics
from aphrodite.server.model_pool import ModelPool
from aphrodite.server.resumable import StreamStore
from aphrodite.server.served_model import LoadedModel, ServedModel
from aphrodite.server.sse import EarlyStream, StreamFormat
from aphrodite.server.supervise import Supervisor


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a request works with once its model is known.

    Attributes:
        name: what to answer under: the name that the request asked for, else the model's first.
        loaded: the model's engine; whoever outlives the request holds it (`LoadedModel.hold`).
        adapter: the adapter that answers, where the request named one; None is the model alone.
    """

    name: str
    served: ServedModel
    loaded: LoadedModel
    supervisor: Supervisor
    adapter: str | None = None

    @property
    def engine(self) -> Engine:
        return self.loaded.engine

    @property
    def config(self) -> ServerConfig:
        """The server's settings, with the model's own sampler preset and parsers."""
        return self.served.config

    @property
    def metrics(self) -> ModelMetrics:
        return self.served.metrics


@dataclass(frozen=True, slots=True)
class ServerContext:
    models: ModelPool
    config: ServerConfig
    metrics: ServerMetrics
    lifecycle: Lifecycle
    supervisor: Supervisor
    streams: StreamStore

    def current(self) -> LoadedModel | None:
        """The model that was used last, if it is loaded: for those who look and load nothing."""
        return self.models.find(None).loaded if self.models.models else None

    async def resolve(self, request: Request, name: str | None, *, stream: StreamFormat | None = None) -> ModelContext:
        """The model that a request names, loaded for it if need be; None, or a name that was left empty, is the one
        used last. It stays until the request is answered.

        Args:
            stream: of the stream that the answer will be, which begins with signs of life while the model is loaded;
                None is an answer at once.

        Raises:
            ApiError: 404, no such model; or it cannot be loaded.
            ClientDisconnectedError: the client went away while the model was being loaded.
        """
        name = name or None
        served = self.models.find(name)
        holds: ExitStack = request.scope["state"]["holds"]

        async def hold() -> LoadedModel:
            loaded = await self.models.use(served)
            holds.callback(loaded.end_use)
            return loaded

        early: EarlyStream = request.scope["state"]["early"]
        tick = partial(early.ping, stream) if stream is not None and stream.ping else None
        loaded = await (hold() if served.is_ready else self.supervisor.run(hold(), request.receive, tick))
        adapter = None if name is None or name in served.names else name
        return ModelContext(served.names[0] if name is None else name, served, loaded, self.supervisor, adapter)


class RequestHolds:
    """ASGI wrapper: what a request holds (`scope["state"]["holds"]`, an ExitStack) is let go once it is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as holds:
            scope.setdefault("state", {})["holds"] = holds
            await self._app(scope, receive, send)
