"""`timings` and `prompt_progress`, as llama.cpp's clients ask for them, on its endpoint and OpenAI's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import BOS, STORY
from running import RunningServer

NAMES = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip
PROMPT = "A prompt of thirty two letters.."
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6}
COMPLETION = {"prompt": PROMPT, "max_tokens": 6}
LLAMA_CPP = {"prompt": PROMPT, "n_predict": 6}
ENDPOINTS = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/completion", LLAMA_CPP)]
OPENAI = ENDPOINTS[:2]


async def chunks(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await server.http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check(timings: dict[str, float], *, prompt: int, cached: int, answer: int) -> None:
    """The counts, and that rates are what counts and times make."""
    assert set(timings) == NAMES
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (cached, prompt - cached, answer)
    for kind in ("prompt", "predicted"):
        count, ms = timings[f"{kind}_n"], timings[f"{kind}_ms"]
        assert ms >= 0
        assert timings[f"{kind}_per_token_ms"] == pytest.approx(ms / count)
        assert timings[f"{kind}_per_second"] == pytest.approx(count / ms * 1e3 if ms else 0)


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_timings_of_whole_answers(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    plain = (await server.http.post(path, json=body)).json()
    assert ("timings" in plain) == (path == "/completion")
    for field in ("return_timings", "timings_per_token"):
        answer = (await server.http.post(path, json={**body, field: True})).json()
        prompt = len(server.engine.seen[-1][0])
        check(answer["timings"], prompt=prompt, cached=prompt // 16 * 16, answer=6)


@pytest.mark.parametrize(("path", "body"), OPENAI)
async def test_timings_at_a_streams_end(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    usage = {"stream_options": {"include_usage": True}}
    *_, ended, last = await chunks(server, path, {**body, **usage, "return_timings": True, "n": 2})
    prompt = len(server.engine.seen[-1][0])
    assert ended["choices"][0]["finish_reason"] == "length"
    for chunk in (ended, last):
        check(chunk["timings"], prompt=prompt, cached=prompt // 16 * 16, answer=12)
    assert last["usage"]["completion_tokens"] == 12
    assert sum("timings" in chunk for chunk in await chunks(server, path, {**body, "return_timings": True})) == 1
    assert not any("timings" in chunk for chunk in await chunks(server, path, body))


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_timings_with_every_token(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    found = await chunks(server, path, {**body, "timings_per_token": True})
    counts = [chunk["timings"]["predicted_n"] for chunk in found if "timings" in chunk]
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_progress_of_a_prompt(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    found = await chunks(server, path, {**body, "return_progress": True})
    prompt = len(server.engine.seen[-1][0])
    told = [chunk["prompt_progress"] for chunk in found if "prompt_progress" in chunk]
    assert all("prompt_progress" in chunk for chunk in found[: len(told)])  # they come first
    assert [item["processed"] for item in told] == [*range(8, prompt, 8), prompt]
    assert {item["total"] for item in told} == {prompt}
    assert [item["cache"] for item in told] == [4] * (len(told) - 1) + [prompt // 16 * 16]
    assert [item["time_ms"] for item in told] == sorted(item["time_ms"] for item in told)
    text = "".join(text_of(chunk) for chunk in found)
    assert text == STORY[:6]
    assert not any("prompt_progress" in chunk for chunk in await chunks(server, path, body))


async def test_progress_of_several_prompts(server: RunningServer) -> None:
    body = {"prompt": [[BOS] * 20, [BOS] * 30], "max_tokens": 2, "n": 2, "return_progress": True}
    found = await chunks(server, "/v1/completions", body)
    told = [(chunk["choices"][0]["index"], chunk["prompt_progress"]) for chunk in found if "prompt_progress" in chunk]
    assert [item["processed"] for index, item in told if index == 0] == [8, 16, 20]
    assert [item["processed"] for index, item in told if index == 2] == [8, 16, 24, 30]


async def test_openais_client_reads_such_a_stream(server: RunningServer) -> None:
    stream = await server.client.chat.completions.create(
        model="fake/story", **CHAT, stream=True, extra_body={"return_progress": True, "timings_per_token": True}
    )
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    assert text == STORY[:6]


@pytest.mark.parametrize("field", ["return_timings", "timings_per_token", "return_progress"])
@pytest.mark.parametrize(("path", "body"), OPENAI)
async def test_wrong_types_are_refused(server: RunningServer, path: str, body: dict[str, Any], field: str) -> None:
    response = await server.http.post(path, json={**body, field: 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def text_of(chunk: dict[str, Any]) -> str:
    if "content" in chunk:
        return str(chunk["content"])
    choice = chunk["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
