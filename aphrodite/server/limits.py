"""Bounds on what arrives before anything reads it: Host, content type, size and pace of the body."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import CLOSE, ApiError

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_WILDCARDS = frozenset({"0.0.0.0", "::", ""})
_DISCARD_SECONDS = 5.0


class RequestLimits:
    """ASGI wrapper around everything that reads a request.

    Args:
        any_type: paths whose clients send JSON under any content type.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, *, any_type: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._any_type = any_type
        self._hosts = AllowedHosts(config)
        self._max_body = config.max_body_bytes
        self._body_timeout = config.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._hosts.check([value for name, value in scope["headers"] if name == b"host"])
        headers = dict(scope["headers"])
        body = BoundedBody(receive, self._max_body, self._body_timeout)
        if scope["method"] == "POST":
            _check_content_type(headers, lenient=scope["path"] in self._any_type)
        await body.check_length(headers.get(b"content-length"), waits=b"expect" in headers)
        await self._app(scope, body.receive, send)


class AllowedHosts:
    """The `Host` header's allow-list: a page that rebinds its own name to this address does not get in.

    Loopback names, the bound address and configured names pass. Where the server is bound to a network,
    so does any numeric address: an attacker's page has a name.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._names = _LOOPBACK_NAMES | {name.strip("[]").lower() for name in (config.host, *config.allowed_hosts)}
        self._names -= _WILDCARDS
        self._any = "*" in config.allowed_hosts
        self._numeric = config.host not in _LOOPBACK_NAMES

    def check(self, values: list[bytes]) -> None:
        """Raises ApiError 403 unless there is exactly one value and it is allowed."""
        if self._any:
            return
        name = _host_name(values[0].decode("latin-1")) if len(values) == 1 else None
        if name is None or not (name in self._names or (self._numeric and _is_address(name))):
            raise ApiError(
                403,
                "This Host header is not allowed. Start the server with --allowed-hosts NAME to accept it.",
                code="host_not_allowed",
            )


def _host_name(value: str) -> str | None:
    """The lower-case name in `name[:port]`, without the brackets of an IPv6 address; None if it is neither."""
    if value.startswith("["):
        name, bracket, port = value[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = value.partition(":")
    if not name or (port and not (port.isascii() and port.isdigit())):
        return None
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_content_type(headers: Mapping[bytes, bytes], *, lenient: bool) -> None:
    """Refuse what a page may have forged: browsers send JSON across origins only after asking, and anything else at
    once, but never without saying that it comes from a page.

    Programs may leave the type out, as LiteLLM does for Ollama and SillyTavern where it ends a run of koboldcpp; a
    `lenient` path takes any type from them, as `curl -d` sends a form's.
    """
    kind = headers.get(b"content-type")
    from_page = b"origin" in headers or b"sec-fetch-site" in headers
    if not from_page and (kind is None or lenient):
        return
    if kind is None or kind.partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "Send the request with `Content-Type: application/json`.", code="unsupported_media_type")


class BoundedBody:
    """`receive` with a bound on the body's bytes, chunked or not, and on the time it takes to arrive."""

    def __init__(self, receive: Receive, max_bytes: int, timeout: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._deadline = time.monotonic() + timeout
        self._size = 0
        self._complete = False

    async def check_length(self, declared: bytes | None, *, waits: bool) -> None:
        """Refuse by the declared length; a client that `waits` for permission has sent nothing yet."""
        if declared is not None and (len(declared) > 15 or not declared.isdigit() or int(declared) > self._max_bytes):
            self._complete = waits
            await self._refuse()

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        message = await self._next()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._max_bytes:
                await self._refuse()
        return message

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "The request's body did not arrive in time.", code="request_timeout", headers=CLOSE
            ) from None

    async def _refuse(self) -> None:
        """Throw away a little of the rest first: clients that still send would otherwise miss the answer."""
        self._deadline = min(self._deadline, time.monotonic() + _DISCARD_SECONDS)
        discarded = 0
        while not self._complete and discarded <= self._max_bytes:
            try:
                message = await self._next()
            except ApiError:
                break
            discarded += len(message.get("body", b""))
            self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        raise ApiError(
            413,
            f"The request's body is larger than the {self._max_bytes} bytes this server accepts (--max-body-bytes).",
            code="request_too_large",
            headers=CLOSE,
        )
