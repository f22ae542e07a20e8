"""Tools and thinking through Anthropic's own client: whole, streamed, sent back, counted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from running import running_server
from scripted import ScriptedEngine

from aphrodite.sampling.table import ReasoningMarks

ASKED: Any = [{"role": "user", "content": "How is the weather?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
NOW: Any = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
TWO = (
    '{lead}I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "東京"}}}}\n</tool_call>\n'
    '<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
)
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}
OPTIONS: dict[str, Any] = {"model": "fake/story", "max_tokens": 4000, "messages": ASKED}


@asynccontextmanager
async def client_of(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        running_server(engine, **settings) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        yield client


async def both(client: anthropic.AsyncAnthropic, **fields: Any) -> tuple[Message, Message, list[Any]]:
    """The message whole and as its stream adds up, and the stream's events."""
    whole = await client.messages.create(**OPTIONS, **fields)
    events: list[Any] = [event async for event in await client.messages.create(**OPTIONS, stream=True, **fields)]
    async with client.messages.stream(**OPTIONS, **fields) as stream:
        final = await stream.get_final_message()
    return Message.model_validate(whole.model_dump(), strict=True), final, events


def told(message: Message) -> list[Any]:
    """The blocks without what differs each time."""
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    return [{key: value for key, value in block.items() if key not in ("id", "signature")} for block in blocks]


@pytest.mark.parametrize("template", ["chatml", "qwen-3"])
async def test_calls_whole_and_streamed(template: str) -> None:
    engine = ScriptedEngine(template, TWO.format(lead=""))
    async with client_of(engine) as client:
        whole, final, events = await both(client, tools=[WEATHER, NOW])
        assert "get_weather" in engine.prompt
        alone = await client.messages.create(
            **OPTIONS, tools=[WEATHER, NOW], tool_choice={"type": "auto", "disable_parallel_tool_use": True}
        )
        await client.messages.create(**OPTIONS, tools=[WEATHER], tool_choice={"type": "none"})
        assert "get_weather" not in engine.prompt
    assert told(whole) == told(final) == [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "name": "get_weather", "input": {"city": "東京"}},
        {"type": "tool_use", "name": "now", "input": {}},
    ]  # fmt: skip
    assert whole.stop_reason == final.stop_reason == "tool_use"
    ids = [block.id for block in whole.content if block.type == "tool_use"]
    assert len(set(ids)) == 2
    assert all(name.startswith("toolu_") for name in ids)
    assert [block["type"] for block in told(alone)] == ["text", "tool_use"]
    starts = [event for event in events if event.type == "content_block_start"]
    assert [event.index for event in starts] == [0, 1, 2]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]
    deltas = [event.delta for event in events if event.type == "content_block_delta" and event.index == 1]
    pieces = [delta.partial_json for delta in deltas if delta.type == "input_json_delta"]
    assert len(pieces) > 3  # as they are written
    assert json.loads("".join(pieces)) == {"city": "東京"}


async def test_calls_that_are_demanded() -> None:
    engine = ScriptedEngine("chatml", '[{"name": "now", "arguments": {}}]')
    async with client_of(engine) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "now"}):
            whole, final, _ = await both(client, tools=[WEATHER, NOW], tool_choice=choice)
            assert told(whole) == told(final) == [{"type": "tool_use", "name": "now", "input": {}}]
            grammar = engine.seen[-1][1].grammar
            assert grammar is not None
            assert ("get_weather" in grammar.text) == (choice["type"] == "any")


async def test_a_call_that_is_cut_off_keeps_its_text() -> None:
    engine = ScriptedEngine("chatml", TWO.format(lead=""))
    async with client_of(engine) as client:
        options = OPTIONS | {
            "max_tokens": len("I look.\n<tool_call>\n") + len('{"name": "get_weather", "arguments": {"c')
        }
        whole = await client.messages.create(**options, tools=[WEATHER])
    assert whole.stop_reason == "max_tokens"
    assert told(whole)[1] == {"type": "tool_use", "name": "get_weather", "input": {"INVALID_JSON": '{"c'}}


async def test_a_conversation_with_results() -> None:
    """What the client got goes back as it came; results follow as text, lists and errors, beside what is said."""
    engine = ScriptedEngine("qwen-3", TWO.format(lead="<think>\nHm.\n</think>\n\n"))
    async with client_of(engine) as client:
        first = await client.messages.create(**OPTIONS, tools=[WEATHER, NOW], thinking=THINKING)
        weather, now = (block.id for block in first.content if block.type == "tool_use")
        results = [
            {"type": "tool_result", "tool_use_id": weather, "content": [{"type": "text", "text": "Rain."}] * 2},
            {"type": "tool_result", "tool_use_id": now, "content": "no clock", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        engine.text = "It rains."
        answered: Any = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        options = OPTIONS | {"messages": answered, "tools": [WEATHER, NOW]}
        whole = await client.messages.create(**options)
        prompt = engine.prompt
        counted = await client.messages.count_tokens(
            **{key: options[key] for key in ("model", "messages", "tools")}, thinking={"type": "disabled"}
        )
        assert counted.input_tokens == len(engine.seen[-1][0])
        fewer = await client.messages.count_tokens(model="fake/story", messages=answered)
        assert fewer.input_tokens < counted.input_tokens
        no_result = {"type": "tool_result", "tool_use_id": now}
        await client.messages.create(
            **options | {"messages": [*answered[:2], {"role": "user", "content": [*results[:1], no_result]}]}
        )
    assert (told(whole), whole.stop_reason) == ([{"type": "text", "text": "It rains."}], "end_turn")
    for text in ('"city": "東京"', "I look.", "Rain.\nRain.", "Error: no clock", "And now?"):
        assert text in prompt, text
    assert "Hm." in engine.prompt  # the template shows what was thought since the user spoke
    assert prompt.index("Rain.") < prompt.index("no clock") < prompt.index("And now?")


async def test_thinking_whole_and_streamed() -> None:
    engine = ScriptedEngine("qwen-3", "<think>\nTwo and two.\n</think>\n\nFour.")
    async with client_of(engine) as client:
        whole, final, events = await both(client, thinking=THINKING)
        params = engine.seen[-1][1]
        assert (params.thinking_token_budget, params.reasoning) == (1024, ReasoningMarks("<think>", "</think>", False))
        assert not engine.prompt.endswith("</think>\n\n")
        hidden, hidden_final, _ = await both(client, thinking={**THINKING, "display": "omitted"})
        adaptive = await client.messages.create(
            **OPTIONS, thinking={"type": "adaptive"}, output_config={"effort": "high"}
        )
        assert engine.seen[-1][1].thinking_token_budget is None
    assert told(whole) == told(final) == told(adaptive)
    assert told(whole) == [{"type": "thinking", "thinking": "Two and two."}, {"type": "text", "text": "Four."}]
    assert whole.usage.output_tokens_details is not None
    assert whole.usage.output_tokens_details.thinking_tokens == len("\nTwo and two.\n") + 2
    assert whole.content[0].signature == final.content[0].signature != ""
    deltas = [event.delta.type for event in events if event.type == "content_block_delta" and event.index == 0]
    assert deltas[-1] == "signature_delta"
    assert set(deltas[:-1]) == {"thinking_delta"}
    assert (
        told(hidden) == told(hidden_final) == [{"type": "thinking", "thinking": ""}, {"type": "text", "text": "Four."}]
    )
    engine = ScriptedEngine("qwen-3", "Five.")
    async with client_of(engine) as client:  # the signature brings what the block leaves out
        call = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"}
        said = {"role": "assistant", "content": [hidden.content[0].model_dump(), call]}
        back = [*ASKED, said, {"role": "user", "content": [result]}]
        await client.messages.create(**OPTIONS | {"messages": back, "tools": [NOW], "thinking": THINKING})
    assert "Two and two." in engine.prompt


async def test_thinking_is_off_unless_it_is_asked_for() -> None:
    engine = ScriptedEngine("qwen-3", "Four.")
    async with client_of(engine) as client:
        for thinking in ({}, {"thinking": {"type": "disabled"}}):
            answer = await client.messages.create(**OPTIONS, **thinking)
            assert told(answer) == [{"type": "text", "text": "Four."}]
            assert engine.prompt.endswith("<think>\n\n</think>\n\n")
    engine = ScriptedEngine("deepseek-r1", "</think>\n\nFour.")  # which cannot turn it off, so it is closed at once
    async with client_of(engine) as client:
        whole, final, _ = await both(client)
        assert engine.seen[-1][1].thinking_token_budget == 0
        assert told(whole) == told(final) == [{"type": "text", "text": "Four."}]
        assert getattr(whole, "warnings", None) is None
    engine = ScriptedEngine("chatml", "Four.")
    async with client_of(engine) as client:
        warned = await client.messages.create(**OPTIONS, thinking=THINKING)
        assert "says nothing of reasoning" in warned.warnings[0]


async def test_structured_output_behind_thinking() -> None:
    engine = ScriptedEngine("deepseek-r1", "Hm.</think>{}")
    wanted: Any = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    async with client_of(engine) as client:
        answer = await client.messages.create(**OPTIONS, thinking=THINKING, output_config=wanted)
        assert told(answer) == [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "{}"}]
        params = engine.seen[-1][1]
    assert params.grammar is not None
    assert (params.grammar.kind, params.thinking_token_budget) == ("lark", 1024)


async def test_an_empty_answer_has_an_empty_text() -> None:
    async with client_of(ScriptedEngine("chatml", "")) as client:
        whole, final, _ = await both(client)
    assert told(whole) == told(final) == [{"type": "text", "text": ""}]


async def test_a_stop_sequence_in_a_call_is_a_stop_sequence() -> None:
    engine = ScriptedEngine("chatml", TWO.format(lead=""))
    async with client_of(engine) as client:
        answer = await client.messages.create(**OPTIONS, tools=[WEATHER, NOW], stop_sequences=["東"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "東")
