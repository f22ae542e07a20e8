"""Who may come in: every path needs a key unless it is listed here."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from aphrodite.server.errors import ApiError

STATIC_PATHS = frozenset({"/", "/docs"})
PUBLIC_PATHS = STATIC_PATHS | {"/health"}


class Authentication:
    """ASGI wrapper: `Authorization: Bearer KEY` or `X-API-Key: KEY`, compared in constant time.

    Only SHA-256 digests of the keys are kept. The decision looks at `scope["path"]`, which is what the
    router matches, never at a URL rebuilt from the `Host` header.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        admitted = self._admitted(scope) if self._digests else None
        if self._digests and scope["path"] not in PUBLIC_PATHS and admitted is None:
            raise ApiError(
                401,
                "A valid API key is needed: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        scope.setdefault("state", {})["api_key_digest"] = admitted
        await self._app(scope, receive, send)

    def _admitted(self, scope: Scope) -> bytes | None:
        """The digest of a known key that the request brought."""
        admitted = None
        for candidate in _credentials(scope["headers"]):
            digest = _digest(candidate)
            for known in self._digests:  # all of them, so that time tells nothing
                if hmac.compare_digest(digest, known):
                    admitted = known
        return admitted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    found = []
    for name, value in headers:
        if name == b"x-api-key":
            found.append(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                found.append(key.strip())
    return found
