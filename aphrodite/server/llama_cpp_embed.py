"""llama.cpp's own way of embedding: `POST /embedding` and `POST /embeddings`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aphrodite.engine.embedding import EmbeddingParams
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.embeddings import INPUT_SCHEMA, as_numbers, embed, json_bytes, read_inputs
from aphrodite.server.errors import invalid
from aphrodite.server.openai.protocol import ignored_header
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post

_EUCLIDEAN = 2
_INT16_PEAK = 32760.0


class LlamaCppEmbeddingFields(pydantic.BaseModel):
    """`POST /embedding`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    content: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(
        default=None, description="Text, token ids, or a list of either."
    )
    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(default=None, description="The same.")
    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    embd_normalize: int = Field(
        default=_EUCLIDEAN,
        description="-1: as it is; 0: largest value to 32760; 1: sum to 1; 2: length to 1; p: p-norm to 1.",
        ge=-1,
        le=100,
    )


def llama_cpp_embedding_routes(context: ServerContext) -> list[Route]:
    """The routes of this module."""
    create = LlamaCppEmbeddingEndpoint(context).create
    return [post("/embedding", create), post("/embeddings", create)]


class LlamaCppEmbeddingEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """Embed one or more texts."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(LlamaCppEmbeddingFields, body)
        name, value = ("content", fields.content) if fields.input is None else ("input", fields.input)
        if value is None:
            raise invalid("content", "this field is required", code="missing_required_parameter")
        context = await self._context.resolve(request, fields.model)
        inputs = await read_inputs(value, context, field=name, special=True)
        outputs = await embed(request, context, inputs, EmbeddingParams(normalize=False))

        def build() -> bytes:
            scaled = [_scaled(output.values, fields.embd_normalize) for output in outputs]
            return msgspec.json.encode(
                [{"index": index, "embedding": [as_numbers(values)]} for index, values in enumerate(scaled)]
            )

        whole = await off_loop(json_bytes(outputs), build)
        return json_response(whole, ignored_header(body, LlamaCppEmbeddingFields))


def _scaled(values: np.ndarray, kind: int) -> np.ndarray:
    """`values` float32 by llama.cpp's number of a normalisation; zeros stay what they are."""
    wide = values.astype(np.float64)
    if kind == 0:
        size = np.abs(wide).max() / _INT16_PEAK
    else:
        size = 1.0 if kind < 0 else np.linalg.norm(wide, kind)
    return (wide / size if size else wide).astype(np.float32)
