"""Who may come in: every path needs a key unless it is listed here, and what changes the server an admin key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import ApiError

STATIC_PATHS = frozenset({"/", "/docs"})
PUBLIC_PATHS = STATIC_PATHS | {"/health"}


class Authentication:
    """ASGI wrapper: `Authorization: Bearer KEY` or `X-API-Key: KEY`, compared in constant time.

    An admin key (also as `X-Admin-Key: KEY`) opens whatever other keys open, and what `require_admin` guards.

    Only SHA-256 digests of the keys are kept. The decision looks at `scope["path"]`, which is what the
    router matches, never at a URL rebuilt from the `Host` header.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._digests = _digests(config.api_keys)
        self._admin_digests = _digests(config.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        candidates = _credentials(scope["headers"]) if self._digests or self._admin_digests else []
        admitted, admin = _known(candidates, self._digests), _known(candidates, self._admin_digests)
        if self._digests and scope["path"] not in PUBLIC_PATHS and admitted is None and admin is None:
            raise ApiError(
                401,
                "A valid API key is needed: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        state = scope.setdefault("state", {})
        state["api_key_digest"], state["is_admin"] = admitted, admin is not None
        await self._app(scope, receive, send)


def is_admin(request: Request) -> bool:
    """Whether the request brought an admin key."""
    return bool(request.scope["state"]["is_admin"])


def require_admin(request: Request, config: ServerConfig) -> None:
    """Let pass only who brought an admin key. Without any such key nobody passes.

    Raises:
        ApiError: 403.
    """
    if is_admin(request):
        return
    if not config.admin_keys:
        raise ApiError(
            403, "This path is closed. Start the server with --admin-key KEY to open it.", code="admin_key_not_set"
        )
    raise ApiError(
        403,
        "This path needs the server's admin key: send it as `Authorization: Bearer KEY` or `X-Admin-Key: KEY`.",
        code="admin_key_needed",
    )


def _known(candidates: Iterable[bytes], digests: Iterable[bytes]) -> bytes | None:
    """The digest of a known key among those that a request brought."""
    found = None
    for candidate in candidates:
        digest = _digest(candidate)
        for known in digests:  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, known):
                found = known
    return found


def _digests(keys: Iterable[str]) -> list[bytes]:
    return [_digest(key.encode()) for key in keys]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    found = []
    for name, value in headers:
        if name in (b"x-api-key", b"x-admin-key"):
            found.append(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                found.append(key.strip())
    return found
