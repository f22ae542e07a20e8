"""Ollama's embeddings: `POST /api/embed`, and `POST /api/embeddings` for older clients."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aphrodite.engine.embedding import EmbeddingOutput, EmbeddingParams
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.embeddings import as_numbers, embed, json_bytes, num_tokens, read_inputs
from aphrodite.server.ollama_format import KEEP_ALIVE, resolve_ollama
from aphrodite.server.openai.protocol import ignored_header
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post


class OllamaEmbeddingFields(pydantic.BaseModel):
    """What both ways of embedding take."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str = Field(description="A name from /api/tags.")
    options: dict[str, Any] = Field(default={}, description="Has no meaning here.")
    keep_alive: Any = KEEP_ALIVE


class OllamaEmbedFields(OllamaEmbeddingFields):
    """`POST /api/embed`."""

    input: str | list[str] = Field(default=[], description="One text or several.")
    truncate: bool = Field(default=True, description="Leave out the end of texts that are too long.")
    dimensions: int | None = Field(default=None, description="Keep the first so many values.", ge=1, lt=2**31)


class OllamaEmbeddingsFields(OllamaEmbeddingFields):
    """`POST /api/embeddings`."""

    prompt: str = Field(default="", description="The text.")


def ollama_embedding_routes(context: ServerContext) -> list[Route]:
    """The routes of this module."""
    endpoints = OllamaEmbeddingEndpoints(context)
    return [post("/api/embed", endpoints.embed), post("/api/embeddings", endpoints.embeddings)]


class OllamaEmbeddingEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def embed(self, request: Request) -> Response:
        """Embed one or more texts."""
        began = time.perf_counter()
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(OllamaEmbedFields, body)
        context = await resolve_ollama(self._context, request, fields.model, fields.keep_alive)
        texts = [fields.input] if isinstance(fields.input, str) else fields.input
        outputs: list[EmbeddingOutput] = []
        if texts:
            inputs = await read_inputs(texts, context, field="input", special=True, truncate=fields.truncate)
            outputs = await embed(request, context, inputs, EmbeddingParams(dimensions=fields.dimensions))

        def build() -> bytes:
            return msgspec.json.encode(
                {
                    "model": context.name,
                    "embeddings": [as_numbers(output.values) for output in outputs],
                    "total_duration": int((time.perf_counter() - began) * 1e9),
                    "load_duration": 0,
                    "prompt_eval_count": num_tokens(outputs),
                }
            )

        whole = await off_loop(json_bytes(outputs), build)
        return json_response(whole, ignored_header(body, OllamaEmbedFields))

    async def embeddings(self, request: Request) -> Response:
        """Embed a text, without making its length 1."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(OllamaEmbeddingsFields, body)
        context = await resolve_ollama(self._context, request, fields.model, fields.keep_alive)
        values: list[float] = []
        if fields.prompt:
            inputs = await read_inputs(fields.prompt, context, field="prompt", special=True, truncate=True)
            (output,) = await embed(request, context, inputs, EmbeddingParams(normalize=False))
            values = as_numbers(output.values)
        return json_response({"embedding": values}, ignored_header(body, OllamaEmbeddingsFields))
