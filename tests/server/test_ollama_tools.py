"""Tools and thinking through Ollama's own client: whole, in lines, sent back; and what models say they can do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ollama
import pytest
from running import RunningServer, running_server
from scripted import ScriptedEngine

from aphrodite.sampling.table import ReasoningMarks

ASKED: Any = [{"role": "user", "content": "How is the weather?"}]
MODEL = "fake/story"
TWO = (
    "I look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "東京"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: which one
    """
    return city


def now() -> str:
    """The time."""
    return ""


@asynccontextmanager
async def serving(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[tuple[ollama.AsyncClient, RunningServer]]:
    async with running_server(engine, **settings) as server:
        yield ollama.AsyncClient(host=server.url), server


async def both(client: ollama.AsyncClient, **fields: Any) -> tuple[ollama.Message, list[ollama.ChatResponse]]:
    """A chat's whole message, and the lines of its stream."""
    whole = await client.chat(MODEL, **fields)
    assert whole.done_reason == "stop"
    return whole.message, [part async for part in await client.chat(MODEL, stream=True, **fields)]


def joined(parts: list[ollama.ChatResponse]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, thinking and calls of a stream's lines."""
    messages = [part.message for part in parts]
    return (
        "".join(message.content or "" for message in messages),
        "".join(message.thinking or "" for message in messages),
        [call for message in messages for call in calls(message)],
    )


def calls(message: ollama.Message) -> list[tuple[str, Any]]:
    return [(call.function.name, dict(call.function.arguments)) for call in message.tool_calls or []]


@pytest.mark.parametrize("template", ["chatml", "qwen-3"])
async def test_calls_whole_and_in_lines(template: str) -> None:
    engine = ScriptedEngine(template, TWO)
    async with serving(engine) as (client, server):
        message, parts = await both(client, messages=ASKED, tools=[get_weather, now])
        assert "get_weather" in engine.prompt
        raw = await server.http.post(
            "/api/chat", json={"model": MODEL, "messages": ASKED, "stream": False,
                               "tools": [{"type": "function", "function": {"name": "now"}}]},
        )  # fmt: skip
    called = [("get_weather", {"city": "東京"}), ("now", {})]
    assert ((message.content or "").strip(), calls(message)) == ("I look.", called)
    text, thinking, found = joined(parts)
    assert (text.strip(), thinking, found) == ("I look.", "", called)
    assert sum(bool(part.message.tool_calls) for part in parts) == 2  # each whole, in a line of its own
    assert (parts[-1].done, parts[-1].done_reason) == (True, "stop")
    told = raw.json()["message"]["tool_calls"]
    assert [call["function"]["index"] for call in told] == [0, 1]
    assert len({call["id"] for call in told}) == 2


async def test_a_call_that_is_cut_off_is_text() -> None:
    async with serving(ScriptedEngine("chatml", TWO)) as (client, _):
        length = len('I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"c')
        answer = await client.chat(MODEL, ASKED, tools=[get_weather], options={"num_predict": length})
    assert answer.done_reason == "length"
    assert answer.message.tool_calls is None
    assert 'get_weather {"c' in (answer.message.content or "")


async def test_a_conversation_with_results() -> None:
    engine = ScriptedEngine("qwen-3", "<think>\nHm.\n</think>\n\n" + TWO)
    async with serving(engine) as (client, _):
        first = (await client.chat(MODEL, ASKED, tools=[get_weather, now])).message
        assert first.thinking == "Hm."
        results: Any = [
            {"role": "tool", "tool_name": "now", "content": "noon"},
            {"role": "tool", "content": "Rain."},
        ]
        engine.text = "It rains."
        answer = await client.chat(MODEL, [*ASKED, first, *results], tools=[get_weather, now])
    assert answer.message.content == "It rains."
    assert all(text in engine.prompt for text in ('"city": "東京"', "I look.", "Hm.", "noon", "Rain."))


async def test_calls_and_results_find_each_other() -> None:
    """Templates that demand ids get them, be they sent or not: results go by name, then in order."""
    template = (
        "{% for m in messages %}{{ m.role }} {{ m.tool_call_id }} {{ m.name }} "
        "{% for c in m.tool_calls %}[{{ c.id }} {{ c.function.name }}]{% endfor %}|{% endfor %}{{ tools }}"
    )
    engine = ScriptedEngine(template, "x")
    functions: Any = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b", "a")]
    functions.append({"id": "mine", "function": {"name": "c", "arguments": {}}})
    said = {"role": "assistant", "content": "", "tool_calls": functions}
    results = [
        {"role": "tool", "tool_name": "b", "content": ""},
        {"role": "tool", "tool_call_id": "mine", "content": ""},
        {"role": "tool", "tool_name": "a", "content": ""},
        {"role": "tool", "content": ""},
        {"role": "tool", "content": ""},
    ]
    async with serving(engine) as (_, server):
        body = {"model": MODEL, "stream": False, "messages": [*ASKED, said, *results],
                "tools": [{"type": "function", "function": {"name": "a"}}]}  # fmt: skip
        answer = await server.http.post("/api/chat", json=body)
        assert answer.status_code == 200, answer.text
    shown = [" ".join(part.split()) for part in engine.prompt.split("|")]
    assert shown[1] == "assistant [call00000 a][call00001 b][call00002 a][mine c]"
    assert shown[2:7] == ["tool call00001 b", "tool mine c", "tool call00000 a", "tool call00002 a", "tool"]


async def test_thinking_in_chats() -> None:
    engine = ScriptedEngine("qwen-3", THOUGHT)
    async with serving(engine) as (client, _):
        for think in (None, True, "low"):
            message, parts = await both(client, messages=ASKED, think=think, options={"thinking_token_budget": 9})
            assert (message.thinking, message.content) == ("Two and two.", "Four.")
            assert joined(parts) == ("Four.", "Two and two.", [])
            assert not engine.prompt.endswith("</think>\n\n")
            assert engine.seen[-1][1].reasoning == ReasoningMarks("<think>", "</think>", False)
        engine.text = "Four."
        message, parts = await both(client, messages=ASKED, think=False)
        assert engine.prompt.endswith("<think>\n\n</think>\n\n")
    assert (message.thinking, message.content) == (None, "Four.")
    assert joined(parts) == ("Four.", "", [])
    engine = ScriptedEngine("gpt-oss", "<|channel|>analysis<|message|>Hm.<|end|>")
    async with serving(engine) as (client, _):
        assert (await client.chat(MODEL, ASKED, think="high")).message.thinking == "Hm."
        assert "Reasoning: high" in engine.prompt
    engine = ScriptedEngine("deepseek-r1", "</think>Four.")  # which cannot turn it off, so it is closed at once
    async with serving(engine) as (client, _):
        assert (await client.chat(MODEL, ASKED, think=False)).message.content == "Four."
        assert engine.seen[-1][1].thinking_token_budget == 0


async def test_thinking_in_texts() -> None:
    engine = ScriptedEngine("qwen-3", THOUGHT)
    async with serving(engine) as (client, _):
        whole = await client.generate(MODEL, "2+2?", think=True)
        parts = [part async for part in await client.generate(MODEL, "2+2?", stream=True)]
        raw = await client.generate(MODEL, "2+2?", raw=True)
        engine.text = "Four."
        without = await client.generate(MODEL, "2+2?", think=False)
    assert (whole.thinking, whole.response) == ("Two and two.", "Four.")
    assert "".join(part.thinking or "" for part in parts) == "Two and two."
    assert "".join(part.response or "" for part in parts) == "Four."
    assert parts[-1].context == whole.context is not None
    assert (raw.thinking, without.thinking, without.response) == (None, None, "Four.")
    assert raw.response == "\nTwo and two.\n\n\nFour."  # as it came, without special tokens


async def test_structured_answers_and_tools() -> None:
    engine = ScriptedEngine("deepseek-r1", "Hm.</think>{}")
    async with serving(engine) as (client, _):
        message = (await client.chat(MODEL, ASKED, format="json")).message
    assert (message.thinking, message.content) == ("Hm.", "{}")
    params = engine.seen[-1][1]
    assert params.grammar is not None
    assert params.grammar.kind == "lark"  # behind reasoning


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        ("vicuna", {}, ["completion"]),
        ("vicuna", {"tool_parser": "hermes", "reasoning_parser": "think"}, ["completion", "tools", "thinking"]),
        ("qwen-3", {}, ["completion", "tools", "thinking"]),
        ("deepseek-r1", {}, ["completion", "thinking"]),
        ("qwen-3", {"tool_parser": "none", "reasoning_parser": "none"}, ["completion"]),
    ],
)
async def test_models_say_what_they_can_do(template: str, settings: dict[str, Any], expected: list[str]) -> None:
    async with serving(ScriptedEngine(template, "Hm."), **settings) as (client, _):
        assert (await client.show(MODEL)).capabilities == expected
        if settings.get("tool_parser") == "none":
            with pytest.raises(ollama.ResponseError, match="does not support tools"):
                await client.chat(MODEL, ASKED, tools=[now])
        if "thinking" not in expected:
            with pytest.raises(ollama.ResponseError, match="does not support thinking"):
                await client.chat(MODEL, ASKED, think=True)
            assert (await client.chat(MODEL, ASKED, think=False)).message.content == "Hm."
