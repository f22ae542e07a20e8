"""Embeddings as the clients of each protocol ask for them, and how each is told what is wrong."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
from fake_engine import BOS, FakeEngine, FakeModel, raw_state
from running import RunningServer, running_server

from aphrodite.engine.messages import EmbeddingInfo


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values))


async def test_openais_client_gets_what_it_asks_for(server: RunningServer) -> None:
    answer = await server.client.embeddings.create(model="fake/story", input=["ab", "c"])
    assert server.engine.seen[0][0] == [BOS, *b"ab"]
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("fake/story", 5, 5)
    for item, last in zip(answer.data, b"bc", strict=True):  # the client asked for base64, and decoded it
        np.testing.assert_allclose(item.embedding, unit(raw_state(last)), rtol=1e-6)
    floats = await server.client.embeddings.create(model="fake/story", input="ab", encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, answer.data[0].embedding, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"input": [97, 98]}, [unit(raw_state(98))]),
        ({"input": [[97], [98, 99]]}, [unit(raw_state(97)), unit(raw_state(99))]),
        ({"input": [97, 99], "pooling": "mean", "normalize": False}, [(raw_state(97) + raw_state(99)) / 2]),
        ({"input": [97, 99], "pooling": "cls"}, [unit(raw_state(97))]),
        ({"input": [99], "dimensions": 2}, [unit(raw_state(99)[:2])]),
        ({"input": "a", "add_special_tokens": False, "pooling": "cls"}, [unit(raw_state(97))]),
    ],
)
async def test_inputs_and_ways_of_pooling(server: RunningServer, fields: dict[str, Any], expected: Any) -> None:
    response = await server.http.post("/v1/embeddings", json={"model": "fake/story", **fields})
    assert response.status_code == 200, response.text
    found = [item["embedding"] for item in response.json()["data"]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


async def test_base64_is_little_endian_float32(server: RunningServer) -> None:
    response = await server.http.post("/v1/embeddings", json={"input": [99], "encoding_format": "base64", "odd": 1})
    packed = response.json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), unit(raw_state(99)), rtol=1e-6)
    assert response.headers["x-ignored-fields"] == "odd"


async def test_a_long_list_leaves_the_queue_to_others() -> None:
    engine = FakeEngine(max_running=8)  # twice what it computes at once
    async with running_server(engine) as server:
        response = await server.http.post("/v1/embeddings", json={"input": [[number % 256] for number in range(2048)]})
        data = response.json()["data"]
        assert len(data) == 2048
        np.testing.assert_allclose(data[2047]["embedding"], unit(raw_state(255)), rtol=1e-6)
        metrics = (await server.http.get("/metrics")).text
        assert 'aphrodite:prompt_tokens_total{model_name="fake/story"} 2048.0' in metrics


async def test_a_client_that_leaves_frees_its_inputs() -> None:
    engine = FakeEngine(hold_after=0)
    async with running_server(engine) as server:
        request = asyncio.ensure_future(server.http.post("/v1/embeddings", json={"input": ["a"] * 20}))
        await engine.until_running(8)
        request.cancel()
        await asyncio.wait_for(engine.idle.wait(), 20)
        assert len(engine.seen) == 8


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "required"),
    ({"input": []}, "input", "empty list"),
    ({"input": [[]]}, "input", "is empty"),
    ({"input": {"a": 1}}, "input", "must be text"),
    ({"input": [1.5]}, "input", "must be text"),
    ({"input": ["a", 1]}, "input", "must be text"),
    ({"input": [[1], "a"]}, "input", "must be text"),
    ({"input": [-1]}, "input", "0 to 257"),
    ({"input": [258]}, "input", "0 to 257"),
    ({"input": [2**63]}, "input", "0 to 257"),
    ({"input": ["a"] * 2049}, "input", "more than the 2048"),
    ({"input": [1] * 513}, "input", "512 tokens, but input 0 has 513"),
    ({"input": ["a", "b" * 600]}, "input", "512 tokens"),
    ({"input": "", "add_special_tokens": False}, "input", "is empty"),
    ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"input": "a", "dimensions": 5}, "dimensions", "1 to 4"),
    ({"input": "a", "dimensions": "2"}, "dimensions", "integer"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
    ({"input": "a", "pooling": "max"}, "pooling", "mean"),
    ({"input": "a", "normalize": "yes"}, "normalize", "boolean"),
    ({"input": "a", "priority": 2**40}, "priority", "less than"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=lambda value: str(value)[:40])
async def test_bad_input_is_refused_by_name(
    server: RunningServer, body: dict[str, Any], param: str, message: str
) -> None:
    response = await server.http.post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]
    assert not server.engine.seen


async def test_an_unknown_model_and_a_wrong_key() -> None:
    async with running_server(api_keys=("secret",)) as server:
        key = {"authorization": "Bearer secret"}
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/embedding", {"content": "a"})):
            assert (await server.http.post(path, json=body)).status_code == 401
            unknown = await server.http.post(path, json={**body, "model": "none"}, headers=key)
            assert unknown.status_code == 404
            assert "does not exist" in unknown.json()["error"]["message"]
        for path in ("/api/embed", "/api/embeddings"):
            unknown = await server.http.post(path, json={"model": "none"}, headers=key)
            assert unknown.status_code == 404
            assert "does not exist" in unknown.json()["error"]


async def test_a_model_without_embeddings_says_why() -> None:
    info = EmbeddingInfo(size=4, pooling="last", normalize=True, declined="it ranks pairs of texts")
    async with running_server(FakeEngine(FakeModel(embedding=info))) as server:
        response = await server.http.post("/v1/embeddings", json={"input": "a"})
        assert response.status_code == 400
        assert "ranks pairs" in response.json()["error"]["message"]
        response = await server.http.post("/api/embed", json={"model": "fake/story", "input": "a"})
        assert (response.status_code, "ranks pairs" in response.json()["error"]) == (400, True)


async def test_what_fails_inside_is_a_500_that_tells_nothing() -> None:
    async with running_server(FakeEngine(fail_after=0)) as server:
        response = await server.http.post("/v1/embeddings", json={"input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "request_failed")
        assert "secret" not in response.text


@pytest.mark.parametrize(
    ("number", "scale"),
    [
        (None, unit),
        (-1, lambda x: x),
        (0, lambda x: x / np.abs(x).max() * 32760),
        (1, lambda x: x / np.abs(x).sum()),
        (2, unit),
        (3, lambda x: x / np.linalg.norm(x, 3)),
    ],
)
async def test_llama_cpp(server: RunningServer, number: int | None, scale: Any) -> None:
    for path, name in (("/embedding", "content"), ("/embeddings", "input")):
        body = {name: ["a", "b"], "embd_normalize": number}
        answer = (await server.http.post(path, json=body)).json()
        assert [item["index"] for item in answer] == [0, 1]
        for item, token in zip(answer, b"ab", strict=True):
            np.testing.assert_allclose(item["embedding"], [scale(raw_state(token))], rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "content: this field is required"),
        ({"content": [[]]}, "content 0 is empty"),
        ({"input": [258]}, "outside the vocabulary"),
        ({"input": "a", "embd_normalize": -2}, "embd_normalize"),
    ],
)
async def test_llama_cpps_bad_input(server: RunningServer, body: dict[str, Any], message: str) -> None:
    response = await server.http.post("/embedding", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


async def test_koboldcpp(server: RunningServer) -> None:
    body = {"input": ["ab", "c" * 600], "model": "kcpp"}
    answer = (await server.http.post("/api/extra/embeddings", json=body)).json()
    for item, token in zip(answer["data"], b"bc", strict=True):
        np.testing.assert_allclose(item["embedding"], unit(raw_state(token)), rtol=1e-6)
    assert (answer["model"], answer["usage"]["prompt_tokens"]) == ("fake/story", 3 + 512)
    for wrong in ({}, {"input": []}, {"input": "c" * 600, "truncate": False}):
        response = await server.http.post("/api/extra/embeddings", json=wrong)
        assert (response.status_code, response.json()["detail"]["param"]) == (400, "input")


async def test_ollama(server: RunningServer) -> None:
    body = {"model": "fake/story:latest", "input": ["ab", "c" * 600], "keep_alive": "5m", "options": {"num_ctx": 9}}
    answer = (await server.http.post("/api/embed", json=body)).json()
    np.testing.assert_allclose(answer["embeddings"], [unit(raw_state(98)), unit(raw_state(99))], rtol=1e-6)
    assert (answer["model"], answer["prompt_eval_count"]) == ("fake/story", 3 + 512)
    assert answer["total_duration"] > 0
    one = await server.http.post("/api/embed", json={"model": "fake/story", "input": "b", "dimensions": 3})
    np.testing.assert_allclose(one.json()["embeddings"], [unit(raw_state(98)[:3])], rtol=1e-6)
    old = await server.http.post("/api/embeddings", json={"model": "fake/story", "prompt": "b"})
    np.testing.assert_allclose(old.json()["embedding"], raw_state(98), rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/api/embed", {"input": []}, {"embeddings": []}),
        ("/api/embeddings", {}, {"embedding": []}),
        ("/api/embed", {"input": "c" * 600, "truncate": False}, "maximum context length is 512"),
        ("/api/embed", {"input": [[1]]}, "input"),
        ("/api/embeddings", {"prompt": 1}, "prompt"),
    ],
)
async def test_ollamas_edges(server: RunningServer, path: str, body: dict[str, Any], answer: Any) -> None:
    response = await server.http.post(path, json={"model": "fake/story", **body})
    if isinstance(answer, str):
        assert response.status_code == 400
        assert answer in response.json()["error"]
    else:
        assert answer.items() <= response.json().items()
