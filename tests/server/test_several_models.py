"""A server of several models, by each protocol: switching under load, loading and unloading, keys, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import pytest
from fake_engine import STORY
from fake_loader import GIB, FakeLoader, offered, pool_of
from running import RunningServer, running_server

from aphrodite.errors import AphroditeError, ModelFormatError
from aphrodite.model_list import OfferedModel
from aphrodite.server.model_pool import ModelPool

ADMIN = {"authorization": "Bearer sk-admin"}
MODELS = [offered("a", "alias", max_model_len=256), offered("b", sampler_preset="precise"), offered("c")]


class Several:
    """A running server of several models that load at once."""

    def __init__(self, server: RunningServer, pool: ModelPool, loader: FakeLoader) -> None:
        self.server, self.pool, self.loader = server, pool, loader
        self.http = server.http

    async def complete(self, model: str | None, **fields: Any) -> httpx.Response:
        body = {"prompt": "a", "max_tokens": 4, **fields} | ({} if model is None else {"model": model})
        return await self.http.post("/v1/completions", json=body)

    def loaded(self) -> list[str]:
        return [model.name for model in self.pool.models if model.state == "loaded"]


async def serve(loader: FakeLoader, *models: OfferedModel, **settings: Any) -> AsyncIterator[Several]:
    pools: list[ModelPool] = []
    max_loaded = settings.pop("max_loaded", None)

    def make_pool(config: Any) -> ModelPool:
        pools.append(pool_of(loader, *models, config=config, max_loaded=max_loaded))
        return pools[0]

    async with running_server(make_pool=make_pool, **settings) as server:
        yield Several(server, pools[0], loader)


@pytest.fixture
async def several() -> AsyncIterator[Several]:
    """Three models, of which two fit, behind an admin key."""
    async for running in serve(FakeLoader(budget=2 * GIB), *MODELS, admin_keys=("sk-admin",)):
        yield running


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


async def test_a_request_names_its_model_and_gets_its_settings(several: Several) -> None:
    for name, model in (("a", "a"), ("alias", "a"), ("b", "b")):
        answer = (await several.complete(name)).json()
        assert (answer["model"], answer["choices"][0]["text"]) == (name, STORY[:4])
        assert model in several.loaded()
    tokenized = await several.http.post("/tokenize", json={"model": "alias", "prompt": "abc"})
    assert tokenized.json()["max_model_len"] == 256
    greedy = several.loader.engines["b"].seen[-1][1]  # of the preset that the model has for its own
    assert greedy.temperature < several.loader.engines["a"].seen[-1][1].temperature
    unknown = await several.complete("nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (await several.complete(None)).json()["model"] == "a"  # the one used last
    await several.complete("b")
    assert (await several.complete(None)).json()["model"] == "b"


async def test_switching_under_load_loses_nothing() -> None:
    loader = FakeLoader(hold_after=3)
    async for several in serve(loader, *MODELS, max_loaded=1):
        first = [asyncio.ensure_future(several.complete("a", stream=True, max_tokens=20)) for _ in range(3)]
        while "a" not in loader.engines:
            await asyncio.sleep(0)
        await loader.engines["a"].until_running(3)
        second = [asyncio.ensure_future(several.complete("b", max_tokens=5)) for _ in range(3)]
        while several.pool.find("a").state != "unloading":
            await asyncio.sleep(0)
        third = asyncio.ensure_future(several.complete("a", max_tokens=5))
        assert (await several.http.get("/health")).status_code == 200
        loader.engines["a"].gate.set()
        for answer in await asyncio.gather(*first):
            text = "".join(chunk["choices"][0]["text"] for chunk in events(answer.text))
            assert text == STORY.encode()[:20].decode(errors="ignore")
            assert answer.text.endswith("data: [DONE]\n\n")
        while "b" not in loader.engines:
            await asyncio.sleep(0)
        loader.engines["b"].gate.set()
        assert {answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*second)} == {STORY[:5]}
        while loader.started.count("a") < 2 or not several.loaded():
            await asyncio.sleep(0)
        loader.engines["a"].gate.set()
        assert (await third).json()["choices"][0]["text"] == STORY[:5]
        assert loader.started == ["a", "b", "a"]


async def test_a_client_that_leaves_while_its_model_loads_is_forgotten() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    async for several in serve(loader, *MODELS):
        with pytest.raises(httpx.ReadTimeout):
            await several.http.post("/v1/completions", json={"prompt": "a", "model": "a"}, timeout=0.2)
        model = several.pool.find("a")
        while model.waiters:
            await asyncio.sleep(0)
        loader.gate.set()
        assert (await several.complete("a")).status_code == 200
        assert loader.started == ["a"]


async def test_failures_have_the_shape_of_the_protocol_and_hurt_nobody_else(several: Several) -> None:
    several.loader.fails["b"] = ModelFormatError("/home/me/models/b.gguf is damaged")
    several.loader.sizes["c"] = 9 * GIB
    async with several.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "model": "a", "stream": True}
    ) as stream:
        answer = await several.complete("b")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_load_failed")
        assert answer.json()["error"]["message"] == "The model 'b' cannot be loaded: b.gguf is damaged"
        assert answer.headers["x-should-retry"] == "false"
        answer = await several.http.post(
            "/api/chat", json={"model": "b", "messages": [{"role": "user", "content": "a"}]}
        )
        assert (answer.status_code, "damaged" in answer.json()["error"]) == (500, True)
        answer = await several.complete("c")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "insufficient_memory")
        assert "9.00 GiB" in answer.json()["error"]["message"]
        assert "2.00 GiB for models" in answer.json()["error"]["message"]
        assert (await stream.aread()).endswith(b"[DONE]\n\n")


async def test_a_model_whose_process_dies_comes_back(several: Several) -> None:
    await several.complete("a")
    await several.complete("b")
    several.loader.engines["a"].dead.set()
    assert (await several.http.get("/health")).status_code == 200
    assert (await several.complete("b")).status_code == 200
    assert (await several.complete("a")).status_code == 200
    assert several.loader.started == ["a", "b", "a"]


async def test_lists_say_what_is_loaded_and_load_nothing(several: Several) -> None:
    await several.complete("b")
    for path in ("/v1/models", "/v1/model/list", "/models"):
        states = {card["id"]: card["status"]["value"] for card in (await several.http.get(path)).json()["data"]}
        assert states == {"a": "unloaded", "alias": "unloaded", "b": "loaded", "c": "unloaded"}
    client = ollama.AsyncClient(host=several.server.url)
    assert [entry.model for entry in (await client.list()).models] == ["a", "alias", "b", "c"]
    assert [(entry.model, entry.size) for entry in (await client.ps()).models] == [("b", GIB)]
    shown = await client.show("c")
    assert shown.modelinfo is not None
    assert shown.modelinfo["aphrodite.context_length"] == 4096
    assert several.loader.described == ["c"]
    await client.show("c")
    assert several.loader.described == ["c"]
    page = (await several.http.get("/metrics")).text
    assert 'aphrodite:num_requests_running{model_name="b"}' in page
    assert 'aphrodite:num_requests_running{model_name="a"}' not in page
    assert 'aphrodite:model_loaded{model_name="a"} 0.0' in page
    assert 'aphrodite:model_loads_total{model_name="b"} 1.0' in page
    assert 'aphrodite:generation_tokens_total{model_name="b"} 4.0' in page
    assert several.loader.started == ["b"]


async def test_whoever_looks_loads_nothing(several: Several) -> None:
    assert (await several.http.get("/v1/model")).status_code == 400
    assert (await several.http.get("/slots")).json() == []
    assert (await several.http.get("/api/v1/model")).json() == {"result": "aphrodite/a"}
    assert (await several.http.get("/api/extra/perf")).json()["idle"] == 1
    assert (await several.http.get("/health")).status_code == 200
    assert several.loader.started == []
    await several.complete("b")
    assert (await several.http.get("/v1/model")).json()["id"] == "b"
    assert (await several.http.get("/api/v1/model")).json() == {"result": "aphrodite/b"}


ADMIN_CALLS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/model/load", {"model_name": "a"}), ("POST", "/v1/model/unload", {}),
    ("POST", "/v1/model/download", {"model": "ORG/NAME"}), ("POST", "/models/load", {"model": "a"}),
    ("POST", "/models/unload", {"model": "a"}), ("GET", "/api/admin/list_options", None),
    ("POST", "/api/admin/reload_config", {"filename": "a"}), ("POST", "/api/pull", {"model": "ORG/NAME"}),
    ("DELETE", "/api/delete", {"model": "a"}),
]  # fmt: skip


@pytest.mark.parametrize("keys", [{}, {"admin_keys": ("sk-admin",)}, {"api_keys": ("sk-user",)}])
async def test_without_the_admin_key_nothing_of_it_is_open(keys: dict[str, Any]) -> None:
    loader = FakeLoader()
    async for several in serve(loader, *MODELS, **keys):
        for method, path, body in ADMIN_CALLS:
            headers = {"authorization": "Bearer sk-user"}
            answer = await several.http.request(method, path, json=body, headers=headers)
            assert answer.status_code == 403, path
            assert ("--admin-key" in answer.text) is ("admin_keys" not in keys)
        assert loader.started == []


async def test_tabby_loads_with_progress_and_unloads(several: Several) -> None:
    several.loader.gate.clear()
    request = several.http.build_request("POST", "/v1/model/load", json={"model_name": "a"}, headers=ADMIN)
    response = await several.http.send(request, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.aiter_lines()
    first = json.loads((await anext(lines)).removeprefix("data: "))
    assert (first["model_type"], first["status"], first["bytes"]) == ("model", "processing", 1)
    assert several.pool.find("a").state == "loading"
    several.loader.gate.set()
    rest = events("\n".join([line async for line in lines]))
    assert rest[-1]["status"] == "finished"
    assert rest[-1]["module"] == rest[-1]["modules"]
    assert several.loaded() == ["a"]
    answer = await several.http.post("/v1/model/unload", headers=ADMIN, json={})
    assert answer.json() == {"model": "a", "status": "unloaded"}
    assert several.loaded() == []
    several.loader.fails["b"] = AphroditeError("damaged")
    answer = await several.http.post("/v1/model/load", json={"model_name": "b"}, headers=ADMIN)
    assert '"code":"model_load_failed"' in answer.text
    answer = await several.http.post("/v1/model/load", json={"model_name": "/etc/passwd"}, headers=ADMIN)
    assert answer.status_code == 404
    answer = await several.http.post("/v1/model/load", json={}, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_name")


async def test_llama_cpp_and_kobold_load_and_unload(several: Several) -> None:
    assert (await several.http.post("/models/load", json={"model": "b"}, headers=ADMIN)).json() == {"success": True}
    while several.loaded() != ["b"]:
        await asyncio.sleep(0)
    assert (await several.http.post("/models/unload", json={"model": "b"}, headers=ADMIN)).json() == {"success": True}
    assert several.loaded() == []
    assert (await several.http.get("/api/admin/list_options", headers=ADMIN)).json() == ["a", "b", "c"]
    answer = await several.http.post("/api/admin/reload_config", json={"filename": "c"}, headers=ADMIN)
    assert answer.json() == {"success": True}
    generated = await several.http.post("/api/v1/generate", json={"prompt": "a", "max_length": 4})
    assert generated.json()["results"][0]["text"] == STORY[:4]
    assert several.loader.started == ["b", "c"]


async def test_models_are_fetched_with_progress_and_can_be_asked_for_then(several: Several) -> None:
    client = ollama.AsyncClient(host=several.server.url, headers={"Authorization": "Bearer sk-admin"})
    steps = [step async for step in await client.pull("hf.co/ORG/NAME:Q4_K_M", stream=True)]
    assert steps[-1].status == "success"
    assert [step.completed for step in steps[:-1]] == sorted(step.completed or 0 for step in steps[:-1])
    assert steps[-2].total == 100
    assert (await several.complete("ORG/NAME:Q4_K_M")).status_code == 200
    assert (await client.pull("ORG/OTHER")).status == "success"
    answer = await several.http.post("/v1/model/download", json={"repo_id": "ORG/THIRD"}, headers=ADMIN)
    assert events(answer.text)[-1] == {"model": "ORG/THIRD", "status": "finished"}
    assert several.pool.names[-2:] == ["ORG/OTHER", "ORG/THIRD"]
    for name in ("llama3", "../../etc/passwd"):
        with pytest.raises(ollama.ResponseError, match="is not the name of a model") as refusal:
            await client.pull(name)
        assert refusal.value.status_code == 400
    several.loader.fails["ORG/GONE"] = AphroditeError(
        "ORG/GONE is not on this machine; fetch it without HF_HUB_OFFLINE"
    )
    with pytest.raises(ollama.ResponseError, match="HF_HUB_OFFLINE") as refusal:
        await client.pull("ORG/GONE")
    assert refusal.value.status_code == 502


async def test_what_was_fetched_can_be_removed_and_other_models_cannot(several: Several) -> None:
    client = ollama.AsyncClient(host=several.server.url, headers={"Authorization": "Bearer sk-admin"})
    await client.pull("ORG/NAME")
    await several.complete("ORG/NAME")
    assert (await client.delete("ORG/NAME")).status == "success"
    assert several.loader.deleted == ["ORG/NAME"]
    assert several.loader.engines["ORG/NAME"].dead.is_set()
    assert (await several.complete("ORG/NAME")).status_code == 404
    with pytest.raises(ollama.ResponseError, match="whoever put it there"):
        await client.delete("a")
    with pytest.raises(ollama.ResponseError) as refusal:
        await client.delete("nobody")
    assert refusal.value.status_code == 404


async def test_ollama_says_how_long_a_model_stays(several: Several) -> None:
    client = ollama.AsyncClient(host=several.server.url)
    loaded = await client.generate("a", keep_alive="5m")
    assert (loaded.done_reason, several.loaded()) == ("load", ["a"])
    assert several.pool.seconds_left(several.pool.find("a")) == 300
    await client.chat("b", [{"role": "user", "content": "a"}], keep_alive=-1)
    (a, b) = (await client.ps()).models
    assert a.expires_at is not None
    assert b.expires_at is not None
    assert b.expires_at.year == 9999 > a.expires_at.year
    assert (await client.generate("a", keep_alive=0)).done_reason == "unload"
    assert (await client.chat("b", keep_alive=0)).done_reason == "unload"
    await several.pool.expire()
    assert several.loaded() == []
    assert (await client.generate("c", keep_alive=0)).done_reason == "unload"
    assert several.loader.started == ["a", "b"]
    await client.embed("a", "text", keep_alive="1m")
    assert several.pool.seconds_left(several.pool.find("a")) == 60
    for long in (10**400, "9" * 30):
        answer = await several.http.post("/api/generate", json={"model": "a", "keep_alive": long})
        assert answer.status_code == 200
        (a,) = (await client.ps()).models
        assert a.expires_at is not None
        assert a.expires_at.year == 9999
    for wrong in ("soon", True, [5], "9" * 400):
        answer = await several.http.post("/api/generate", json={"model": "a", "prompt": "a", "keep_alive": wrong})
        assert answer.status_code == 400
        assert "keep_alive" in answer.json()["error"]


async def test_one_model_is_neither_loaded_unloaded_nor_joined_by_others() -> None:
    async with running_server(admin_keys=("sk-admin",)) as server:
        for method, path, body in ADMIN_CALLS:
            if path not in ("/api/admin/list_options", "/api/delete"):
                answer = await server.http.request(method, path, json=body, headers=ADMIN)
                assert (answer.status_code, "--models-dir" in answer.text) == (400, True), path
        assert "status" not in (await server.http.get("/v1/models")).json()["data"][0]
        await server.http.post("/api/generate", json={"model": "fake/story", "keep_alive": 0})
        assert (await server.http.get("/health")).status_code == 200


# Path, body, what is sent in silence, what the stream ends with.
STREAMS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, ": ping", "data: [DONE]"),
    ("/v1/completions", {"prompt": "a"}, ": ping", "data: [DONE]"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 4}, ": ping", "event: response.incomplete"),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}, "event: ping",
     "event: message_stop"),
    ("/completion", {"prompt": "a", "n_predict": 4}, ": ping", "data: {"),
    ("/api/extra/generate/stream", {"prompt": "a", "max_length": 4}, ": ping", "event: message"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "ping", "end"), STREAMS)
async def test_a_stream_shows_signs_of_life_while_its_model_loads(
    path: str, body: dict[str, Any], ping: str, end: str
) -> None:
    loader = FakeLoader()
    loader.gate.clear()
    async for several in serve(loader, *MODELS, ping_interval=0.05):
        fields = {"model": "a", "stream": True} if "generate" not in path else {}
        async with several.http.stream("POST", path, json={**fields, **body}) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line async for line in _until(response, ping, loader)]
        assert ping in lines
        assert lines.index(ping) < max(number for number, line in enumerate(lines) if line.startswith(end))


async def _until(response: httpx.Response, ping: str, loader: FakeLoader) -> AsyncIterator[str]:
    """A stream's lines; its model is loaded once there was a sign of life."""
    async for line in response.aiter_lines():
        if line == ping:
            loader.gate.set()
        yield line


@pytest.mark.parametrize(("path", "body", "ping", "end"), STREAMS)
async def test_what_goes_wrong_behind_signs_of_life_is_an_event(
    path: str, body: dict[str, Any], ping: str, end: str
) -> None:
    loader = FakeLoader(fails={"a": ModelFormatError("it is no model")})
    loader.gate.clear()
    async for several in serve(loader, *MODELS, ping_interval=0.05):
        fields = {"model": "a", "stream": True} if "generate" not in path else {}
        async with several.http.stream("POST", path, json={**fields, **body}) as response:
            assert response.status_code == 200
            lines = [line async for line in _until(response, ping, loader)]
        assert any("cannot be loaded: it is no model" in line for line in lines)
        assert (await several.http.get("/health")).status_code == 200
        # What is known at once has its status, though it were a stream.
        refused = await several.http.post(path, json={**fields, **body})
        assert refused.status_code == 500


async def test_whole_answers_and_streams_to_be_continued_wait_in_silence() -> None:
    loader = FakeLoader(fails={"a": ModelFormatError("it is no model")})
    loader.gate.clear()
    async for several in serve(loader, *MODELS, ping_interval=0.01):
        waiting = [
            asyncio.ensure_future(several.complete("a", **more)) for more in ({}, {"stream": True, "resumable": True})
        ]
        while len(several.pool.find("a").waiters) < 2:
            await asyncio.sleep(0)
        loader.gate.set()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {500}
