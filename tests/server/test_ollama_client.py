"""Ollama's own client against a running server: chat, generate, models, errors."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest
from fake_engine import BOS, STORY, FakeEngine
from running import RunningServer, running_server

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell"}]


def called(function: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


@pytest.fixture
def client(server: RunningServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(host=server.url)


async def test_a_chat(server: RunningServer, client: ollama.AsyncClient) -> None:
    options = {
        "num_predict": 17, "temperature": 0.5, "repeat_penalty": 1.2, "repeat_last_n": 64, "tfs_z": 0.9, "seed": 0,
        "num_ctx": 4096, "min_p": 0.05, "xtc_probability": 0.5, "mirostat": 2, "stop": ["zzz"],
    }  # fmt: skip
    answer = await client.chat(model="fake/story:latest", messages=MESSAGES, options=options)
    assert answer.message.content == STORY.encode()[:17].decode()
    assert (answer.done, answer.done_reason, answer.model) == (True, "length", "fake/story")
    token_ids, params = server.engine.seen[-1][:2]
    assert bytes(token_ids).decode() == "system: Be brief.\nuser: Tell\nassistant:"
    assert (answer.prompt_eval_count, answer.eval_count) == (len(token_ids), 17)
    assert (params.max_tokens, params.temperature, params.repetition_penalty) == (17, 0.5, 1.2)
    assert (params.repetition_penalty_range, params.tfs, params.xtc_probability) == (64, 0.9, 0.5)
    assert (params.mirostat_mode, params.stop) == (2, ("zzz",))
    durations = (answer.total_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert all(isinstance(value, int) and value > 0 for value in durations)  # clients divide by them


async def test_a_streamed_chat_is_the_whole_one(client: ollama.AsyncClient) -> None:
    stream = await client.chat(model="fake/story", messages=MESSAGES, stream=True, options={"num_predict": 40})
    parts = [part async for part in stream]
    assert "".join(part.message.content or "" for part in parts) == STORY.encode()[:40].decode()
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == 40


async def test_generate_with_and_without_the_template(server: RunningServer, client: ollama.AsyncClient) -> None:
    answer = await client.generate(model="fake/story", prompt="Tell", system="Be brief.", options={"num_predict": 4})
    assert answer.response == "Once"
    assert bytes(server.engine.seen[-1][0]).decode() == "system: Be brief.\nuser: Tell\nassistant:"
    assert answer.context == [*server.engine.seen[-1][0], *b"Once"]
    stream = await client.generate(model="fake/story", prompt="Tell", raw=True, stream=True, options={"num_predict": 4})
    parts = [part async for part in stream]
    assert "".join(part.response for part in parts) == "Once"
    assert server.engine.seen[-1][0] == [BOS, *b"Tell"]
    assert parts[-1].context == [BOS, *b"TellOnce"]
    await client.generate(model="fake/story", prompt="X", raw=True, context=[97], options={"num_predict": 1})
    assert server.engine.seen[-1][0] == [97, *b"X"]


async def test_no_limit_and_the_default_are_the_contexts_end(server: RunningServer, client: ollama.AsyncClient) -> None:
    for options in ({}, {"num_predict": -1}, {"num_predict": -2}):
        answer = await client.generate(model="fake/story", prompt="x", options=options)
        assert (answer.response, answer.done_reason) == (STORY, "stop")
        assert server.engine.seen[-1][1].max_tokens is None


async def test_models(server: RunningServer, client: ollama.AsyncClient) -> None:
    assert [model.model for model in (await client.list()).models] == ["fake/story", "story-alias"]
    assert [model.model for model in (await client.ps()).models] == ["fake/story"]
    shown = await client.show("fake/story")
    assert shown.modelinfo is not None
    assert shown.modelinfo["aphrodite.context_length"] == 512
    assert "assistant:" in (shown.template or "")
    assert (await server.http.get("/api/version")).json()["version"]


async def test_a_request_without_a_text_asks_for_the_model_to_be_loaded(
    server: RunningServer, client: ollama.AsyncClient
) -> None:
    assert (await client.generate(model="fake/story")).done_reason == "load"
    assert (await client.chat(model="fake/story")).done_reason == "load"
    assert not server.engine.seen


@pytest.mark.parametrize(
    ("path", "fields", "status", "told"),
    [
        ("/api/chat", {"model": "nobody"}, 404, "nobody"),
        ("/api/chat", {"model": None}, 400, "model"),
        ("/api/chat", {"messages": 3}, 400, "messages"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
        ("/api/chat", {"tools": {}}, 400, "tools"),
        ("/api/chat", {"tools": [3]}, 400, "tools[0]"),
        ("/api/chat", {"tools": [{"type": "function"}]}, 400, "tools[0].function"),
        ("/api/chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name"),
        ("/api/chat", {"tools": [{"type": "search"}]}, 400, "tools[0].type"),
        ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": 3}]}, 400, "messages[0].tool_calls"),
        ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages[0].tool_calls[0]"),
        ("/api/chat", {"messages": [called({"arguments": {}})]}, 400, "messages[0].tool_calls[0]"),
        ("/api/chat", {"messages": [called({"name": "f", "arguments": "{}"})]}, 400, "function.arguments"),
        ("/api/chat", {"messages": [{"role": "assistant", "content": "x", "thinking": 3}]}, 400, "messages[0]"),
        ("/api/chat", {"messages": [{"role": "tool", "content": "x", "tool_name": 3}]}, 400, "messages[0].name"),
        ("/api/chat", {"options": {"temperature": -1}}, 400, "temperature"),
        ("/api/chat", {"options": {"num_predict": "x"}}, 400, "num_predict"),
        ("/api/chat", {"think": True}, 400, "does not support thinking"),
        ("/api/chat", {"think": "high"}, 400, "does not support thinking"),
        ("/api/chat", {"think": "very"}, 400, "think"),
        ("/api/chat", {"think": 3}, 400, "think"),
        ("/api/chat", {"options": {"thinking_token_budget": -2}}, 400, "thinking_token_budget"),
        ("/api/generate", {"prompt": "x", "think": True}, 400, "does not support thinking"),
        ("/api/generate", {"prompt": "x", "raw": True, "think": True}, 400, "raw"),
        ("/api/generate", {"prompt": 3}, 400, "prompt"),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}, 400, "images"),
        ("/api/generate", {"prompt": "x", "context": [999]}, 400, "context"),
        ("/api/generate", {"prompt": "x" * 600, "raw": True}, 400, "512"),
        ("/api/show", {"model": "nobody"}, 404, "nobody"),
    ],
)
async def test_errors_have_ollamas_shape(
    server: RunningServer, path: str, fields: dict[str, Any], status: int, told: str
) -> None:
    body = {"model": "fake/story", "messages": MESSAGES, **fields}
    response = await server.http.post(path, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert told in response.json()["error"]
    assert not server.engine.seen


async def test_unknown_options_are_named(server: RunningServer) -> None:
    body = {"model": "fake/story", "messages": MESSAGES, "stream": False, "options": {"num_predict": 1, "numa": True}}
    response = await server.http.post("/api/chat", json=body)
    assert response.headers["x-ignored-fields"] == "numa"


async def test_a_failure_in_mid_stream_is_the_last_line() -> None:
    async with running_server(FakeEngine(fail_after=4)) as server:
        response = await server.http.post("/api/chat", json={"model": "fake/story", "messages": MESSAGES})
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert response.headers["content-type"] == "application/x-ndjson"
        assert "could not finish" in lines[-1]["error"]


async def test_keys_are_asked_for() -> None:
    async with running_server(api_keys=("right",)) as server:
        response = await server.http.get("/api/tags")
        assert response.status_code == 401
        assert "key" in response.json()["error"]
