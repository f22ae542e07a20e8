"""Bounds at the edge: Host, origins, content types, sizes, headers, slow senders."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from running import RunningServer, running_server

from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import ApiError
from aphrodite.server.limits import AllowedHosts

JSON = {"content-type": "application/json"}


def allowed(header: bytes, **settings: Any) -> bool:
    try:
        AllowedHosts(ServerConfig(**settings)).check([header])
    except ApiError:
        return False
    return True


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:2242", b"127.0.0.1:80", b"[::1]:2242", b"[::1]", b"localhost."]
)
def test_loopback_names_pass(host: bytes) -> None:
    assert allowed(host)


@pytest.mark.parametrize(
    "host",
    [b"evil.com", b"evil.com:2242", b"localhost.evil.com", b"127.0.0.1.evil.com", b"", b":2242", b"localhost:x",
     b"localhost@evil.com", b"localhost/x", b"[::1", b"[::1]x", b"127.0.0.1:2242:3", b"localhost evil.com",
     b"evil.com#localhost", b"192.168.0.1", b"\xff"],
)  # fmt: skip
def test_other_hosts_do_not(host: bytes) -> None:
    assert not allowed(host)


def test_configured_hosts_and_addresses() -> None:
    assert allowed(b"models.example.org:443", allowed_hosts=("Models.example.org",))
    assert not allowed(b"x.models.example.org", allowed_hosts=("models.example.org",))
    assert allowed(b"anything", allowed_hosts=("*",))
    assert allowed(b"192.168.0.7:2242", host="0.0.0.0")
    assert allowed(b"[fd00::1]", host="::")
    assert not allowed(b"evil.com", host="0.0.0.0")
    assert allowed(b"box.lan", host="box.lan")


def test_one_host_header_is_needed() -> None:
    for values in ([], [b"localhost", b"localhost"]):
        with pytest.raises(ApiError):
            AllowedHosts(ServerConfig()).check(values)


async def test_rebinding_is_refused_on_every_route(server: RunningServer) -> None:
    for path in ("/", "/docs", "/health", "/v1/models", "/nothing"):
        response = await server.http.get(path, headers={"host": "evil.com"})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


async def test_no_origin_is_allowed_by_default(server: RunningServer) -> None:
    origin = {"origin": "http://evil.com"}
    response = await server.http.get("/v1/models", headers=origin)
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = await server.http.options(
        "/v1/completions", headers={**origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


async def test_configured_origins_are_exact() -> None:
    async with running_server(cors_origins=("http://app.local",), api_keys=("k",)) as server:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        good = await server.http.options("/v1/completions", headers={"origin": "http://app.local", **ask})
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] == "http://app.local"
        for asked in ("content-type,x-admin-key,x-api-key", "x-stainless-lang,x-stainless-os", "anthropic-version"):
            keyed = {**ask, "access-control-request-headers": asked}
            answer = await server.http.options("/models/load", headers={"origin": "http://app.local", **keyed})
            assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, asked)
        for origin in ("http://app.local.evil.com", "https://app.local", "null", "http://APP.local:80"):
            bad = await server.http.options("/v1/completions", headers={"origin": origin, **ask})
            assert "access-control-allow-origin" not in bad.headers
        # A page must be able to read why it was refused.
        refused = await server.http.get("/v1/models", headers={"origin": "http://app.local"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://app.local"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                                  "application/jsonx", "text/plain; application/json"])  # fmt: skip
async def test_only_json_is_posted(server: RunningServer, kind: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = await server.http.post(path, content=b'{"prompt":"a"}', headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert server.engine.seen == []


async def test_programs_may_leave_the_type_out_and_ollamas_may_send_any(server: RunningServer) -> None:
    """LiteLLM sends Ollama's requests without a type, and Ollama's own examples are `curl -d`. A page cannot do that
    without saying so."""
    ollama = {"model": "fake/story", "prompt": "a", "stream": False, "options": {"num_predict": 1}}
    form = {"content-type": "application/x-www-form-urlencoded"}
    untyped: dict[str, str] = {}
    for path, body, headers in (
        ("/v1/completions", {"prompt": "a"}, untyped),
        ("/api/generate", ollama, untyped),
        ("/api/generate", ollama, form),
    ):
        content = json.dumps(body).encode()
        assert (await server.http.post(path, content=content, headers=headers)).status_code == 200, (path, headers)
        for page in ({"origin": "null"}, {"origin": "http://evil.com"}, {"sec-fetch-site": "cross-site"}):
            response = await server.http.post(path, content=content, headers={**headers, **page})
            assert response.status_code == 415, (path, headers, page)
    assert len(server.engine.seen) == 3


async def test_parameters_of_the_content_type_do_not_matter(server: RunningServer) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await server.http.post("/v1/completions", content=b'{"prompt":"a"}', headers=headers)).status_code == 200


async def test_bodies_are_bounded_with_and_without_a_length() -> None:
    async def drip(size: int) -> AsyncIterator[bytes]:
        for _ in range(0, size, 1000):
            yield b" " * 1000

    async with running_server(max_body_bytes=100_000) as server:
        fits = b'{"prompt": "a"}'.ljust(100_000)
        assert (await server.http.post("/v1/completions", content=fits, headers=JSON)).status_code == 200
        for content in (fits + b" ", drip(101_000), b" " * 190_000):
            response = await server.http.post("/v1/completions", content=content, headers=JSON)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert (await server.http.get("/health")).status_code == 200


async def raw(server: RunningServer, *parts: bytes) -> bytes:
    """Send bytes, read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_a_body_that_waits_for_permission_is_refused_at_once() -> None:
    async with running_server(max_body_bytes=1000) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        answer = await raw(server, head + b"Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n")
        assert error_of(answer) == (413, "request_too_large")


async def test_headers_are_bounded() -> None:
    async with running_server() as server:
        start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        many = b"".join(b"X-%d: 1\r\n" % number for number in range(200))
        for head in (
            start + b"X-Big: " + b"x" * 40_000 + b"\r\n\r\n",
            start + many + b"\r\n",
            b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            assert error_of(await raw(server, head)) == (431, "headers_too_large")
        # One header that never ends.
        answer = await raw(server, start + b"X-Big: ", *[b"x" * 10_000] * 60)
        assert answer == b"" or error_of(answer) == (431, "headers_too_large")
        assert (await server.http.get("/health")).status_code == 200


async def test_what_is_not_http_is_refused_in_our_shape() -> None:
    async with running_server() as server:
        assert error_of(await raw(server, b"\x16\x03\x01 hello\r\n\r\n")) == (400, "invalid_http")


async def test_slow_heads_and_bodies_time_out() -> None:
    async with running_server(header_timeout=0.1, body_timeout=0.2) as server:
        assert await raw(server, b"") == b""
        assert await raw(server, b"GET /health HTTP/1.1\r\nHost: loc") == b""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert error_of(await raw(server, head + b"Content-Length: 50\r\n\r\n{")) == (408, "request_timeout")


async def test_connections_are_bounded() -> None:
    async with running_server(max_connections=3) as server:
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        assert (await server_answers_idle(idle[0])) == b"HTTP/1.1 200"
        assert error_of(await raw(server, b"")) == (503, "too_many_connections")
        for _, writer in idle:
            writer.close()


async def server_answers_idle(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
    reader, writer = connection
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return await reader.readexactly(12)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1//models", "/v1/models"),
        ("/responses", "/v1/responses"),
        ("/v1/api/v1/generate", "/api/v1/generate"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/zzz", None),
        ("/" + "x/" * 5000, None),
    ],
)
async def test_a_path_a_little_wrong_is_told_the_right_one(
    make_app: Callable[..., Any], path: str, meant: str | None
) -> None:
    app, _ = make_app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
        answer = await http.get(httpx.URL("http://localhost", raw_path=path.encode()))
    assert answer.status_code == 404
    hint = f" Did you mean {meant}?" if meant else ""
    assert answer.json()["error"]["message"] == f"There is nothing at this path.{hint} /docs lists what there is."


async def test_unknown_paths_and_methods_have_our_error_shape(make_app: Callable[..., Any]) -> None:
    app, _ = make_app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
        missing = await http.get("/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        wrong = await http.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        assert (await http.get("/v1/models/")).status_code == 404
        assert missing.headers["x-request-id"] != wrong.headers["x-request-id"]
