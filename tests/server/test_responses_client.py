"""`/v1/responses` through OpenAI's client: whole and streamed, tools, reasoning, schemas, conversations that go on."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from fake_engine import STORY, FakeEngine
from openai.types.responses import Response, ResponseStreamEvent
from running import RunningServer, running_server
from scripted import ScriptedEngine

from aphrodite import AsyncOpenAI
from aphrodite.sampling.table import Grammar

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
NOW = {"type": "function", "name": "now"}
TWO = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "東京"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."


async def ask(server: RunningServer, input: Any = "Tell me.", **fields: Any) -> Response:
    answer = await server.client.responses.create(model="fake/story", input=input, **fields)
    return Response.model_validate(answer.model_dump(by_alias=True), strict=True)


async def told(server: RunningServer, input: Any = "Tell me.", **fields: Any) -> list[Any]:
    """All events of a stream, each checked against the client's own types, in an unbroken order."""
    stream = await server.client.responses.create(model="fake/story", input=input, stream=True, **fields)
    events = [event async for event in stream]
    for event in events:
        EVENT.validate_python(event.model_dump(by_alias=True), strict=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return events


def names(events: list[Any]) -> list[str]:
    """The types of events, deltas in a row as one."""
    short = [event.type.removeprefix("response.") for event in events]
    return [name for before, name in zip(["", *short], short, strict=False) if name != before]


async def test_a_whole_answer(server: RunningServer) -> None:
    settings = {"max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9}
    answer = await ask(server, instructions="Be brief.", metadata={"a": "b"}, user="me", **settings)
    assert answer.output_text == STORY.encode()[:9].decode()
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.id.startswith("resp_")
    assert (answer.max_output_tokens, answer.temperature, answer.top_p) == (9, 0.5, 0.9)
    assert (answer.presence_penalty, answer.frequency_penalty) == (0, 0)  # which Open Responses' clients demand
    assert (answer.metadata, answer.user, answer.instructions) == ({"a": "b"}, "me", "Be brief.")
    assert (answer.store, answer.service_tier, answer.truncation) == (True, "default", "disabled")
    assert answer.text.format.type == "text"
    prompt, params, _, _ = server.engine.seen[-1]
    assert bytes(prompt).decode() == "system: Be brief.\nuser: Tell me.\nassistant:"
    assert (params.max_tokens, params.temperature) == (9, 0.5)
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (len(prompt), 9, len(prompt) + 9)
    assert usage.input_tokens_details.cached_tokens == len(prompt) // 16 * 16
    whole = await ask(server)
    assert (whole.status, whole.output_text, whole.incomplete_details) == ("completed", STORY, None)
    assert whole.completed_at >= whole.created_at


async def test_a_streamed_answer(server: RunningServer) -> None:
    events = await told(server, max_output_tokens=5)
    assert names(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type.endswith(".delta")) == STORY[:5]
    places = {(event.item_id, event.output_index, event.content_index) for event in events[3:-2]}
    assert places == {(events[2].item.id, 0, 0)}
    assert events[-1].response.output[0] == events[-2].item
    assert {event.response.id for event in (*events[:2], events[-1])} == {events[0].response.id}
    assert events[0].response.status == "in_progress"
    assert (await told(server))[-1].type == "response.completed"
    async with server.client.responses.stream(model="fake/story", input="Tell me.") as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == STORY
    reply = await server.http.post("/v1/responses", json={"input": "x", "stream": True, "max_output_tokens": 1})
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.text.split("\n\n")
    for event in filter(None, lines):
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


async def test_log_probabilities_of_the_text() -> None:
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    async with running_server(ScriptedEngine("qwen-3", THOUGHT)) as server:
        answer = await ask(server, **wanted)
        (part,) = answer.output[-1].content
        assert [entry.token for entry in part.logprobs] == list("Four.")
        assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
        events = await told(server, **wanted)
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert [entry.token for event in deltas for entry in event.logprobs] == list("Four.")
        (done,) = (event for event in events if event.type == "response.output_text.done")
        assert [entry.token for entry in done.logprobs] == list("Four.")
    async with running_server() as server:
        answer = await ask(server, include=["message.output_text.logprobs"], max_output_tokens=4)
        assert [entry.token for entry in answer.output[0].content[0].logprobs] == list("Once")
        assert (await ask(server, max_output_tokens=4)).output[0].content[0].logprobs == []


async def test_reasoning_comes_first_as_an_item_of_its_own() -> None:
    engine = ScriptedEngine("qwen-3", THOUGHT)
    async with running_server(engine) as server:
        answer = await ask(server, reasoning={"effort": "high"})
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.output[0].content[0].text == "Two and two."
        assert answer.output_text == "Four."
        assert answer.usage.output_tokens_details.reasoning_tokens == len("\nTwo and two.\n") + 2
        assert answer.reasoning.effort == "high"
        events = await told(server)
        assert names(events)[2:9] == [
            "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
            "content_part.done", "output_item.done", "output_item.added",
        ]  # fmt: skip
        assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
        again = [{"role": "user", "content": "2+2?"}, *(item.model_dump() for item in answer.output)]
        await ask(server, [*again, {"role": "user", "content": "Sure?"}], reasoning={"effort": "none"})
        assert engine.prompt.endswith("<think>\n\n</think>\n\n")
        assert "Four." in engine.prompt
        hidden = await ask(server, extra_body={"include_reasoning": False})
        assert [item.type for item in hidden.output] == ["message"]


async def test_tools_there_and_back() -> None:
    engine = ScriptedEngine("chatml", TWO)
    async with running_server(engine) as server:
        answer = await ask(server, tools=[WEATHER, NOW])
        message, *calls = answer.output
        assert message.content[0].text == "I look."
        assert [(call.name, json.loads(call.arguments), call.status) for call in calls] == [
            ("get_weather", {"city": "東京"}, "completed"),
            ("now", {}, "completed"),
        ]
        assert [tool.name for tool in answer.tools] == ["get_weather", "now"]
        alone = await ask(server, tools=[WEATHER, NOW], parallel_tool_calls=False)
        assert [item.type for item in alone.output] == ["message", "function_call"]
        engine.text = "It rains."
        outputs = [
            {"type": "function_call_output", "call_id": calls[0].call_id, "output": "Rain"},
            {
                "type": "function_call_output",
                "call_id": calls[1].call_id,
                "output": [{"type": "input_text", "text": "Noon"}],
            },
        ]
        by_hand = [{"role": "user", "content": "Tell me."}, *(item.model_dump() for item in answer.output), *outputs]
        final = await ask(server, by_hand, tools=[WEATHER, NOW])
        assert final.output_text == "It rains."
        prompt = engine.prompt
        assert prompt.count("<|im_start|>assistant") == 2
        assert "<tool_response>\nRain\n</tool_response>" in prompt
        stored = await ask(server, outputs, tools=[WEATHER, NOW], previous_response_id=answer.id)
        assert stored.output_text == "It rains."
        assert engine.prompt == prompt


async def test_calls_are_streamed_as_they_are_written() -> None:
    async with running_server(ScriptedEngine("chatml", TWO)) as server:
        events = await told(server, tools=[WEATHER, NOW])
        assert names(events)[8:] == [
            "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
            "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
            "completed",
        ]  # fmt: skip
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert len(deltas) > 5
        calls = [item for item in events[-1].response.output if item.type == "function_call"]
        assert "".join(deltas) == "".join(call.arguments for call in calls)
        assert [item.id for item in calls] == [
            event.item.id for event in events if event.type == "response.output_item.done"
        ][1:]


@pytest.mark.parametrize(
    ("choice", "only"),
    [
        ("required", ["get_weather", "now"]),
        ({"type": "function", "name": "now"}, ["now"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}, ["now"]),
    ],
)
async def test_calls_that_are_demanded(choice: Any, only: list[str]) -> None:
    engine = ScriptedEngine("chatml", '[{"name": "now", "arguments": {}}]')
    async with running_server(engine) as server:
        answer = await ask(server, tools=[WEATHER, NOW], tool_choice=choice)
        assert [item.type for item in answer.output] == ["function_call"]
        schema = json.loads(engine.seen[-1][1].grammar.text)
        assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == only


class Place(pydantic.BaseModel):
    city: str


async def test_answers_of_a_schema() -> None:
    engine = ScriptedEngine("chatml", '{"city": "Oslo"}')
    async with running_server(engine) as server:
        answer = await server.client.responses.parse(model="fake/story", input="Where?", text_format=Place)
        assert answer.output_parsed == Place(city="Oslo")
        grammar = engine.seen[-1][1].grammar
        assert json.loads(grammar.text)["properties"]["city"]["type"] == "string"
        assert Response.model_validate(answer.model_dump(by_alias=True)).text.format.schema_["required"] == ["city"]
        await ask(server, text={"format": {"type": "json_object"}})
        assert engine.seen[-1][1].grammar == Grammar("json_object", "")
        await ask(server, text={"format": {"type": "text"}}, extra_body={"guided_choice": ["a"]})
        assert engine.seen[-1][1].grammar.kind == "choice"


async def test_conversations_go_on_from_what_is_stored(server: RunningServer) -> None:
    client = server.client.responses
    first = await ask(server, "One?", instructions="Be brief.", max_output_tokens=3)
    second = await ask(server, "Two?", previous_response_id=first.id, max_output_tokens=3)
    assert bytes(server.engine.seen[-1][0]).decode() == "user: One?\nassistant: Onc\nuser: Two?\nassistant:"
    assert second.previous_response_id == first.id
    assert (await client.retrieve(first.id)).model_dump() == first.model_dump()
    listed = [item async for item in client.input_items.list(second.id, order="asc", limit=2)]
    assert [item.role for item in listed] == ["user", "assistant", "user"]
    assert listed[1] == first.output[0]
    assert [item.id for item in (await client.input_items.list(second.id)).data] == [i.id for i in listed[::-1]]
    referred = [{"type": "item_reference", "id": listed[1].id}, {"role": "user", "content": "Three?"}]
    await ask(server, referred, max_output_tokens=1)
    assert bytes(server.engine.seen[-1][0]).decode() == "assistant: Onc\nuser: Three?\nassistant:"
    await client.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(server, previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    await ask(server, "Four?", previous_response_id=second.id, max_output_tokens=1)  # its items are still there
    assert b"One?" in bytes(server.engine.seen[-1][0])
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.cancel(second.id)
    unkept = await ask(server, store=False, max_output_tokens=1)
    assert not unkept.store
    with pytest.raises(openai.NotFoundError):
        await client.retrieve(unkept.id)
    events = await told(server, "Five?", max_output_tokens=1)
    assert (await client.retrieve(events[0].response.id)).model_dump() == events[-1].response.model_dump()


async def test_a_key_sees_its_own_responses_only() -> None:
    async with running_server(api_keys=("a", "b")) as server:
        other = server.client.with_options(api_key="b")
        answer = await ask(server, max_output_tokens=1)
        for refused in (
            other.responses.retrieve(answer.id),
            other.responses.delete(answer.id),
            other.responses.input_items.list(answer.id),
            other.responses.create(input=[{"type": "item_reference", "id": answer.output[0].id}]),
        ):
            with pytest.raises(openai.NotFoundError):
                await refused
        with pytest.raises(openai.BadRequestError):
            await other.responses.create(input="x", previous_response_id=answer.id)
        await server.client.responses.retrieve(answer.id)


async def test_nothing_is_kept_where_the_server_has_no_room() -> None:
    async with running_server(response_store=0) as server:
        answer = await ask(server, max_output_tokens=1)
        assert not answer.store
        with pytest.raises(openai.NotFoundError):
            await server.client.responses.retrieve(answer.id)


async def test_every_sampler_and_what_we_say_beyond(server: RunningServer) -> None:
    client = AsyncOpenAI(base_url=str(server.client.base_url), max_retries=0)
    answer = await client.responses.create(
        model="fake/story", input="x", min_p=0.05, rep_pen=1.2, sampler_trace=True, return_token_ids=True, max_tokens=2,
        prompt_logprobs=0, reasoning={"effort": "low", "summary": "auto"}, extra_body={"temprature": 1},
    )  # fmt: skip
    params = server.engine.seen[-1][1]
    assert (params.min_p, params.repetition_penalty, params.max_tokens) == (0.05, 1.2, 2)
    assert answer.token_ids == list(b"On")
    assert bytes(answer.prompt_token_ids).decode() == "user: x\nassistant:"
    assert len(answer.sampler_trace) == 2
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert [text.split("`")[1] for text in answer.warnings] == ["temprature", "reasoning.summary", "reasoning.effort"]
    await client.responses.create(model="fake/story", input="x", preset="roleplay", max_output_tokens=1)
    assert server.engine.seen[-1][1] != params
    await client.close()


async def test_times_and_the_prompts_progress(server: RunningServer) -> None:
    events = await told(server, max_output_tokens=3, extra_body={"return_progress": True, "return_timings": True})
    prompt = len(server.engine.seen[-1][0])
    progress = [event.prompt_progress["processed"] for event in events if hasattr(event, "prompt_progress")]
    assert progress == [*range(8, prompt, 8), prompt]
    assert {event.type for event in events[1 : 2 + len(progress)]} == {"response.in_progress"}
    assert events[-1].response.timings["predicted_n"] == 3
    assert not hasattr(await ask(server, max_output_tokens=1), "timings")


async def test_long_conversations_lose_their_beginning_if_they_may(server: RunningServer) -> None:
    talk = [{"role": "developer", "content": "Rule."}]
    for number in range(30):
        talk += [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": "Yes." * 5}]
    talk.append({"role": "user", "content": "Last?"})
    with pytest.raises(openai.BadRequestError, match="512 tokens") as caught:
        await ask(server, talk)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    answer = await ask(server, talk, truncation="auto", max_output_tokens=100)
    prompt = bytes(server.engine.seen[-1][0]).decode()
    assert prompt.startswith("system: Rule.\nuser: Question ")
    assert prompt.endswith("user: Last?\nassistant:")
    assert 412 - 60 < len(prompt) <= 412
    assert "left out" in answer.warnings[0]
    with pytest.raises(openai.BadRequestError):
        await ask(server, "x" * 600, truncation="auto")


async def test_input_tokens_are_counted(server: RunningServer) -> None:
    counted = await server.client.responses.input_tokens.count(model="fake/story", input="Hi", instructions="Be brief.")
    assert counted.input_tokens == len("system: Be brief.\nuser: Hi\nassistant:")
    assert not server.engine.seen


async def test_a_stream_that_fails_says_so() -> None:
    async with running_server(FakeEngine(fail_after=3)) as server:
        events = await told(server)
        assert events[-1].type == "response.failed"
        assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "server_error")
        assert "secret" not in events[-1].response.error.message
        with pytest.raises(openai.InternalServerError):
            await ask(server)
