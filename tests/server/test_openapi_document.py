"""Our own OpenAPI document: complete, and schemathesis finds nothing that makes the server fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, given, settings
from running import running_server

from aphrodite.sampling.fields import canonical_names
from aphrodite.server.app import Application
from aphrodite.server.config import ServerConfig
from aphrodite.server.model_pool import ModelPool
from aphrodite.server.openai.protocol import ChatFields, CompletionFields
from aphrodite.server.openai.responses.fields import ResponsesFields


def fake_application() -> Application:
    config = ServerConfig()
    return Application(ModelPool.of_engine(FakeEngine(), config), config)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    async def fetch() -> dict[str, Any]:
        app = fake_application()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            return dict((await http.get("/openapi.json")).json())

    return asyncio.run(fetch())


def test_every_route_and_every_field_is_described(document: dict[str, Any]) -> None:
    async def routes() -> set[str]:
        return {route.path.replace(":path", "") for route in fake_application().routes}

    assert set(document["paths"]) == asyncio.run(routes())
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert all(operation["summary"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for model in (CompletionFields, ChatFields, ResponsesFields):
        fields = document["components"]["schemas"][model.__name__]["properties"]
        assert set(fields) == set(model.model_fields) | set(canonical_names())


async def test_the_pages_load_nothing_from_elsewhere() -> None:
    async with running_server() as server:
        for path in ("/", "/docs"):
            page = await server.http.get(path)
            outside = page.text.replace(server.url, "")
            assert "http://" not in outside
            assert "https://" not in outside
            assert "default-src 'none'" in page.headers["content-security-policy"]
        home = await server.http.get("/")
        assert f"curl {server.url}/v1/chat/completions" in home.text


OPERATIONS = [
    (path, method)
    for path, method in (
        ("/v1/models", "GET"), ("/v1/models/{model_id}", "GET"), ("/v1/completions", "POST"),
        ("/v1/chat/completions", "POST"), ("/v1/responses", "POST"),
        ("/tokenize", "POST"), ("/v1/detokenize", "POST"), ("/tokenizer_info", "GET"),
        ("/health", "GET"), ("/version", "GET"), ("/metrics", "GET"), ("/openapi.json", "GET"),
    )
]  # fmt: skip


MODES = schemathesis.GenerationMode


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    # A GET has nothing that could be generated against its schema.
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in MODES
        if (operation[1], mode) != ("GET", MODES.NEGATIVE)
    ],
)
async def test_no_generated_request_makes_the_server_fail(
    document: dict[str, Any], path: str, method: str, mode: schemathesis.GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(document)[path][method]
    async with running_server() as server:
        url = server.url

        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call(base_url=url)
            assert response.status_code < 500, response.text
            if response.status_code >= 400 and method != "HEAD":
                error = json.loads(response.content)["error"]
                assert set(error) == {"message", "type", "param", "code"}

        await asyncio.to_thread(check)
