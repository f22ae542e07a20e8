"""Loading, unloading and fetching models on request, as TabbyAPI, llama.cpp's router and koboldcpp do it.

All of it needs an admin key. What ordinary requests do (naming a model has it loaded) does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.server.auth import require_admin
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import ApiError, invalid
from aphrodite.server.model_pool import only_one
from aphrodite.server.openai.protocol import ignored_header
from aphrodite.server.responses import json_response
from aphrodite.server.routing import get, post
from aphrodite.server.served_model import LoadProgress, ProgressFeed, ServedModel
from aphrodite.server.sse import EventResponse, EventStream, StreamFormat, event

T = TypeVar("T")
_STEPS = 200  # most events of one phase
_MIB = 1 << 20


class TabbyLoadFields(pydantic.BaseModel):
    """`POST /v1/model/load`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model_name: str | None = Field(default=None, description="A name from /v1/models, or of a model on the hub.")
    model: str | None = Field(default=None, description="The same.")
    name: str | None = Field(default=None, description="The same, as older clients call it.")


class TabbyUnloadFields(TabbyLoadFields):
    """`POST /v1/model/unload`. Without a name the model used last is meant."""


class DownloadFields(pydantic.BaseModel):
    """`POST /v1/model/download`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="ORG/NAME, ORG/NAME:Q4_K_M or ORG/NAME@REVISION.")
    repo_id: str | None = Field(default=None, description="The same, as TabbyAPI's clients call it.")
    revision: str | None = Field(default=None, description="A branch, tag or commit.")


class RouterFields(pydantic.BaseModel):
    """`POST /models/load` and `POST /models/unload` of llama.cpp's router."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str = Field(description="A name from /models.")


class ReloadFields(pydantic.BaseModel):
    """`POST /api/admin/reload_config` of koboldcpp."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    filename: str = Field(description="A name from /api/admin/list_options.")


_FORMAT = StreamFormat(mark=b"", failure=lambda error: event(error.encode()))


def tabby_admin_routes(context: ServerContext) -> list[Route]:
    admin = ModelAdmin(context)
    return [
        post("/v1/model/load", admin.load),
        post("/v1/model/unload", admin.unload),
        post("/v1/model/download", admin.download),
    ]


def router_admin_routes(context: ServerContext) -> list[Route]:
    admin = ModelAdmin(context)
    return [post("/models/load", admin.begin_load), post("/models/unload", admin.router_unload)]


def kobold_admin_routes(context: ServerContext) -> list[Route]:
    admin = ModelAdmin(context)
    return [
        get("/api/admin/list_options", admin.options),
        post("/api/admin/reload_config", admin.reload),
    ]


class ModelAdmin:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def load(self, request: Request) -> ASGIApp:
        """Load a model; its progress comes as server-sent events."""
        body = await self._body(request)
        fields = parse(TabbyLoadFields, body)
        model = self._model(fields.model_name or fields.model or fields.name)
        pool = self._context.models

        async def produce(events: EventStream) -> None:
            last = LoadProgress("", 0, 0)
            async for last in follow(pool.load(model), model.progress):
                await events.write(_tabby_event(last, "processing"))
            done = max(1, last.total)
            await events.write(_tabby_event(LoadProgress(last.label, done, done), "finished"))

        return self._events(produce, ignored_header(body, TabbyLoadFields))

    async def unload(self, request: Request) -> Response:
        """Unload a model once it has answered the requests that it has."""
        fields = parse(TabbyUnloadFields, await self._body(request, optional=True))
        name = fields.model_name or fields.model or fields.name
        model = self._context.models.find(name)
        await self._unload(request, model)
        return json_response({"model": model.name, "status": model.state})

    async def download(self, request: Request) -> ASGIApp:
        """Fetch a model of the hub, which can be asked for from then on; its progress comes as server-sent events."""
        fields = parse(DownloadFields, await self._body(request))
        name = fields.model or fields.repo_id
        if name is None:
            raise _missing("model")
        named = name if fields.revision is None else f"{name}@{fields.revision}"

        async def produce(events: EventStream) -> None:
            found: list[ServedModel] = []
            async for come in fetching(self._context, named, found):
                await events.write(_event(model=named, status="downloading", completed=come.done, total=come.total))
            await events.write(_event(model=found[0].name, status="finished"))

        return self._events(produce, ())

    async def begin_load(self, request: Request) -> Response:
        """Begin to load a model; how far it is /models tells."""
        fields = parse(RouterFields, await self._body(request))
        self._context.models.begin_load(self._model(fields.model))
        return json_response({"success": True})

    async def router_unload(self, request: Request) -> Response:
        """Unload a model once it has answered the requests that it has."""
        fields = parse(RouterFields, await self._body(request))
        await self._unload(request, self._context.models.find(fields.model))
        return json_response({"success": True})

    async def options(self, request: Request) -> Response:
        """The models that can be loaded."""
        require_admin(request, self._context.config)
        return json_response([model.name for model in self._context.models.models])

    async def reload(self, request: Request) -> Response:
        """Load a model, which answers requests that name none from then on."""
        fields = parse(ReloadFields, await self._body(request))
        pool = self._context.models
        await self._context.supervisor.run(pool.load(self._model(fields.filename)), request.receive)
        return json_response({"success": True})

    async def _body(self, request: Request, *, optional: bool = False) -> dict[str, Any]:
        """The body of a request that may change what is loaded.

        Raises:
            ApiError: 403, without an admin key; 400, this server has one model and lives with it.
        """
        require_admin(request, self._context.config)
        if not self._context.models.loads:
            raise only_one()
        return await read_object(request, max_depth=self._context.config.max_json_depth, optional=optional)

    def _model(self, name: str | None) -> ServedModel:
        if name is None:
            raise _missing("model_name")
        return self._context.models.find_or_offer(name)

    async def _unload(self, request: Request, model: ServedModel) -> None:
        await self._context.supervisor.run(self._context.models.unload(model), request.receive)

    def _events(
        self, produce: Callable[[EventStream], Coroutine[Any, Any, None]], headers: tuple[tuple[bytes, bytes], ...]
    ) -> ASGIApp:
        timeout = self._context.config.write_timeout
        return EventResponse(produce, self._context.supervisor, write_timeout=timeout, headers=headers, format=_FORMAT)


async def fetching(context: ServerContext, name: str, found: list[ServedModel]) -> AsyncIterator[LoadProgress]:
    """Fetch a model of the hub; yields how far it is, and puts the model into `found`.

    Raises:
        ApiError: see `ModelPool.fetch`.
    """
    feed, loop = ProgressFeed(), asyncio.get_running_loop()

    def listener(come: int, total: int) -> None:  # in the download's threads
        loop.call_soon_threadsafe(feed.set, LoadProgress(f"pulling {name}", come, total))

    async def fetch() -> None:
        found.append(await context.models.fetch(name, listener))

    async for progress in follow(fetch(), feed):
        yield progress


async def follow(work: Coroutine[Any, Any, None], feed: ProgressFeed) -> AsyncIterator[LoadProgress]:
    """Run `work`; yields how far it is, not more than some hundred times, and raises what it raises."""
    task = asyncio.ensure_future(work)
    shown: tuple[str, int] | None = None
    try:
        while not task.done():
            change = asyncio.ensure_future(feed.wait())
            try:
                await asyncio.wait((task, change), return_when=asyncio.FIRST_COMPLETED)
            finally:
                change.cancel()
            latest = feed.latest
            if latest is not None and (step := (latest.label, latest.done * _STEPS // max(1, latest.total))) != shown:
                shown = step
                yield latest
        task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


def _tabby_event(progress: LoadProgress, status: str) -> bytes:
    """TabbyAPI counts modules; here they are MiB of weights."""
    total = max(1, -(-progress.total // _MIB))
    return _event(
        model_type="model",
        module=min(total, progress.done // _MIB) if status == "processing" else total,
        modules=total,
        status=status,
        phase=progress.label,
        bytes=progress.done,
        total_bytes=progress.total,
    )


def _event(**content: Any) -> bytes:
    return event(msgspec.json.encode(content))


def _missing(name: str) -> ApiError:
    return invalid(name, "this field is required", code="missing_required_parameter")
