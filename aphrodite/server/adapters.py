"""Adapters over HTTP: loading and unloading them as vLLM's clients do, and how `/v1/models` shows them.

A request computes with an adapter by naming it as its model. All of loading needs an admin key, for it reads files.
"""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from aphrodite.engine.loaded_adapters import LoadedAdapter
from aphrodite.errors import ConfigError
from aphrodite.server.auth import require_admin
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import ApiError, Headers
from aphrodite.server.openai.protocol import ignored_header
from aphrodite.server.routing import post
from aphrodite.server.served_model import ServedModel


class LoadAdapterFields(pydantic.BaseModel):
    """`POST /v1/load_lora_adapter`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    lora_name: str = Field(min_length=1, max_length=256, description="What requests name it by, as their model.")
    lora_path: str = Field(min_length=1, max_length=4096, description="A PEFT folder or a GGUF adapter.")
    model: str | None = Field(default=None, description="The model that it is for; without one that used last.")


class UnloadAdapterFields(pydantic.BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    lora_name: str = Field(min_length=1, max_length=256, description="Of a loaded adapter.")


def adapter_routes(context: ServerContext) -> list[Route]:
    endpoints = AdapterEndpoints(context)
    return [post("/v1/load_lora_adapter", endpoints.load), post("/v1/unload_lora_adapter", endpoints.unload)]


class AdapterEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def load(self, request: Request) -> Response:
        """Load an adapter that requests may name from then on."""
        require_admin(request, self._context.config)
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(LoadAdapterFields, body)
        if fields.lora_name in self._context.models.names:
            raise ApiError(400, f"{fields.lora_name!r} is the name of a model here.", param="lora_name")
        context = await self._context.resolve(request, fields.model)
        try:
            await context.engine.load_adapter(fields.lora_name, fields.lora_path)
        except ConfigError as error:
            raise ApiError(400, str(error), param="lora_path", code="adapter_not_loaded") from None
        text = f"Success: LoRA adapter '{fields.lora_name}' added successfully."
        return _answer(text, ignored_header(body, LoadAdapterFields))

    async def unload(self, request: Request) -> Response:
        """Offer an adapter no longer; answers when those that are computed with it have ended and it is gone."""
        require_admin(request, self._context.config)
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        name = parse(UnloadAdapterFields, body).lora_name
        for served in self._context.models.models:
            if served.loaded is not None and name in served.loaded.engine.adapters:
                with served.loaded.hold():
                    await served.loaded.engine.unload_adapter(name)
                text = f"Success: LoRA adapter '{name}' removed successfully."
                return _answer(text, ignored_header(body, UnloadAdapterFields))
        raise ApiError(404, f"There is no adapter {name!r} loaded.", param="lora_name", code="adapter_not_found")


def _answer(text: str, headers: Headers) -> Response:
    """In plain text, as vLLM answers."""
    return PlainTextResponse(text, headers={name.decode(): value.decode() for name, value in headers})


def adapter_card(served: ServedModel, name: str) -> dict[str, Any]:
    """What `/v1/models` says of an adapter beside what it says of its model."""
    found: LoadedAdapter | None = None
    if served.loaded is not None:
        found = next((adapter for adapter in served.loaded.engine.adapters if adapter.name == name), None)
    return {"parent": served.name, **({} if found is None else {"root": found.root, "lora_rank": found.rank})}
