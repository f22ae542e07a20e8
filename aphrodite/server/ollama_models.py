"""What Ollama's clients ask about models, and how they fetch and remove them."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.sampling.fields import to_mapping
from aphrodite.server.auth import require_admin
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import invalid
from aphrodite.server.model_admin import fetching
from aphrodite.server.ollama_format import LINES, LONGEST, line, timestamp, untagged
from aphrodite.server.ollama_reading import capabilities
from aphrodite.server.responses import json_response
from aphrodite.server.routing import delete, get, post
from aphrodite.server.served_model import ServedModel
from aphrodite.server.sse import EventResponse, EventStream

VERSION = "0.12.0"  # of Ollama, whose API this is; clients ask for it to know what they may send
_FOREVER = "9999-12-31T23:59:59Z"
_HOSTS = ("hf.co/", "huggingface.co/")  # under which Ollama has models of the hub


class ModelFields(pydantic.BaseModel):
    """`POST /api/show` and `DELETE /api/delete`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /api/tags.")
    name: str | None = Field(default=None, description="The same, as older clients call it.")

    @property
    def wanted(self) -> str:
        """The name.

        Raises:
            ApiError: 400, there is none.
        """
        name = self.model or self.name
        if name is None:
            raise invalid("model", "this field is required", code="missing_required_parameter")
        return name


class PullFields(ModelFields):
    """`POST /api/pull`."""

    model: str | None = Field(default=None, description="A model of the Hugging Face hub: ORG/NAME or ORG/NAME:Q4_K_M.")
    stream: bool = Field(default=True, description="Tell the progress, a line of JSON each.")
    insecure: bool = Field(default=False, description="Has no meaning here.")


def ollama_model_routes(context: ServerContext) -> list[Route]:
    """The routes of this module."""
    models = OllamaModels(context)
    return [
        get("/api/tags", models.tags),
        get("/api/ps", models.running),
        post("/api/show", models.show),
        post("/api/pull", models.pull),
        delete("/api/delete", models.delete),
        get("/api/version", models.version),
    ]


class OllamaModels:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def tags(self, request: Request) -> Response:
        """The models that can be asked for."""
        pool = self._context.models
        pool.refresh()
        return json_response({"models": [_card(model, name) for model in pool.models for name in model.names]})

    async def running(self, request: Request) -> Response:
        """The models that are loaded, and until when."""
        pool = self._context.models
        cards = []
        for model in pool.models:
            if model.loaded is not None:
                left = pool.seconds_left(model)
                extra = {
                    "expires_at": _FOREVER if left is None or left > LONGEST else timestamp(time.time() + left),
                    "size": model.loaded.memory,
                    "size_vram": 0,
                    "context_length": model.loaded.engine.model.max_model_len,
                }
                cards.append({**_card(model, model.name), **extra})
        return json_response({"models": cards})

    async def show(self, request: Request) -> Response:
        """One model: its template, its recommended parameters, its context."""
        fields = parse(ModelFields, await read_object(request, max_depth=self._context.config.max_json_depth))
        pool = self._context.models
        model = pool.find(untagged(self._context, fields.wanted))
        facts = await pool.facts(model)
        shown: dict[str, Any] = {
            "modelfile": "# served by Aphrodite Engine",
            "parameters": "",
            "template": "",
            "details": _details(),
            "model_info": {"general.architecture": "aphrodite", "general.basename": model.name},
            "capabilities": ["completion"],
        }
        if facts is not None:
            defaults = to_mapping(facts.sampling_defaults).items()
            shown["modelfile"] += f"\nFROM {facts.root}"
            shown["parameters"] = "\n".join(f"{key} {value}" for key, value in defaults)
            shown["template"] = facts.chat_template.source
            shown["capabilities"] = capabilities(facts.chat_template, model.config)
            shown["model_info"]["aphrodite.context_length"] = facts.max_model_len
            shown["model_info"]["aphrodite.vocab_size"] = facts.vocab_size
        return json_response(shown)

    async def pull(self, request: Request) -> Response | ASGIApp:
        """Fetch a model of the hub, which can be asked for from then on."""
        require_admin(request, self._context.config)
        fields = parse(PullFields, await read_object(request, max_depth=self._context.config.max_json_depth))
        name = fields.wanted
        for host in _HOSTS:
            name = name.removeprefix(host)
        context = self._context
        if fields.stream:
            return EventResponse(
                lambda events: self._pull(name, events),
                context.supervisor,
                write_timeout=context.config.write_timeout,
                format=LINES,
            )
        await context.supervisor.run(self._pull(name, None), request.receive)
        return json_response({"status": "success"})

    async def _pull(self, name: str, events: EventStream | None) -> None:
        found: list[ServedModel] = []
        async for come in fetching(self._context, name, found):
            if events is not None:
                digest = _digest(name)
                await events.write(
                    line({"status": come.label, "digest": digest, "total": come.total, "completed": come.done})
                )
        if events is not None:
            await events.write(line({"status": "success"}))

    async def delete(self, request: Request) -> Response:
        """Remove a fetched model from this machine, once it has answered the requests that it has."""
        require_admin(request, self._context.config)
        fields = parse(ModelFields, await read_object(request, max_depth=self._context.config.max_json_depth))
        pool = self._context.models
        model = pool.find(untagged(self._context, fields.wanted))
        await self._context.supervisor.run(pool.delete(model), request.receive)
        return Response()

    async def version(self, request: Request) -> Response:
        """The version of Ollama whose API this is."""
        return json_response({"version": VERSION})


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    root = "" if model.facts is None else model.facts.root
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(model.created),
        "size": 0,
        "digest": hashlib.sha256(f"{root} {name}".encode()).hexdigest(),
        "details": _details(),
    }


def _digest(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "",
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": "",
    }
