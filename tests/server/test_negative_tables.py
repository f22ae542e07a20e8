"""What each protocol answers to a request that it cannot serve: the status, the shape its clients read, and the reason.

One neighbour streams all the while, and its text is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fake_engine import STORY, FakeEngine
from running import RunningServer, running_server

KEY = "right"
JSON = {"content-type": "application/json"}
LONG = "word " * 150  # 750 tokens and more; the model has 512
MESSAGES = [{"role": "user", "content": "a"}]
Reader = Callable[[Any], tuple[str, str]]


def openai_error(body: Any) -> tuple[str, str]:
    """Kind and message; the whole shape is checked."""
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["type"], body["error"]["message"]


def llama_cpp_error(body: Any) -> tuple[str, str]:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "type", "param"}
    assert isinstance(body["error"]["code"], int)
    return body["error"]["type"], body["error"]["message"]


def kobold_error(body: Any) -> tuple[str, str]:
    assert set(body) == {"detail"}
    assert set(body["detail"]) == {"msg", "type", "param"}
    return body["detail"]["type"], body["detail"]["msg"]


def anthropic_error(body: Any) -> tuple[str, str]:
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def ollama_error(body: Any) -> tuple[str, str]:
    assert set(body) == {"error"}
    return "", body["error"]


@dataclass(frozen=True)
class Path:
    """One way in.

    Attributes:
        body: a request that is served.
        too_long: what makes it longer than the context; None where the prompt gives way.
        names_model: whether requests name their model.
        unsupported: a field of the protocol that this server does not have, and what the message says of it.
        wrong: fields of a wrong type or value, each with a word of the message.
        kinds: what errors are called, by status.
    """

    path: str
    body: dict[str, Any]
    read: Reader
    kinds: dict[int, str]
    too_long: dict[str, Any] | None
    unsupported: tuple[dict[str, Any], str]
    wrong: dict[str, Any] = field(default_factory=dict)
    names_model: bool = True


OPENAI = dict.fromkeys((400, 404, 405, 413, 415), "invalid_request_error") | {401: "authentication_error"}
LLAMA = OPENAI | {404: "not_found_error"}
KOBOLD = {400: "invalid_json", 401: "invalid_api_key", 405: "method_not_allowed", 413: "request_too_large"}
KOBOLD[415] = "unsupported_media_type"
ANTHROPIC = OPENAI | {404: "not_found_error", 413: "request_too_large"}
OLLAMA = dict.fromkeys(OPENAI, "")
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
SAMPLERS = {"temperature": "hot", "top_p": 7, "min_p": [], "repetition_penalty": -1, "thinking_token_budget": "many"}

PATHS = (
    Path(
        "/v1/completions", {"prompt": "a", "max_tokens": 2}, openai_error, OPENAI, {"prompt": LONG},
        ({"suffix": "b"}, "suffix"), {**SAMPLERS, "prompt": 3, "max_tokens": "many", "n": 0, "stream": "yes"},
    ),
    Path(
        "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}, openai_error, OPENAI,
        {"messages": [{"role": "user", "content": LONG}]},
        ({"messages": [{"role": "user", "content": IMAGE}]}, "image"),
        {
            **SAMPLERS, "messages": "hi", "max_tokens": -1, "tools": {"a": 1}, "response_format": "xml",
            "tool_choice": "must", "reasoning_effort": "most",
        },
    ),
    Path(
        "/v1/messages", {"messages": MESSAGES, "max_tokens": 2}, anthropic_error, ANTHROPIC,
        {"messages": [{"role": "user", "content": LONG}]},
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "image"),
        {
            **SAMPLERS, "messages": [], "max_tokens": 0, "system": 3, "stop_sequences": "x", "tools": [{"name": "f"}],
            "tool_choice": {"type": "must"}, "thinking": {"type": "enabled"}, "output_config": {"effort": "most"},
        },
    ),
    Path(
        "/api/chat", {"model": "fake/story", "messages": MESSAGES, "options": {"num_predict": 2}}, ollama_error, OLLAMA,
        {"messages": [{"role": "user", "content": LONG}]},
        ({"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, "images"),
        {
            "messages": 3, "options": {"thinking_token_budget": "hot"}, "stream": "yes", "model": 3, "format": 5,
            "tools": [{"type": "f"}], "think": "most",
        },
    ),
    Path(
        "/api/generate", {"model": "fake/story", "prompt": "a", "options": {"num_predict": 2}}, ollama_error, OLLAMA,
        {"prompt": LONG}, ({"images": ["aGk="]}, "images"),
        {"prompt": 3, "options": [], "raw": "yes", "context": ["a"], "think": "most"},
    ),
    Path(
        "/api/v1/generate", {"prompt": "a", "max_length": 2}, kobold_error, KOBOLD, None,
        ({"images": ["aGk="]}, "images"),
        {"prompt": 3, "max_length": 0, "rep_pen": -1, "genkey": 5, "max_context_length": "x"},
        names_model=False,
    ),
    Path(
        "/api/extra/generate/stream", {"prompt": "a", "max_length": 2}, kobold_error, KOBOLD, None,
        ({"images": ["aGk="]}, "images"), {"prompt": 3, "max_length": 513, "top_k": "x", "n": 2}, names_model=False,
    ),
    Path(
        "/completion", {"prompt": "a", "n_predict": 2}, llama_cpp_error, LLAMA, {"prompt": LONG},
        ({"prompt": ["a", "b"]}, "prompt"), {**SAMPLERS, "prompt": {}, "n_predict": "many", "n_probs": -1},
    ),
    Path(
        "/v1/embeddings", {"input": "a"}, openai_error, OPENAI, {"input": LONG}, ({"dimensions": 600}, "dimensions"),
        {"input": 3, "encoding_format": "int8", "dimensions": 0, "pooling": "max", "normalize": "yes"},
    ),
    Path(
        "/embedding", {"content": "a"}, llama_cpp_error, LLAMA, {"content": LONG}, ({"content": [[]]}, "empty"),
        {"content": 3, "input": {"a": 1}, "embd_normalize": -2},
    ),
    Path(
        "/api/embed", {"model": "fake/story", "input": "a"}, ollama_error, OLLAMA, {"input": LONG, "truncate": False},
        ({"dimensions": 600}, "dimensions"), {"input": 3, "truncate": "yes", "model": 3},
    ),
    Path(
        "/api/extra/embeddings", {"input": "a"}, kobold_error, KOBOLD, {"input": LONG, "truncate": False},
        ({"input": [[]]}, "empty"), {"input": 3, "truncate": "yes"}, names_model=False,
    ),
    Path(
        "/tokenize", {"prompt": "a"}, openai_error, OPENAI, None,
        ({"messages": [{"role": "user", "content": IMAGE}]}, ""), {"prompt": 3}, names_model=False,
    ),
    Path(
        "/v1/token/encode", {"text": "a"}, openai_error, OPENAI, None,
        ({"text": [{"role": "user", "content": IMAGE}]}, "image"), {"text": 3}, names_model=False,
    ),
    Path(
        "/v1/responses", {"input": "a", "max_output_tokens": 2}, openai_error, OPENAI, {"input": LONG},
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        {**SAMPLERS, "input": 3, "max_output_tokens": "many", "text": "x", "previous_response_id": 5},
    ),
    Path(
        "/v1/embeddings", {"input": "a"}, openai_error, OPENAI, {"input": LONG}, ({"input": [IMAGE]}, "input"),
        {"input": 3, "encoding_format": "xml", "dimensions": 0},
    ),
    Path(
        "/v1/messages/count_tokens", {"messages": MESSAGES}, anthropic_error, ANTHROPIC, None,
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "image"),
        {"messages": "hi", "system": 3, "tools": 5, "tool_choice": 3},
    ),
    Path(
        "/api/embed", {"model": "fake/story", "input": "a"}, ollama_error, OLLAMA, None, ({"input": IMAGE}, "input"),
        {"input": 3, "model": 5, "dimensions": 0},
    ),
    Path(
        "/embedding", {"content": "a"}, llama_cpp_error, LLAMA, {"content": LONG}, ({"content": IMAGE}, "content"),
        {"content": 3},
    ),
)  # fmt: skip
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.path)


@dataclass
class Guarded:
    """A server with a key and a neighbour's stream that is halfway through."""

    server: RunningServer
    path: Path

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.server.http.post(self.path.path, json={**self.path.body, **fields})

    def refused(self, response: httpx.Response, status: int) -> str:
        """The message of a refusal with this status."""
        assert response.status_code == status, (status, response.text[:500])
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"]
        kind, message = self.path.read(response.json())
        told = {kobold_error: "", llama_cpp_error: "not_supported_error"}.get(self.path.read)  # by reason, too
        assert kind == self.path.kinds[status] or (status == 400 and told in ("", kind)), kind
        assert message
        assert "Traceback" not in message
        return message


@pytest.fixture
async def guarded(path: Path) -> AsyncIterator[Guarded]:
    async with running_server(FakeEngine(hold_after=40), api_keys=(KEY,), max_body_bytes=100_000) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        body = {"prompt": "neighbour", "max_tokens": 90}
        neighbour = asyncio.ensure_future(server.http.post("/v1/completions", json=body))
        await server.engine.holding.wait()
        yield Guarded(server, path)
        assert len(server.engine.seen) == 1
        server.engine.gate.set()
        assert (await neighbour).json()["choices"][0]["text"] == STORY.encode()[:90].decode()


@every_path
async def test_keys(guarded: Guarded) -> None:
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": ""}, {"x-api-key": "wrong"}):
        given = {"authorization": "", **headers}
        response = await guarded.server.http.post(guarded.path.path, json=guarded.path.body, headers=given)
        assert "key" in guarded.refused(response, 401)


@every_path
async def test_models_contexts_and_fields(guarded: Guarded) -> None:
    path = guarded.path
    if path.names_model:
        message = guarded.refused(await guarded.ask(model="nobody"), 404)
        assert "nobody" in message
        assert "fake/story" in message
    if path.too_long is not None:
        message = guarded.refused(await guarded.ask(**path.too_long), 400)
        numbers = [int(word) for word in message.replace("(", " ").split() if word.isdigit()]
        assert 512 in numbers
        assert any(number > 700 for number in numbers), message
    fields, told = path.unsupported
    assert told in guarded.refused(await guarded.ask(**fields), 400)
    for name, value in path.wrong.items():
        inner = next(iter(value)) if name == "options" and value else name
        assert inner in guarded.refused(await guarded.ask(**{name: value}), 400), (name, value)


@every_path
async def test_streams_are_refused_before_they_begin(guarded: Guarded) -> None:
    if "stream" in guarded.path.path or not guarded.path.names_model:
        return
    name, value = next(iter(guarded.path.wrong.items()))
    assert guarded.refused(await guarded.ask(**{"stream": True, name: value}), 400)
    assert guarded.refused(await guarded.ask(stream=True, model="nobody"), 404)


@every_path
async def test_bodies_and_methods(guarded: Guarded) -> None:
    http, path = guarded.server.http, guarded.path.path
    nested = b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    for content in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\xff"}', nested, b'{"a": NaN}'):
        guarded.refused(await http.post(path, content=content, headers=JSON), 400)
    guarded.refused(await http.post(path, content=b" " * 100_001, headers=JSON), 413)
    page = {"content-type": "text/plain", "origin": "http://evil.com"}
    guarded.refused(await http.post(path, content=b"{}", headers=page), 415)
    refused = await http.put(path, json={})
    assert "POST" in guarded.refused(refused, 405)
    assert "POST" in refused.headers["allow"]
