"""The ASGI application: routes inside, and around them the layers that every request passes.

CORS → edge (request id, errors, counts) → limits (Host, content type, body) → authentication → gate
(draining, dead engine) → router. Plain Starlette routing is enough: bodies, errors and documentation
have rules of their own here.
"""

from __future__ import annotations

import re

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from aphrodite.errors import did_you_mean
from aphrodite.server.adapters import adapter_routes
from aphrodite.server.anthropic import anthropic_error, anthropic_routes
from aphrodite.server.auth import Authentication
from aphrodite.server.config import ServerConfig
from aphrodite.server.context import RequestHolds, ServerContext
from aphrodite.server.docs import DocumentationEndpoints
from aphrodite.server.edge import Edge
from aphrodite.server.embeddings import EmbeddingEndpoint
from aphrodite.server.errors import ApiError
from aphrodite.server.health import HealthEndpoint, version
from aphrodite.server.kobold import kobold_error, kobold_routes
from aphrodite.server.kobold_embed import kobold_embedding_routes
from aphrodite.server.lifecycle import Gate, Lifecycle
from aphrodite.server.limits import RequestLimits
from aphrodite.server.llama_cpp import llama_cpp_error, llama_cpp_routes
from aphrodite.server.llama_cpp_embed import llama_cpp_embedding_routes
from aphrodite.server.metrics import MetricsPage, ServerMetrics
from aphrodite.server.model_admin import kobold_admin_routes, router_admin_routes, tabby_admin_routes
from aphrodite.server.model_pool import ModelPool
from aphrodite.server.ollama import ollama_routes
from aphrodite.server.ollama_embed import ollama_embedding_routes
from aphrodite.server.ollama_format import ollama_error
from aphrodite.server.openai.chat import ChatEndpoint
from aphrodite.server.openai.completions import CompletionEndpoint
from aphrodite.server.openai.models import ModelsEndpoint
from aphrodite.server.openai.responses.endpoints import responses_routes
from aphrodite.server.presets import PresetsEndpoint
from aphrodite.server.probes import ProbeEndpoints
from aphrodite.server.resumable import StreamStore
from aphrodite.server.routing import RouteGroup, delete, get, post
from aphrodite.server.sse import EarlyStreams
from aphrodite.server.supervise import Supervisor
from aphrodite.server.tokenize import TokenizerEndpoints


class Application:
    """The server as an ASGI application.

    Attributes:
        groups: every route there is, by protocol.
        routes: all of them, for documentation and for tests.
        lifecycle: what runs, and the switch that starts draining.
    """

    def __init__(self, models: ModelPool, config: ServerConfig) -> None:
        self.lifecycle = Lifecycle()
        metrics = ServerMetrics()
        supervisor = Supervisor(self.lifecycle, config)
        streams = StreamStore(config.stream_resume_seconds, supervisor, write_timeout=config.write_timeout)
        context = ServerContext(models, config, metrics, self.lifecycle, supervisor, streams)
        self.groups = route_groups(context)
        self.routes = [route for group in self.groups for route in group.routes]
        shapes = {route.path: group.error_shape for group in self.groups for route in group.routes}
        any_type = frozenset(route.path for group in self.groups if group.any_type for route in group.routes)
        app: ASGIApp = Router(self.routes, redirect_slashes=False, default=self._not_found)
        app = Gate(RequestHolds(EarlyStreams(app)), models.dead, self.lifecycle)
        app = Authentication(app, config)
        app = RequestLimits(app, config, any_type=any_type)
        app = Edge(app, metrics, shapes, log_requests=config.log_requests)
        # Outside of everything, so that pages of allowed origins can read errors too.
        self._app = _cors(app, config.cors_origins) if config.cors_origins else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._app(scope, receive, send)

    async def _not_found(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = [route.path for route in self.routes if "{" not in route.path]
        raise ApiError(
            404,
            f"There is nothing at this path.{_meant(scope['path'], known)} /docs lists what there is.",
            code="not_found",
        )


def route_groups(context: ServerContext) -> list[RouteGroup]:
    """All routes, by protocol. No path stands in two groups: where protocols share one, its endpoint speaks both."""
    models = ModelsEndpoint(context)
    chat = ChatEndpoint(context)
    tokenizer = TokenizerEndpoints(context)
    documentation = DocumentationEndpoints(context)
    probes = ProbeEndpoints(context)
    openai = [
        get("/v1/models", models.list),
        get("/v1/models/{model_id:path}", models.show),
        post("/v1/completions", CompletionEndpoint(context).create),
        post("/v1/embeddings", EmbeddingEndpoint(context).create),
        post("/v1/chat/completions", chat.create),
        *responses_routes(context),
    ]
    own = [
        get("/v1/presets", PresetsEndpoint(context).list),
        get("/v1/streams/{stream_id}", context.streams.show),
        delete("/v1/streams/{stream_id}", context.streams.delete),
        get("/health", HealthEndpoint(context).health),
        get("/version", version),
        get("/metrics", MetricsPage(context.models, context.metrics).show),
        get("/", documentation.home),
        get("/docs", documentation.page),
        get("/openapi.json", documentation.openapi),
    ]
    vllm = [
        route
        for prefix in ("", "/v1")
        for route in (
            post(f"{prefix}/tokenize", tokenizer.tokenize),
            post(f"{prefix}/detokenize", tokenizer.detokenize),
            get(f"{prefix}/tokenizer_info", tokenizer.info),
        )
    ]
    tabby = [
        get("/v1/model", probes.model),
        get("/v1/model/list", models.list),
        post("/v1/token/encode", probes.encode),
        post("/v1/token/decode", probes.decode),
        get("/v1/auth/permission", probes.permission),
        get("/.well-known/serviceinfo", probes.service_info),
        *tabby_admin_routes(context),
    ]
    llama_cpp = [
        *llama_cpp_routes(context),
        *llama_cpp_embedding_routes(context),
        post("/chat/completions", chat.create),
        get("/props", probes.props),
        get("/slots", probes.slots),
        get("/models", models.list),
        *router_admin_routes(context),
    ]
    return [
        RouteGroup("OpenAI", openai),
        RouteGroup("Aphrodite", own),
        RouteGroup("vLLM; llama.cpp", vllm),
        RouteGroup("vLLM", adapter_routes(context)),
        RouteGroup("TabbyAPI", tabby),
        RouteGroup("llama.cpp", llama_cpp, llama_cpp_error),
        RouteGroup(
            "KoboldAI",
            [*kobold_routes(context), *kobold_admin_routes(context), *kobold_embedding_routes(context)],
            kobold_error,
        ),
        RouteGroup("Anthropic", anthropic_routes(context), anthropic_error),
        RouteGroup("Ollama", [*ollama_routes(context), *ollama_embedding_routes(context)], ollama_error, any_type=True),
    ]


def _meant(path: str, known: list[str]) -> str:
    """A sentence with the path that is likely meant, or nothing.

    What goes wrong most is the address that a client puts its own paths behind: with /v1 or without, a slash too many.
    """
    plain = "/" + "/".join(part for part in path[:200].split("/") if part)
    versionless = re.sub(r"^(/v1)+(?=/)", "", plain)
    for likely in (plain, f"/v1{versionless}", versionless):
        if likely in known:
            return f" Did you mean {likely}?"
    return did_you_mean(plain, known)


def _cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # of these origins: openai's and Anthropic's packages add headers of their own in pages
        expose_headers=["x-request-id", "x-ignored-fields", "x-stream-id"],
        max_age=600,
    )
