"""From a request's bytes to a checked object: strict JSON, bounded nesting, errors that name the field."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pydantic
from starlette.requests import ClientDisconnect, Request

from aphrodite.server.errors import ApiError, ClientDisconnectedError, invalid

T = TypeVar("T")
Model = TypeVar("Model", bound=pydantic.BaseModel)

# Work on more than this many bytes leaves the event loop: everybody's streams go through that loop.
THREAD_BYTES = 16 * 1024
# What a token of a whole answer counts for in this measure, log-probabilities in mind.
BYTES_PER_TOKEN = 8
# The same with a trace of every sampling stage.
BYTES_PER_TRACED_TOKEN = 4096


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Run `work` here if its input of `size` bytes is small, else in a thread."""
    return work() if size <= THREAD_BYTES else await asyncio.to_thread(work)


async def read_object(request: Request, *, max_depth: int, optional: bool = False) -> dict[str, Any]:
    """The request's body as a JSON object. NaN, Infinity and numbers beyond double range are no JSON.

    Args:
        optional: no body at all is an empty object.

    Raises:
        ApiError: 400, what is wrong with the body.
        ClientDisconnectedError: the client went away before the body's end.
    """
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    if optional and not body:
        return {}
    return await off_loop(len(body), lambda: _decode(body, max_depth))


def _decode(body: bytes, max_depth: int) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except UnicodeDecodeError:
        raise invalid(None, "The request's body is not valid UTF-8.", code="invalid_json") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        # The decoder speaks of the position and the kind of the problem, never of the content.
        raise invalid(None, f"The request's body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(None, "The request's body must be a JSON object.", code="invalid_json")
    if body.count(b"[") + body.count(b"{") > max_depth and _deeper_than(value, max_depth):
        raise _too_deep(max_depth)
    return value


def _too_deep(max_depth: int) -> ApiError:
    return invalid(None, f"The request's body is nested deeper than {max_depth} levels.", code="invalid_json")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def parse(model: type[Model], fields: dict[str, Any]) -> Model:
    """Check the fields that `model` declares; others are left to the caller. None means "not given".

    Raises:
        ApiError: 400 with the path of the first wrong field.
    """
    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = field_path(first["loc"])
        if first["type"] == "missing":
            raise invalid(path, "this field is required", code="missing_required_parameter") from None
        code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
        raise invalid(path, _reason(first["msg"]), code=code) from None


def field_path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "must be")
