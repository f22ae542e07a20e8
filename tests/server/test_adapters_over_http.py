"""Adapters over HTTP: chosen as a model, listed beside theirs, loaded and unloaded by whoever has the admin key."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from running import RunningServer, running_server

ADMIN = {"X-Admin-Key": "boss"}


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(admin_keys=("boss",)) as running:
        yield running


async def post(server: RunningServer, path: str, **body: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.url) as client:
        return await client.post(path, json=body, headers=ADMIN)


async def load(server: RunningServer, name: str, path: str = "/adapters/good") -> httpx.Response:
    return await post(server, "/v1/load_lora_adapter", lora_name=name, lora_path=path)


async def test_a_loaded_adapter_is_a_model_like_any_other(server: RunningServer) -> None:
    assert (await load(server, "poet")).status_code == 200
    async with httpx.AsyncClient(base_url=server.url) as client:
        cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
        assert (cards["poet"]["parent"], cards["poet"]["root"]) == ("fake/story", "good")
        assert (cards["poet"]["lora_rank"], cards["poet"]["max_model_len"]) == (8, 512)
        assert (await client.get("/v1/models/poet")).json() == cards["poet"]
    bodies = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/api/chat": {"messages": [{"role": "user", "content": "a"}], "stream": False, "options": {"num_predict": 2}},
    }
    for path, body in bodies.items():
        answer = await post(server, path, model="poet", **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "poet"
        assert server.engine.wanted[-1] == "poet"
    await post(server, "/v1/completions", prompt="a", max_tokens=1)
    assert server.engine.wanted[-1] is None


async def test_an_unloaded_adapter_is_unknown(server: RunningServer) -> None:
    await load(server, "poet")
    assert (await post(server, "/v1/unload_lora_adapter", lora_name="poet")).text.startswith("Success")
    answer = await post(server, "/v1/completions", model="poet", prompt="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert (await post(server, "/v1/unload_lora_adapter", lora_name="poet")).status_code == 404


async def test_what_cannot_be_loaded_is_told(server: RunningServer) -> None:
    assert (await load(server, "poet")).status_code == 200
    taken = await load(server, "poet")
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "lora_name")
    assert (await load(server, "fake/story")).status_code == 400
    bad = await load(server, "bard", "/adapters/bad")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "adapter_not_loaded")
    assert (await post(server, "/v1/load_lora_adapter", lora_name="x")).status_code == 400


async def test_without_the_admin_key_nothing_is_loaded(server: RunningServer) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            answer = await client.post(path, json={"lora_name": "poet", "lora_path": "/adapters/good"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_needed")
    assert not list(server.engine.adapters)
