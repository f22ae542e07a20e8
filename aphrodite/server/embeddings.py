"""Embeddings: `POST /v1/embeddings`, and what the other protocols' endpoints share with it."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from aphrodite.core.plan import Pooling
from aphrodite.engine.embedding import EmbeddingOutput, EmbeddingParams, check_embedding
from aphrodite.errors import InvalidRequestError
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import invalid
from aphrodite.server.openai.prompts import check_ids, encode, split_prompts
from aphrodite.server.openai.protocol import ignored_header
from aphrodite.server.responses import json_response

MAX_INPUTS = 2048  # of one request, as OpenAI has it
_BYTES_PER_VALUE = 20  # of a number in JSON

INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_INPUTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
            "maxItems": MAX_INPUTS,
        },
    ]
}


class EmbeddingFields(pydantic.BaseModel):
    """`POST /v1/embeddings`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(
        description="Text, token ids, or a list of either: each becomes one embedding."
    )
    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="Numbers, or the base64 of little-endian float32."
    )
    dimensions: int | None = Field(
        default=None, description="Keep the first so many values, for models trained to allow it.", ge=1, lt=2**31
    )
    pooling: Pooling | None = Field(
        default=None,
        description="What makes the embedding: the mean of all hidden states, the last or the first; by default what"
        " the checkpoint says, else the last.",
    )
    normalize: bool | None = Field(
        default=None, description="Make the length 1; by default so unless the checkpoint says otherwise."
    )
    add_special_tokens: bool = Field(default=True, description="Let the tokenizer add begin-of-sequence and the like.")
    priority: int = Field(
        default=0, description="Lower is sooner, where the server schedules by it.", ge=-(2**31), lt=2**31
    )
    cache_salt: str | None = Field(
        default=None, description="Only requests of the same salt share cached prefixes.", min_length=1, max_length=256
    )
    user: str | None = Field(default=None, description="Has no meaning here.")

    @property
    def params(self) -> EmbeddingParams:
        return EmbeddingParams(self.pooling, self.normalize, self.dimensions)


class EmbeddingEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """Embed one or more texts."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(EmbeddingFields, body)
        context = await self._context.resolve(request, fields.model)
        inputs = await read_inputs(fields.input, context, field="input", special=fields.add_special_tokens)
        outputs = await embed(
            request, context, inputs, fields.params, priority=fields.priority, cache_salt=fields.cache_salt
        )
        write = _as_base64 if fields.encoding_format == "base64" else as_numbers
        return json_response(await openai_body(outputs, context, write), ignored_header(body, EmbeddingFields))


async def read_inputs(
    value: Any, context: ModelContext, *, field: str, special: bool, truncate: bool = False
) -> list[list[int]]:
    """Token ids of all inputs of a request.

    Args:
        field: that brought `value`, for messages.
        special: whether the tokenizer adds its own.
        truncate: leave out the end of what is too long, instead of refusing it.

    Raises:
        ApiError, InvalidRequestError: 400, naming `field`.
    """
    limit = context.engine.model.max_model_len
    inputs = []
    for index, part in enumerate(split_prompts(value, field=field, most=MAX_INPUTS)):
        ids = part
        if isinstance(ids, str):
            ids = await encode(ids, context, field=field, special=special, bounded=not truncate)
        if not ids:
            raise invalid(field, f"{field} {index} is empty: send at least one token")
        check_ids(ids, context, field=field)
        if len(ids) > limit and not truncate:
            message = f"This model's maximum context length is {limit} tokens, but {field} {index} has {len(ids)}."
            raise InvalidRequestError(message, param=field, code="context_length_exceeded")
        inputs.append(ids[:limit])
    return inputs


async def embed(
    request: Request,
    context: ModelContext,
    inputs: Sequence[list[int]],
    params: EmbeddingParams,
    *,
    priority: int = 0,
    cache_salt: str | None = None,
) -> list[EmbeddingOutput]:
    """The embeddings of all inputs, in order, for as long as the client stays.

    Raises:
        AphroditeError: the model makes none, or not of these, or one failed.
        ClientDisconnectedError: the client has gone.
    """
    check_embedding(params, context.engine.model.embedding)
    # As many at once as the engine computes, and as many waiting, so that a long list does not fill its queue.
    places = asyncio.Semaphore(2 * context.engine.model.max_num_seqs)
    name = f"embd-{uuid.uuid4().hex}"

    async def one(number: int, ids: list[int]) -> EmbeddingOutput:
        async with places:
            output = await context.engine.embed(
                ids,
                params,
                request_id=f"{name}-{number}",
                priority=priority,
                cache_salt=cache_salt,
                adapter=context.adapter,
            )
        context.metrics.prompt_tokens += len(ids)
        return output

    async def every() -> list[EmbeddingOutput]:
        tasks = [asyncio.ensure_future(one(number, ids)) for number, ids in enumerate(inputs)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return await context.supervisor.run(every(), request.receive)


async def openai_body(
    outputs: Sequence[EmbeddingOutput], context: ModelContext, write: Callable[[np.ndarray], list[float] | str]
) -> bytes:
    """Embeddings in JSON as OpenAI has it; `write` makes what stands for one."""

    def build() -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": write(output.values)}
            for index, output in enumerate(outputs)
        ]
        tokens = num_tokens(outputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return msgspec.json.encode({"object": "list", "data": data, "model": context.name, "usage": usage})

    return await off_loop(json_bytes(outputs), build)


def num_tokens(outputs: Sequence[EmbeddingOutput]) -> int:
    """Of all inputs."""
    return sum(len(output.prompt_token_ids) for output in outputs)


def json_bytes(outputs: Sequence[EmbeddingOutput]) -> int:
    """Roughly what the embeddings cost to write, in the measure of `off_loop`."""
    return _BYTES_PER_VALUE * sum(output.values.size for output in outputs)


def as_numbers(values: np.ndarray) -> list[float]:
    """An embedding as JSON has it."""
    numbers: list[float] = values.tolist()
    return numbers


def _as_base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
