"""Tools through OpenAI's client: calls whole and streamed, demanded, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from running import RunningServer, running_server
from scripted import ScriptedEngine, marked_tokenizer

from aphrodite.chat.traits import Reasoning
from aphrodite.sampling.grammar_fields import JSON_DEFAULTS
from aphrodite.sampling.table import Grammar
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.server.openai.tools import alone, behind_reasoning, json_rules, read_tool_use

MESSAGES = [{"role": "user", "content": "How is the weather?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
TWO = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "東京"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CALLED = [("get_weather", {"city": "東京"}), ("now", {})]


async def ask(server: RunningServer, **fields: Any) -> ChatCompletion:
    given = {"model": "fake/story", "messages": MESSAGES, "tools": TOOLS} | fields
    answer = await server.client.chat.completions.create(**given)
    return ChatCompletion.model_validate(answer.model_dump(), strict=True)


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


@pytest.mark.parametrize("template", ["chatml", "qwen-3", "plain"])
async def test_calls_in_whole_answers(template: str) -> None:
    engine = ScriptedEngine(template, TWO)
    async with running_server(engine) as server:
        answer = await ask(server)
        alone = await ask(server, parallel_tool_calls=False)
        await ask(server, tool_choice="none")
        assert "get_weather" not in engine.prompt
    message = answer.choices[0].message
    assert (message.content, called(message)) == ("I look.", CALLED)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert len({call.id for call in message.tool_calls}) == 2
    assert called(alone.choices[0].message) == CALLED[:1]


@pytest.mark.parametrize("details", [{}, {"logprobs": True}, {"n": 2}])
async def test_calls_in_streams(details: dict[str, Any]) -> None:
    pieces = []
    async with (
        running_server(ScriptedEngine("chatml", TWO)) as server,
        server.client.chat.completions.stream(model="fake/story", messages=MESSAGES, tools=TOOLS, **details) as stream,
    ):
        async for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
        final = await stream.get_final_completion()
    for choice in final.choices:
        assert (choice.message.content, called(choice.message)) == ("I look.", CALLED)
        assert choice.finish_reason == "tool_calls"
    assert len(pieces) > 5  # as they are written


async def test_a_conversation_with_results() -> None:
    engine = ScriptedEngine("mistral-v3", '[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    async with running_server(engine) as server:
        message = (await ask(server)).choices[0].message
        (call,) = message.tool_calls
        assert len(call.id) == 9  # the template demands it
        engine.text = "It is noon."
        result = {"role": "tool", "tool_call_id": call.id, "content": "12"}
        talk = [*MESSAGES, message.model_dump(exclude_none=True), result]
        answer = await ask(server, messages=talk)
    assert answer.choices[0].message.content == "It is noon."
    assert answer.choices[0].finish_reason == "stop"
    assert call.id in engine.prompt
    engine = ScriptedEngine("plain", "It is noon.")
    async with running_server(engine) as server:
        await ask(server, messages=talk)
    assert "<tool_response>\n12\n</tool_response>" in engine.prompt
    assert '"name": "now", "arguments": {}' in engine.prompt
    assert "The weather of a city." in engine.prompt


async def test_functions_by_their_older_name() -> None:
    engine = ScriptedEngine("chatml", TWO)
    functions = [tool["function"] for tool in TOOLS]
    async with running_server(engine) as server:
        answer = await ask(server, tools=openai.omit, functions=functions, function_call="auto")
        message = answer.choices[0].message
        assert (message.function_call.name, message.tool_calls) == ("get_weather", None)
        assert answer.choices[0].finish_reason == "function_call"
        result = {"role": "function", "name": "get_weather", "content": "Rain"}
        talk = [*MESSAGES, message.model_dump(exclude_none=True), result]
        await ask(server, messages=talk, tools=openai.omit, functions=functions)
        assert "<tool_response>\nRain\n</tool_response>" in engine.prompt


async def test_calls_that_are_demanded_are_written_under_a_grammar() -> None:
    engine = ScriptedEngine("chatml", '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]')
    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    async with running_server(engine) as server:
        for choice in ("required", named, allowed):
            answer = await ask(server, tool_choice=choice)
            assert called(answer.choices[0].message) == [("get_weather", {"city": "Oslo"})]
            assert answer.choices[0].message.content is None
            assert answer.choices[0].finish_reason == "tool_calls"
            grammar = engine.seen[-1][1].grammar
            schema = json.loads(grammar.text)
            assert grammar.kind == "json_schema"
            names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
            assert names == (["get_weather", "now"] if choice == "required" else ["get_weather"])
            assert schema.get("maxItems") == (1 if choice is named else None)


async def test_demanded_calls_follow_reasoning_that_the_prompt_opened() -> None:
    engine = ScriptedEngine("deepseek-r1", 'Hm.</think>\n\n[{"name": "now", "arguments": {}}]')
    async with running_server(engine) as server:
        message = (await ask(server, tool_choice="required")).choices[0].message
        assert (message.reasoning, called(message)) == ("Hm.", [("now", {})])
        assert engine.seen[-1][1].grammar.kind == "lark"
        engine.text = "yes"
        message = (await ask(server, tools=openai.omit, extra_body={"guided_choice": ["yes"]})).choices[0].message
        assert message.content == "yes"
        assert engine.seen[-1][1].grammar == Grammar("choice", '["yes"]')


def test_demanded_calls_fit_their_grammar_and_nothing_else_does() -> None:
    llguidance = pytest.importorskip("llguidance")
    place = {"$ref": "#/$defs/Place"}
    defined = {"type": "object", "properties": {"to": place}, "required": ["to"], "$defs": {"Place": {"enum": ["a"]}}}
    go = {"type": "function", "function": {"name": "go", "parameters": defined}}
    far = {"type": "function", "function": {"name": "travel/go", "parameters": defined}}  # no part of a JSON pointer
    fields = ChatFields(messages=[], tools=[go, WEATHER, NOW, far], tool_choice="required")
    use = read_tool_use(fields)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(use.grammar().text, defaults=JSON_DEFAULTS)
    table = llguidance.LLTokenizer("byte")

    def fits(source: str, text: str) -> bool:
        matcher = llguidance.LLMatcher(table, source, log_level=0)
        return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())

    assert fits(grammar, '[{"name": "go", "arguments": {"to": "a"}}]')
    assert fits(grammar, '[{"name": "get_weather", "arguments": {"city": "b"}}, {"name": "now", "arguments": {}}]')
    assert fits(grammar, '[{"name": "travel/go", "arguments": {"to": "a"}}]')
    for wrong in (
        "[]",
        '{"name": "go", "arguments": {"to": "a"}}',
        '[{"name": "go", "arguments": {"to": "b"}}]',
        '[{"name": "no", "arguments": {}}]',
        '[{"name": "now", "arguments": {"a": 1}}]',
        '[{"name":  "go", "arguments": {"to": "a"}}]',
    ):
        assert not fits(grammar, wrong)
    reasoning = Reasoning("<t>", "</t>", opened=True, switch=None)
    rules = json_rules(use.grammar())
    source = llguidance.LLMatcher.grammar_from_lark(behind_reasoning(rules, reasoning, marked_tokenizer()).text)
    assert fits(source, 'I [think]\nso.</t>\n\n[{"name": "go", "arguments": {"to": "a"}}]')
    assert not fits(source, '[{"name": "go", "arguments": {"to": "a"}}]')
    free = read_tool_use(ChatFields(messages=[], tools=[go, WEATHER, NOW]))
    beside = free.rules_beside(json_rules(Grammar("json_schema", '{"type":"integer"}')), marked_tokenizer())
    called_now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for grammar, before in ((alone(beside), ""), (behind_reasoning(beside, reasoning, marked_tokenizer()), "Hm.</t>")):
        source = llguidance.LLMatcher.grammar_from_lark(grammar.text)
        for text in ("5", '[{"name": "go", "arguments": {"to": "a"}}]', called_now, f"{called_now}\n{called_now}"):
            assert fits(source, before + text)
        for text in ('"5"', '[{"name": "go", "arguments": {"to": "b"}}]', "<tool_call>", "[]"):
            assert not fits(source, before + text)


@pytest.mark.parametrize("template", ["chatml", "deepseek-r1", "gpt-oss", "mistral-v3"])
async def test_calls_or_an_answer_of_a_schema(template: str) -> None:
    engine = ScriptedEngine(template)
    before = "Hm.</think>" if template == "deepseek-r1" else ""
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    async with running_server(engine) as server:
        engine.text = before + '{"name": "Ann"}'
        answer = (await ask(server, response_format=wanted)).choices[0]
        assert (answer.message.content, answer.message.tool_calls) == ('{"name": "Ann"}', None)
        assert engine.seen[-1][1].grammar.kind == "lark"
        for text in (
            '[{"name": "now", "arguments": {}}]',
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        ):
            engine.text = before + text
            answer = (await ask(server, response_format=wanted)).choices[0]
            assert (called(answer.message), answer.finish_reason) == ([("now", {})], "tool_calls")
        engine.text = "yes"
        await ask(server, extra_body={"guided_choice": ["yes"]})
        assert engine.seen[-1][1].grammar.kind == "choice"
        engine.text = before + "{}"
        await ask(server, response_format={"type": "json_object"}, tool_choice="none")
        assert engine.seen[-1][1].grammar.kind == ("lark" if before else "json_object")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f", "description": 5}}]}, "tools[0].function.description"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [NOW] * 513}, "tools"),
        ({"tools": [NOW], "functions": [{"name": "f"}]}, "functions"),
        ({"functions": [{"name": 5}]}, "functions[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "required", "guided_regex": "a+"}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tools": [NOW], "function_call": {"name": "now"}}, "function_call"),
        ({"functions": [{"name": "f"}], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
async def test_what_is_refused(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    reply = await server.http.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert not server.engine.seen


async def test_a_parser_is_chosen_at_start() -> None:
    text = '{"name": "now", "parameters": {}}'
    async with running_server(ScriptedEngine("chatml", text)) as server:
        assert (await ask(server)).choices[0].message.content == text
    async with running_server(ScriptedEngine("chatml", text), tool_parser="llama3") as server:
        assert called((await ask(server)).choices[0].message) == [("now", {})]
    async with running_server(ScriptedEngine("chatml", TWO), tool_parser="none") as server:
        assert (await ask(server)).choices[0].message.content == TWO
