"""The ASGI application: routes inside, and around them the layers that every request passes.

CORS → edge (request id, errors, counts) → limits (Host, content type, body) → authentication → gate
(draining, dead engine) → router. Plain Starlette routing is enough: bodies, errors and documentation
have rules of their own here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from aphrodite.server.auth import Authentication
from aphrodite.server.config import ServerConfig
from aphrodite.server.context import ServerContext
from aphrodite.server.docs import DocumentationEndpoints
from aphrodite.server.edge import Edge
from aphrodite.server.engine import Engine
from aphrodite.server.errors import ApiError
from aphrodite.server.health import HealthEndpoint, version
from aphrodite.server.lifecycle import Gate, Lifecycle
from aphrodite.server.limits import RequestLimits
from aphrodite.server.metrics import MetricsPage, ServerMetrics
from aphrodite.server.openai.chat import ChatEndpoint
from aphrodite.server.openai.completions import CompletionEndpoint
from aphrodite.server.openai.models import ModelsEndpoint
from aphrodite.server.presets import PresetsEndpoint
from aphrodite.server.supervise import Supervisor
from aphrodite.server.tokenize import TokenizerEndpoints

Endpoint = Callable[[Request], Awaitable[Any]]


class Application:
    """The server as an ASGI application.

    Attributes:
        routes: every route there is, for documentation and for tests.
        lifecycle: what runs, and the switch that starts draining.
    """

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.lifecycle = Lifecycle()
        metrics = ServerMetrics()
        context = ServerContext(engine, config, metrics, self.lifecycle, Supervisor(self.lifecycle, config))
        self.routes = _routes(context)
        app: ASGIApp = Router(self.routes, redirect_slashes=False, default=_not_found)
        app = Gate(app, engine, self.lifecycle)
        app = Authentication(app, config.api_keys)
        app = RequestLimits(app, config)
        app = Edge(app, metrics, log_requests=config.log_requests)
        # Outside of everything, so that pages of allowed origins can read errors too.
        self._app = _cors(app, config.cors_origins) if config.cors_origins else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._app(scope, receive, send)


def create_app(engine: Engine, config: ServerConfig) -> Application:
    """The application that serves `engine`; starting and stopping the engine is the caller's affair."""
    return Application(engine, config)


def _routes(context: ServerContext) -> list[Route]:
    models = ModelsEndpoint(context)
    tokenizer = TokenizerEndpoints(context)
    documentation = DocumentationEndpoints(context)
    routes = [
        _get("/v1/models", models.list),
        _get("/v1/models/{model_id:path}", models.show),
        _get("/v1/presets", PresetsEndpoint(context).list),
        _post("/v1/completions", CompletionEndpoint(context).create),
        _post("/v1/chat/completions", ChatEndpoint(context).create),
        _get("/health", HealthEndpoint(context).health),
        _get("/version", version),
        _get("/metrics", MetricsPage(context.engine, context.metrics).show),
        _get("/", documentation.home),
        _get("/docs", documentation.page),
        _get("/openapi.json", documentation.openapi),
    ]
    for prefix in ("", "/v1"):
        routes += [
            _post(f"{prefix}/tokenize", tokenizer.tokenize),
            _post(f"{prefix}/detokenize", tokenizer.detokenize),
            _get(f"{prefix}/tokenizer_info", tokenizer.info),
        ]
    return routes


def _get(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["GET"])


def _post(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["POST"])


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, "There is nothing at this path; /docs lists what there is.", code="not_found")


def _cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-api-key"],
        expose_headers=["x-request-id", "x-ignored-fields"],
        max_age=600,
    )
