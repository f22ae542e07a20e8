"""What `/v1/responses` refuses: by the field's name, with the right status, in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from running import RunningServer, running_server
from test_bad_input import OBJECTS, VALUES, check_error, send

from aphrodite.sampling.fields import parameter_table
from aphrodite.server.openai.protocol import GenerationFields
from aphrodite.server.openai.responses.fields import ResponsesFields

BASE = {"input": "a", "max_output_tokens": 2}
USER = {"role": "user", "content": "a"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
NOW = {"type": "function", "name": "now"}

# Values that a field accepts besides null.
ACCEPTED: dict[str, set[str]] = {
    "input": {"text", "empty text", "long text"},
    "instructions": {"text", "empty text", "long text"},
    "previous_response_id": set(),
    "store": {"true"},
    "tools": {"empty list"},
    "tool_choice": set(),
    "max_tool_calls": {"2^31"},
    "text": OBJECTS,
    "reasoning": OBJECTS,
    "include": {"empty list"},
    "top_logprobs": {"0"},
    "truncation": set(),
    "metadata": {"empty object"},
    "user": {"text", "empty text"},
    "safety_identifier": {"text", "empty text"},
    "prompt_cache_key": {"text", "empty text"},
    "service_tier": set(),
    "background": {"true"},
    "return_timings": {"true"},
    "return_progress": {"true"},
    "resumable": set(),
    "conversation": {"0", "empty text", "empty list", "empty object"},
    "prompt": {"0", "empty text", "empty list", "empty object"},
    "context_management": {"empty list"},
    "add_generation_prompt": {"true"},
    "continue_final_message": set(),
    "add_special_tokens": {"true"},
    "chat_template": set(),
    "chat_template_kwargs": {"object", "empty object"},
    "documents": {"empty list"},
    "parallel_tool_calls": {"true"},
    "include_reasoning": {"true"},
}


async def test_values_of_wrong_kinds(server: RunningServer) -> None:
    """Those that every generation endpoint has are tried in test_bad_input."""
    for name in ResponsesFields.model_fields.keys() - GenerationFields.model_fields.keys():
        for label, text in VALUES.items():
            response = await send(server.http, "/v1/responses", BASE, name, text)
            if label in ACCEPTED[name] or (label == "null" and name != "input"):
                expected = 400 if label == "long text" else 200  # it is beyond the context
                assert response.status_code == expected, (name, label, response.text[:300])
            else:
                check_error(response, name, label)


async def test_every_sampling_parameter_is_checked_by_name(server: RunningServer) -> None:
    for row in parameter_table():
        for name in (row.name, *row.param.aliases):
            wrong = '"x"' if row.kind in ("bias", "loop", "grammar") else '{"a": 1}'
            if row.kind == "grammar":
                wrong = "5"
            check_error(await send(server.http, "/v1/responses", {"input": "a"}, name, wrong), name, wrong)
    check_error(await send(server.http, "/v1/responses", BASE, "n", "2"), "n", "2")


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        ([USER] * 4097, "input"),
        (["a"], "input[0]"),
        ([{}], "input[0].type"),
        ([{"type": 5}], "input[0].type"),
        ([{"type": "web_search_call", "id": "x"}], "input[0].type"),
        ([{"type": "message"}], "input[0].role"),
        ([{"role": "robot", "content": "a"}], "input[0].role"),
        ([{"role": ["user"], "content": "a"}], "input[0].role"),
        ([USER, {"role": "user"}], "input[1].content"),
        ([{"role": "user", "content": 5}], "input[0].content"),
        ([{"role": "user", "content": [5]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"text": "a"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 5}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "input[0].content[0]"),
        ([{"role": "assistant", "content": [{"type": "refusal"}]}], "input[0].content[0].refusal"),
        ([{**USER, "id": 5}], "input[0].id"),
        ([{**USER, "id": ""}], "input[0].id"),
        ([{**CALL, "call_id": None}], "input[0].call_id"),
        ([{**CALL, "name": 5}], "input[0].name"),
        ([{**CALL, "arguments": {}}], "input[0].arguments"),
        ([CALL, {"type": "function_call_output", "call_id": "c"}], "input[1].output"),
        ([CALL, {"type": "function_call_output", "call_id": "d", "output": ""}], "input[1].call_id"),
        ([CALL, {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}],
         "input[1].output[0]"),
        ([{"type": "reasoning", "summary": "x"}], "input[0].summary"),
        ([{"type": "reasoning", "content": [{"type": "summary_text", "text": "x"}]}], "input[0].content[0].type"),
        ([{"type": "reasoning", "content": [{"type": "reasoning_text"}]}], "input[0].content[0].text"),
        ([{"type": "item_reference", "id": 5}], "input[0].id"),
    ],
)  # fmt: skip
async def test_items(server: RunningServer, items: Any, param: str) -> None:
    response = await server.http.post("/v1/responses", json={"input": items})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not server.engine.seen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "now"}}]}, "tools[0].name"),
        ({"tools": [{**NOW, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{**NOW, "description": 5}]}, "tools[0].description"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [NOW] * 513}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "name": "then"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools", "tools": [{"type": "mcp"}]}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "text.format"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"background": True, "store": False}, "background"),
        ({"resumable": True}, "resumable"),
        ({"resumable": True, "stream": True, "background": True}, "resumable"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
async def test_fields(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = await server.http.post("/v1/responses", json={"input": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not server.engine.seen


async def test_names_that_are_not_there(server: RunningServer) -> None:
    http = server.http
    for method, path in (
        ("GET", "/v1/responses/resp_0"), ("DELETE", "/v1/responses/resp_0"), ("POST", "/v1/responses/resp_0/cancel"),
        ("GET", "/v1/responses/resp_0/input_items"),
    ):  # fmt: skip
        response = await http.request(method, path, json={} if method == "POST" else None)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")
    response = await http.post("/v1/responses", json={"input": [{"type": "item_reference", "id": "msg_0"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "input[0].id")
    response = await http.post("/v1/responses", json={"input": "a", "model": "other"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = await http.post("/v1/responses", json={"input": "a", "previous_response_id": "resp_0"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "previous_response_not_found")
    for stream in (False, True):
        response = await http.post("/v1/responses", json={"input": "a" * 600, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
        assert "512" in error["message"]
    for path in ("/v1/responses", "/v1/responses/resp_0"):
        assert (await http.put(path, json={})).status_code == 405


async def test_lists_of_input_items(server: RunningServer) -> None:
    answer = (await server.http.post("/v1/responses", json=BASE)).json()
    path = f"/v1/responses/{answer['id']}"
    for query, param in (
        ("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("limit=1e1", "limit"),
        ("limit=" + "9" * 5000, "limit"), ("limit=٣", "limit"), ("order=up", "order"), ("after=msg_0", "after"),
    ):  # fmt: skip
        response = await server.http.get(f"{path}/input_items?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), query
    for query, param in (("stream=true", "stream"), ("stream=true&starting_after=x", "starting_after")):
        response = await server.http.get(f"{path}?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_what_the_engine_refuses_keeps_its_status() -> None:
    async with running_server(FakeEngine(max_running=0)) as server:
        for stream in (False, True):
            response = await server.http.post("/v1/responses", json={**BASE, "stream": stream})
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "server_overloaded"
    async with running_server(api_keys=("a",)) as server:
        response = await server.http.post("/v1/responses", json=BASE)
        assert response.status_code == 401
        assert json.loads(response.content)["error"]["code"] == "invalid_api_key"
