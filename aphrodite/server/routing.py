"""Routes, grouped by the protocol that they belong to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from aphrodite.server.errors import ErrorShape, openai_error

Endpoint = Callable[[Request], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class RouteGroup:
    """What one protocol has: its routes, how its clients expect errors to look, and whether they send JSON under any
    content type."""

    protocol: str
    routes: list[Route]
    error_shape: ErrorShape = openai_error
    any_type: bool = False


def get(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["GET"])


def delete(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["DELETE"])


def post(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["POST"])
