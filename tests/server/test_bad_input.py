"""Bad input: every field with every kind of wrong value is refused by name, and a neighbour notices nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fake_engine import STORY, FakeEngine
from running import RunningServer, running_server

from aphrodite.sampling.fields import parameter_table
from aphrodite.sampling.table import ParamRow
from aphrodite.server.openai.protocol import ChatFields, CompletionFields

COMPLETION = {"prompt": "a", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
HUGE = "9" * 400
# JSON texts, because some of them are not JSON.
VALUES = {
    "text": '"x"', "object": '{"a": 1}', "list": '[["x"]]', "-1": "-1", "0": "0", "2^31": str(2**31),
    "2^63": str(2**63), "-2^63-1": str(-(2**63) - 1), "huge": HUGE, "fraction": "0.5", "1e400": "1e400",
    "NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "null": "null", "empty text": '""',
    "empty list": "[]", "empty object": "{}", "true": "true",
    "long text": json.dumps("x" * 5000), "long list": json.dumps(list(range(258)) * 8),
    "out of vocabulary": "[258]", "bias out of vocabulary": '{"258": 1}', "negative ids": "[-1]",
    "bias of NaN": '{"1": NaN}', "bias beyond": '{"1": 1000}', "2^63 ids": f"[{2**63}]",
}  # fmt: skip
NOT_JSON = {"1e400", "NaN", "Infinity", "-Infinity", "bias of NaN"}


def accepted(row: ParamRow, value: Any) -> bool:
    """Whether the table's row allows a value, told from its bounds alone. None means: not given."""
    if value is None:
        return True
    param = row.param
    if row.kind in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, int | float) or (row.kind == "int" and value != int(value)):
            return False
        if param.off is not None and value == param.off:
            return True
        low = param.ge is None or value >= param.ge
        return low and (param.gt is None or value > param.gt) and (param.le is None or value <= param.le)
    if row.kind == "bool":
        return isinstance(value, bool)
    if row.kind == "choice":
        return value in row.choices
    if row.kind == "text":
        return isinstance(value, str) and len(value) <= (param.max_length or 1e9)
    if row.kind == "strings":
        items = [value] if isinstance(value, str) else value
        return isinstance(items, list) and all(
            isinstance(i, str) and 0 < len(i) <= (param.max_length or 1e9) for i in items
        )
    if row.kind in ("ints", "tokens", "order", "ranges", "sequences"):
        if row.kind in ("ints", "tokens", "order") and param.in_text and value == "":
            value = []
        fits = isinstance(value, list) and param.min_items <= len(value) <= (param.max_items or 1e9)
        return fits and all(row.kind in ("ints", "tokens") and isinstance(i, int) and 0 <= i < 258 for i in value)
    if row.kind == "bias" and value == []:  # no pair of llama.cpp's list of pairs
        return True
    return isinstance(value, dict) and all(k.isdigit() and int(k) < 258 and abs(v) <= 100 for k, v in value.items())


def says_a_grammar(name: str, value: Any) -> bool:
    """Whether a value has the form of what a field says of an answer; the engine says whether it is one."""
    if value is None or value in ("", [], {}):
        return True
    if name in ("json_schema", "guided_json"):
        return isinstance(value, dict) or value is True
    if name == "guided_json_object":
        return value is True
    return isinstance(value, str) and name not in ("response_format", "structured_outputs", "guided_choice")


def within_this_model(name: str, value: Any) -> bool:
    """Bounds that come from the model or from other fields."""
    if value is None or isinstance(value, str | list | dict):
        return True
    limits = {"max_tokens": 498, "min_tokens": 2, "logprobs": 20, "prompt_logprobs": 20, "dynatemp_min": 0}
    return value <= limits.get(name, 2**70)


@pytest.fixture
async def neighbour():
    """A server with a stream that has begun; `finish` lets it go on to its end."""
    async with running_server(FakeEngine(hold_after=None)) as server:
        yield server


async def begin_neighbour(server: RunningServer) -> asyncio.Future[str]:
    server.engine.hold_after = 5
    body = {"prompt": "neighbour", "max_tokens": 90, "stream": True}

    async def read() -> str:
        text = ""
        async with server.http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    task = asyncio.ensure_future(read())
    await server.engine.holding.wait()
    server.engine.hold_after = None  # for everyone who comes later; the neighbour waits at the gate
    return task


async def send(http: httpx.AsyncClient, path: str, base: dict[str, Any], name: str, text: str) -> httpx.Response:
    fields = {key: value for key, value in base.items() if key != name}
    body = json.dumps(fields)[:-1] + f", {json.dumps(name)}: {text}}}"
    return await http.post(path, content=body, headers={"content-type": "application/json"})


def check_error(response: httpx.Response, name: str, label: str) -> None:
    where = (name, label, response.text[:300])
    assert response.status_code == 400, where
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, where
    assert error["type"] == "invalid_request_error", where
    if label not in NOT_JSON:
        assert error["param"] is not None, where
        assert error["param"].partition("[")[0].partition(".")[0] == name, where
    assert len(error["message"]) < 1000, where
    assert "Traceback" not in error["message"], where


@pytest.mark.parametrize(("path", "base"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
async def test_sampling_parameters(neighbour: RunningServer, path: str, base: dict[str, Any]) -> None:
    stream = await begin_neighbour(neighbour)
    chat = path == "/v1/chat/completions"
    for row in parameter_table():
        if chat and row.name == "logprobs":
            continue
        for name in (row.name, *row.param.aliases):
            for label, text in VALUES.items():
                start = {key: value for key, value in base.items() if row.name != "max_tokens" or key != "max_tokens"}
                response = await send(neighbour.http, path, start, name, text)
                value = None if label in NOT_JSON else json.loads(text)
                fits = says_a_grammar(name, value) if row.kind == "grammar" else accepted(row, value)
                good = label not in NOT_JSON and fits and within_this_model(row.name, value)
                if good:
                    assert response.status_code == 200, (name, label, response.text[:300])
                else:
                    check_error(response, name, label)
    neighbour.engine.gate.set()
    assert await stream == STORY.encode()[:90].decode()


# Values each field of the endpoint itself accepts, besides null; everything else in VALUES is refused.
ACCEPTED: dict[str, set[str]] = {
    "model": {"empty text"},
    "stream": {"true"},
    "stream_options": {"object", "empty object"},
    "best_of": {"0"},
    "truncate_prompt_tokens": {"-1"},
    "priority": {"-1", "0"},
    "cache_salt": {"text"},
    "preset": set(),
    "return_token_ids": {"true"},
    "return_tokens_as_token_ids": {"true"},
    "return_timings": {"true"},
    "timings_per_token": {"true"},
    "return_progress": {"true"},
    "resumable": set(),  # these answers come whole
    "prompt": {"text", "empty text"},
    "echo": {"true"},
    "add_special_tokens": {"true"},
    "messages": set(),
    "logprobs": {"true"},
    "top_logprobs": {"0"},
    "add_generation_prompt": {"true"},
    "continue_final_message": set(),
    "chat_template": set(),
    "chat_template_kwargs": {"object", "empty object"},
    "documents": {"empty list"},
    "tools": {"empty list"},
    "tool_choice": set(),
    "parallel_tool_calls": {"true"},
    "functions": {"empty list"},
    "function_call": set(),
    "include_reasoning": {"true"},
    "reasoning_effort": set(),
}
OBJECTS = {"object", "empty object", "bias out of vocabulary", "bias beyond"}


@pytest.mark.parametrize(
    ("path", "base", "model"),
    [("/v1/completions", COMPLETION, CompletionFields), ("/v1/chat/completions", CHAT, ChatFields)],
)
async def test_fields_of_the_endpoints(neighbour: RunningServer, path: str, base: Any, model: Any) -> None:
    stream = await begin_neighbour(neighbour)
    for name in model.model_fields:
        for label, text in VALUES.items():
            response = await send(neighbour.http, path, base, name, text)
            good = label in ACCEPTED[name] or (name == "stream_options" and label in OBJECTS)
            if name == "messages":
                good = False
            elif name == "truncate_prompt_tokens":
                good = good or label == "null"
            elif label == "null":
                good = True
            if good:
                assert response.status_code == 200, (name, label, response.text[:300])
            elif name == "model" and response.status_code == 404:
                assert response.json()["error"]["code"] == "model_not_found"
            elif name == "truncate_prompt_tokens" and label == "2^31":
                check_error(response, name, label)
            else:
                check_error(response, name, label)
    neighbour.engine.gate.set()
    assert await stream == STORY.encode()[:90].decode()


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [[97], []], [["a"]], [97, "a"], ["a", 97], [97, True], [97.5], {"a": 1}, 5, True, [[97], "a"],
     [-1], [258], [2**63], [[258]], ["a"] * 1025, [None]],
)  # fmt: skip
async def test_prompts(server: RunningServer, prompt: Any) -> None:
    check_error(await server.http.post("/v1/completions", json={"prompt": prompt}), "prompt", str(prompt)[:40])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text"}]}],
            "messages[1].content[0].text",
        ),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": 5}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "a", "name": 5}], "messages[0].name"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a"}] * 4097, "messages"),
    ],
)
async def test_messages(server: RunningServer, messages: Any, param: str) -> None:
    response = await server.http.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
async def test_contradictions(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = await server.http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}', b"{'prompt': 'a'}", b'{"prompt": "a",}', b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", b'{"x": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b'{"prompt": "a"} {"prompt": "b"}', b'{"prompt": 1e999}',
    ],
)  # fmt: skip
async def test_bodies_that_are_no_json_object(server: RunningServer, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = await server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_json", None)


async def test_odd_texts_are_only_texts(server: RunningServer) -> None:
    for text in ("\x00", "\n" * 200, "</s><s>", "🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 10, "\u202e", "{{ 7 * 7 }}"):
        response = await server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 1, "echo": True})
        assert response.status_code == 200
        assert response.json()["choices"][0]["text"] == text + "O"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_hundred_thousand_items_are_refused_by_name(neighbour: RunningServer, path: str) -> None:
    """Stops, bans, breakers, token ids and biases; lists that may be long by their bounds are beyond them, too."""
    stream = await begin_neighbour(neighbour)
    base = COMPLETION if path == "/v1/completions" else CHAT
    tried = 0
    for row in parameter_table():
        if row.kind not in ("strings", "sequences", "ranges") and row.name not in ("stop_token_ids", "logit_bias"):
            continue
        items: Any = [f"stop {number}" for number in range(100_000)]
        if row.name == "logit_bias":
            items = dict.fromkeys(map(str, range(100_000)), 1.0)
        elif row.kind != "strings":
            items = [[1, 2]] * 100_000 if row.kind == "sequences" else [[[1], 0, 1]] * 100_000
        if row.name == "stop_token_ids":
            items = [1] * 100_000
        response = await send(neighbour.http, path, base, row.name, json.dumps(items))
        check_error(response, row.name, "100,000 items")
        tried += 1
    assert tried >= 7
    neighbour.engine.gate.set()
    assert await stream == STORY.encode()[:90].decode()


@pytest.mark.parametrize("field", ["banned_regex", "stop_regex"])
async def test_a_regex_that_would_slow_everybody_is_refused_by_name(neighbour: RunningServer, field: str) -> None:
    stream = await begin_neighbour(neighbour)
    response = await send(neighbour.http, "/v1/completions", COMPLETION, field, json.dumps(["(a|b)*a(a|b){500}c"]))
    check_error(response, field, "hostile")
    assert "too much work" in response.json()["error"]["message"]
    neighbour.engine.gate.set()
    assert await stream == STORY.encode()[:90].decode()


async def test_a_huge_text_is_refused_while_others_are_served() -> None:
    async with running_server(FakeEngine(hold_after=5)) as server:
        stream = await begin_neighbour(server)
        response = await server.http.post("/v1/completions", json={"prompt": "x" * 20_000_000})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        server.engine.gate.set()
        assert await stream == STORY.encode()[:90].decode()
