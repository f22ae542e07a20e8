"""Every route needs a key unless it is on the public list, whatever a request does to its path or headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from aphrodite.server.app import Application
from aphrodite.server.auth import PUBLIC_PATHS

KEY = "sk-secret"
BASE = "http://127.0.0.1:2242"


def client(app: Application) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=BASE)


@pytest.fixture
def app(make_app: Callable[..., Any]) -> Application:
    application, _ = make_app(api_keys=("other", KEY), allowed_hosts=("*",))
    return application


def concrete(path: str) -> str:
    return path.replace("{model_id:path}", "fake/story")


async def test_the_public_list_is_what_it_is() -> None:
    assert {"/", "/docs", "/health"} == PUBLIC_PATHS


WRONG: list[dict[str, str]] = [
    {}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY},
    {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Bearer {KEY[:-1]}"}, {"authorization": "Bearer "},
    {"x-api-key": ""}, {"x-api-key": hashlib.sha256(KEY.encode()).hexdigest()}, {"cookie": f"key={KEY}"},
    {"host": "localhost/health?x="}, {"host": "127.0.0.1/docs#"}, {"x-forwarded-prefix": "/health"},
    {"x-original-url": "/health"}, {"x-rewrite-url": "/health"}, {"x-forwarded-for": "127.0.0.1"},
]  # fmt: skip


async def test_every_other_route_is_closed(app: Application) -> None:
    closed = [route for route in app.routes if route.path not in PUBLIC_PATHS]
    assert len(closed) >= 12
    async with client(app) as http:
        for route in closed:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
                for headers in WRONG:
                    response = await http.request(
                        method, concrete(route.path), headers={"content-type": "application/json", **headers}
                    )
                    assert response.status_code == 401, (route.path, method, headers)
                    if method != "HEAD":
                        assert "valid API key" in response.text  # in the shape of the path's protocol


@pytest.mark.parametrize("key", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY} "},
                                 {"x-api-key": KEY}, {"X-API-Key": "other"},
                                 {"authorization": "Bearer wrong", "x-api-key": KEY}])  # fmt: skip
async def test_a_key_opens(app: Application, key: dict[str, str]) -> None:
    async with client(app) as http:
        assert (await http.get("/v1/models", headers=key)).status_code == 200


async def test_public_routes_need_none(app: Application) -> None:
    async with client(app) as http:
        for path in PUBLIC_PATHS:
            assert (await http.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1//models", "/v1/models/", "/V1/Models", "/v1/%6dodels", "/%76%31/models",
     "/health/../v1/models",
     "/health/%2e%2e/v1/models", "/v1/models%00", "/v1/models;x=/health", "/v1/models?/health", "/docs/../openapi.json",
     "/./openapi.json", "/openapi.json%23/docs", "/health/", "/health%2f", "/docs/x", "/metrics%20", "/nothing"],
)  # fmt: skip
async def test_no_spelling_of_a_path_gets_around(app: Application, path: str) -> None:
    """Straight to the application, because clients tidy paths up."""
    raw, _, query = path.partition("?")
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http", "method": "GET", "path": unquote(raw),
        "raw_path": raw.encode(), "query_string": query.encode(), "headers": [(b"host", b"127.0.0.1")],
        "root_path": "", "scheme": "http", "http_version": "1.1", "server": None, "client": None,
    }  # fmt: skip
    await app(scope, receive, send)
    assert messages[0]["status"] == 401


async def test_websockets_are_closed(app: Application) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_without_keys_everything_is_open(make_app: Callable[..., Any]) -> None:
    app, _ = make_app()
    async with client(app) as http:
        assert (await http.get("/v1/models")).status_code == 200


def test_keys_are_never_compared_with_equality() -> None:
    import aphrodite.server.auth as auth

    source = Path(auth.__file__).read_text()
    assert "compare_digest" in source
    assert "key ==" not in source
    assert "== key" not in source


async def test_an_admin_key_opens_what_other_keys_open_and_is_told_apart(make_app: Callable[..., Any]) -> None:
    app, _ = make_app(api_keys=(KEY,), admin_keys=("sk-admin",))
    async with client(app) as http:
        for headers, permission in (
            ({"authorization": f"Bearer {KEY}"}, "api"),
            ({"x-admin-key": KEY}, "api"),
            ({"authorization": "Bearer sk-admin"}, "admin"),
            ({"x-api-key": "sk-admin"}, "admin"),
            ({"x-admin-key": "sk-admin", "authorization": "Bearer wrong"}, "admin"),
        ):
            assert (await http.get("/v1/auth/permission", headers=headers)).json() == {"permission": permission}
        assert (await http.get("/v1/models", headers={"x-admin-key": "sk-admi"})).status_code == 401


async def test_an_admin_key_alone_closes_nothing_that_is_open(make_app: Callable[..., Any]) -> None:
    app, _ = make_app(admin_keys=("sk-admin",))
    async with client(app) as http:
        assert (await http.get("/v1/auth/permission")).json() == {"permission": "api"}
