"""One kind of error for all endpoints, in the shape of each protocol. 5xx texts are fixed; details go to the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from aphrodite.errors import EngineDeadError, InvalidRequestError, QueueFullError, RequestFailedError

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

Headers = tuple[tuple[bytes, bytes], ...]

# openai-python repeats 408, 409, 429 and 5xx; a generation that was too long would be too long again.
NO_RETRY: Headers = ((b"x-should-retry", b"false"),)
CLOSE: Headers = ((b"connection", b"close"),)


class ApiError(Exception):
    """An answer other than 2xx. `message` is shown to the client as it is.

    Attributes:
        status: HTTP status code.
        param: path of the field in the request (`messages[0].role`), or None.
        code: machine-readable code, or None.
        headers: response headers, for example `retry-after`.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Headers = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        if self.status >= 500:
            return "server_error"
        return _TYPES.get(self.status, "invalid_request_error")

    def encode(self, shape: ErrorShape | None = None) -> bytes:
        """The body, in a protocol's shape."""
        return msgspec.json.encode((shape or openai_error)(self))


ErrorShape = Callable[[ApiError], dict[str, Any]]
"""How a protocol writes an error."""


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's shape, with all four keys."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


class ClientDisconnectedError(Exception):
    """The client has gone; nobody reads an answer."""


def retry_after(seconds: float) -> Headers:
    return ((b"retry-after", str(max(1, round(seconds))).encode()),)


def unsupported(name: str, why: str) -> ApiError:
    """A field that would change the answer and that this server does not implement."""
    return ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")


def invalid(name: str | None, why: str, *, code: str | None = "invalid_value") -> ApiError:
    message = f"{name}: {why}" if name else why
    return ApiError(400, message, param=name, code=code)


def prompt_as(error: InvalidRequestError, field: str) -> InvalidRequestError:
    """What the engine says of a prompt, said of the field that the endpoint's clients sent instead."""
    return InvalidRequestError(str(error), param=field, code=error.code) if error.param == "prompt" else error


def shutting_down() -> ApiError:
    return ApiError(
        503, "The server is shutting down. Try again in a moment.", code="shutting_down", headers=retry_after(5)
    )


def engine_dead() -> ApiError:
    return ApiError(
        503, "The model's engine has stopped; try again in a moment.", code="engine_dead", headers=retry_after(10)
    )


def to_api_error(error: BaseException, request_id: str) -> ApiError:
    """Any exception as an answer. What a client may not see is logged under `request_id` instead."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), param=error.param, code=error.code or "invalid_value")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="server_overloaded", headers=retry_after(error.retry_after))
    if isinstance(error, EngineDeadError):
        return engine_dead()
    if isinstance(error, RequestFailedError):
        logger.error("request %s failed in the engine: %s", request_id, error)
        return ApiError(
            500, f"The engine could not finish this request ({request_id}).", code="request_failed", headers=NO_RETRY
        )
    if isinstance(error, HTTPException) and error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        return ApiError(
            405, f"This path answers {allow} only.", code="method_not_allowed", headers=((b"allow", allow.encode()),)
        )
    logger.error("request %s: unexpected error", request_id, exc_info=error)
    return ApiError(500, f"Internal error; the server's log has it under {request_id}.", code="internal_error")
