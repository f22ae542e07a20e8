"""Anthropic's own client against a running server: whole, streamed, counted, refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from fake_engine import STORY, FakeEngine
from running import RunningServer, running_server

from aphrodite.errors import QueueFullError

TOOL = {"name": "f", "input_schema": {"type": "object"}}
MESSAGES: Any = [{"role": "user", "content": "Tell me a story."}]


def said(block: dict[str, Any]) -> dict[str, Any]:
    """A conversation in which the assistant's message has one block."""
    return {"messages": [*MESSAGES, {"role": "assistant", "content": [block]}]}


def heard(block: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A conversation that ends with a block of the user's, behind a call named b."""
    call = {"type": "tool_use", "id": "b", "name": "f", "input": {}}
    return {"messages": [*said(call)["messages"], {"role": "user", "content": [{**block, **(more or {})}]}]}


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


async def test_a_whole_message(server: RunningServer, client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(
        model="fake/story",
        max_tokens=17,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Tell"}]},
            {"role": "assistant", "content": "What?"},
            {"role": "user", "content": "A story."},
        ],
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        extra_body={"temperature": 0.5, "top_k": 7, "min_p": 0.05, "dry_multiplier": 0.8},
    )
    assert [block.text for block in message.content if block.type == "text"] == [STORY.encode()[:17].decode()]
    assert (message.stop_reason, message.stop_sequence, message.role) == ("max_tokens", None, "assistant")
    token_ids, params = server.engine.seen[-1][:2]
    assert bytes(token_ids).decode() == "system: Be brief.\nuser: Tell\nassistant: What?\nuser: A story.\nassistant:"
    assert (params.temperature, params.top_k, params.min_p, params.dry_multiplier) == (0.5, 7, 0.05, 0.8)
    cached = message.usage.cache_read_input_tokens or 0
    assert (message.usage.input_tokens + cached, message.usage.output_tokens) == (len(token_ids), 17)


async def test_a_streamed_message_is_the_whole_one(client: anthropic.AsyncAnthropic) -> None:
    options: dict[str, Any] = {"model": "fake/story", "max_tokens": 40, "messages": MESSAGES}
    whole = await client.messages.create(**options)
    async with client.messages.stream(**options) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    kinds = [event.type async for event in await client.messages.create(**options, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


async def test_stop_sequences_are_told_apart_from_the_end(client: anthropic.AsyncAnthropic) -> None:
    options: dict[str, Any] = {"model": "fake/story", "max_tokens": 200, "messages": MESSAGES}
    stopped = await client.messages.create(**options, stop_sequences=["time"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "time")
    ended = await client.messages.create(**options)
    assert (ended.stop_reason, ended.stop_sequence) == ("end_turn", None)


async def test_a_begun_answer_is_continued(server: RunningServer, client: anthropic.AsyncAnthropic) -> None:
    await client.messages.create(
        model="fake/story", max_tokens=2, messages=[*MESSAGES, {"role": "assistant", "content": "Once"}]
    )
    assert bytes(server.engine.seen[-1][0]).decode().endswith("assistant: Once")


async def test_systems_speak_anywhere(server: RunningServer, client: anthropic.AsyncAnthropic) -> None:
    said = [*MESSAGES, {"role": "system", "content": [{"type": "text", "text": "In French."}]}]
    await client.messages.create(model="fake/story", max_tokens=2, messages=said, system="Be brief.")
    prompt = bytes(server.engine.seen[-1][0]).decode()
    assert prompt == "system: Be brief.\nuser: Tell me a story.\nsystem: In French.\nassistant:"


async def test_tokens_are_counted_as_generation_would(server: RunningServer, client: anthropic.AsyncAnthropic) -> None:
    count = await client.messages.count_tokens(model="fake/story", messages=MESSAGES, system="Be brief.")
    await client.messages.create(model="fake/story", max_tokens=1, messages=MESSAGES, system="Be brief.")
    assert count.input_tokens == len(server.engine.seen[-1][0])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "system", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"system": 3}, "system"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f g", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": {}, "description": 3}]}, "tools[0].description"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools[0].type"),
        ({"tools": [TOOL] * 2}, "two tools"),
        ({"tools": [{"name": f"f{i}", "input_schema": {}} for i in range(513)]}, "512"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "must"}, "tools": [TOOL]}, "tool_choice.type"),
        ({"tool_choice": {"type": ["any"]}, "tools": [TOOL]}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [TOOL]}, "none of the tools"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}, "tools": [TOOL]}, "disable_parallel"),
        ({"tool_choice": {"type": "any"}, "tools": [TOOL], "guided_choice": ["x"]}, "tool_choice"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": True}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2**31}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 3}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 3}}}, "output_config.format"),
        (said({"type": "tool_use", "id": "a", "name": "f"}), "content[0].input"),
        (said({"type": "tool_use", "id": 3, "name": "f", "input": {}}), "content[0].id"),
        (said({"type": "tool_use", "id": "a", "name": "f", "input": {}}), "messages[1]"),
        (said({"type": "thinking"}), "content[0].thinking"),
        (said({"type": "thinking", "thinking": "", "signature": 3}), "content[0].signature"),
        (said({"type": "thinking", "thinking": "", "signature": "aphrodite.thinking:?"}), "content[0].signature"),
        (said({"type": "redacted_thinking"}), "content[0].data"),
        (said({"type": "server_tool_use", "id": "a", "name": "web_search", "input": {}}), "content[0]"),
        (heard({"type": "tool_result", "content": "x"}), "content[0].tool_use_id"),
        (heard({"type": "tool_result", "tool_use_id": "a", "content": "x"}), "no tool_use"),
        (heard({"type": "tool_result", "tool_use_id": "b", "content": "x"}, {"is_error": 3}), "content[0].is_error"),
        (heard({"type": "tool_result", "tool_use_id": "b", "content": 3}), "content[0].content"),
        (heard({"type": "tool_result", "tool_use_id": "b", "content": [{"type": "image"}]}), "content[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "512"),
    ],
)
async def test_errors_have_anthropics_shape(server: RunningServer, fields: dict[str, Any], told: str) -> None:
    body = {"model": "fake/story", "max_tokens": 5, "messages": MESSAGES, **fields}
    response = await server.http.post("/v1/messages", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert told in response.json()["error"]["message"]
    assert not server.engine.seen


async def test_errors_are_the_clients_own_exceptions(server: RunningServer, client: anthropic.AsyncAnthropic) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "messages": MESSAGES}
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="nobody", **options)
    server.engine.refuse = QueueFullError("too many requests wait", retry_after=2.0)
    with pytest.raises(anthropic.RateLimitError):
        await client.messages.create(model="fake/story", **options)


async def test_keys_are_asked_for() -> None:
    async with running_server(api_keys=("right",)) as server:
        options: dict[str, Any] = {"model": "fake/story", "max_tokens": 5, "messages": MESSAGES}
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                await client.messages.create(**options)
            assert caught.value.body["error"]["type"] == "authentication_error"
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="right", max_retries=0) as client:
            assert (await client.messages.create(**options)).usage.output_tokens == 5


async def test_an_engine_that_fails_in_mid_stream_is_an_error_event() -> None:
    async with (
        running_server(FakeEngine(fail_after=4)) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        stream = await client.messages.create(model="fake/story", max_tokens=9, messages=MESSAGES, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="could not finish"):
            async for _ in stream:
                pass
