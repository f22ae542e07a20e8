"""koboldcpp's embeddings: `POST /api/extra/embeddings`, which SillyTavern's vector storage asks."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aphrodite.engine.embedding import EmbeddingParams
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.embeddings import INPUT_SCHEMA, as_numbers, embed, openai_body, read_inputs
from aphrodite.server.openai.protocol import ignored_header
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post


class KoboldEmbeddingFields(pydantic.BaseModel):
    """`POST /api/extra/embeddings`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(description="Text, token ids, or a list of either.")
    truncate: bool = Field(default=True, description="Leave out the end of texts that are too long.")
    model: Any = Field(default=None, description="Has no meaning here: the loaded model answers.")


def kobold_embedding_routes(context: ServerContext) -> list[Route]:
    """The routes of this module."""
    return [post("/api/extra/embeddings", KoboldEmbeddingEndpoint(context).create)]


class KoboldEmbeddingEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """Embed one or more texts."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(KoboldEmbeddingFields, body)
        context = await self._context.resolve(request, None)
        inputs = await read_inputs(fields.input, context, field="input", special=True, truncate=fields.truncate)
        outputs = await embed(request, context, inputs, EmbeddingParams())
        headers = ignored_header(body, KoboldEmbeddingFields)
        return json_response(await openai_body(outputs, context, as_numbers), headers)
