"""How Ollama writes answers: lines of JSON, times, durations and names."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from pydantic import Field
from starlette.requests import Request

from aphrodite.config_values import parse_duration
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import ApiError, invalid
from aphrodite.server.sse import StreamFormat

_MAX_DURATION = 32  # characters
LONGEST = 100 * 365 * 86400.0  # seconds; what is beyond is for ever: dates and floats have an end, numbers in JSON none
KEEP_ALIVE: Any = Field(
    default=None,
    description="How long the model stays without requests, where the server has several: seconds, or a time such as "
    "5m; 0 unloads it behind the answer, below 0 it stays for ever.",
)


def ollama_error(error: ApiError) -> dict[str, Any]:
    """An error as Ollama writes it."""
    return {"error": error.message}


def line(value: Mapping[str, Any]) -> bytes:
    """One piece of a stream."""
    return msgspec.json.encode(value) + b"\n"


def _failure(error: ApiError) -> bytes:
    return line(ollama_error(error))


LINES = StreamFormat(media_type=b"application/x-ndjson", mark=b"", ping=b"", failure=_failure)


def timestamp(seconds: float | None = None) -> str:
    """A moment, in Unix seconds; by default this one."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def untagged(context: ServerContext, name: str) -> str:
    """The name of a model as the server knows it: an Ollama name's tag `latest` may be left out, or be too much."""
    return name if name in context.models.names else name.removesuffix(":latest")


async def resolve_ollama(context: ServerContext, request: Request, name: str, keep_alive: Any) -> ModelContext:
    """The model of a request, which stays as long without further ones as this one says.

    Raises:
        ApiError: 400, `keep_alive` is wrong; or see `ServerContext.resolve`.
    """
    wanted = None if keep_alive is None else (keep_alive_seconds(keep_alive),)
    model = await context.resolve(request, untagged(context, name))
    if wanted is not None:
        context.models.set_keep_alive(model.served, wanted[0])
    return model


def keep_alive_seconds(value: Any) -> float | None:
    """How long a request wants its model to stay: seconds, or a time such as 5m; below 0 is for ever (None).

    Raises:
        ApiError: 400, it is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if 0 <= value <= LONGEST else None
    if isinstance(value, str) and len(value) <= _MAX_DURATION:
        text = value.strip()
        sign, text = text.startswith("-"), text.removeprefix("-")
        seconds = float(text) if text.isascii() and text.isdigit() else parse_duration(text)
        if seconds is not None:
            return None if sign and seconds else seconds
    raise invalid("keep_alive", "must be seconds, or a time such as 5m; below 0 is for ever", code="invalid_type")
