"""Structured output over HTTP: OpenAI's client before the real engine with the real model."""

from __future__ import annotations

import asyncio
import enum
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio
from running import RunningServer, running_server

from aphrodite.config import EngineConfig
from aphrodite.engine import grammar_check
from aphrodite.engine.async_engine import AsyncEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "SmolLM2-135M-Instruct"
MESSAGES: list[Any] = [{"role": "user", "content": "Invent a character of a fairy tale."}]
SETTINGS: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 120, "seed": 4}


class Mood(enum.Enum):
    CALM = "calm"
    GRIM = "grim"


class Item(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    weight: int = pydantic.Field(ge=0, le=90)


class Character(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    mood: Mood
    age: int = pydantic.Field(ge=1, le=300)
    items: list[Item] = pydantic.Field(max_length=2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(smollm2_path: Path) -> AsyncIterator[RunningServer]:
    config = EngineConfig(
        model=str(smollm2_path), threads=1, max_model_len=512, kv_cache_memory=64 << 20, max_num_seqs=8
    )
    engine = await AsyncEngine.start(config)
    try:
        async with running_server(engine) as running:  # type: ignore[arg-type]
            yield running
    finally:
        await engine.close()


async def test_the_clients_own_parsing_gets_the_model(server: RunningServer) -> None:
    answer = await server.client.chat.completions.parse(**SETTINGS, n=2, response_format=Character)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Character)
        assert choice.message.parsed == Character.model_validate_json(choice.message.content or "")


async def test_streams_bring_the_same(server: RunningServer) -> None:
    async with server.client.chat.completions.stream(**SETTINGS, response_format=Character) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    whole = await server.client.chat.completions.parse(**SETTINGS, response_format=Character)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"[A-Z][a-z]{2,9}, \d{1,3} years"}, r"[A-Z][a-z]{2,9}, \d{1,3} years"),
        ({"regex_pattern": "(?i)yes|no"}, "(?i)yes|no"),
        ({"guided_choice": ["a fox", "a wolf"]}, "a fox|a wolf"),
        ({"structured_outputs": {"choice": ["one", "two"]}}, "one|two"),
        ({"grammar": 'root ::= "The " [a-z]{3,8} "."'}, r"The [a-z]{3,8}\."),
        ({"grammar_string": 'start: "A " /[a-z]{3,8}/'}, "A [a-z]{3,8}"),
        ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 7}}, "[567]"),
        ({"json_schema": {"enum": ["x y"]}}, '"x y"'),
    ],
)
async def test_other_servers_fields_on_both_endpoints(
    server: RunningServer, fields: dict[str, Any], pattern: str
) -> None:
    for path, body in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "Once"})):
        response = await server.http.post(path, json={**body, **fields, "max_tokens": 60, "seed": 1})
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert re.fullmatch(pattern, text), text
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "grammar_complete")
        assert "x-ignored-fields" not in response.headers


async def test_any_object(server: RunningServer) -> None:
    settings = {**SETTINGS, "max_tokens": 120, "temperature": 0.3}
    answer = await server.client.chat.completions.create(**settings, response_format={"type": "json_object"})
    assert answer.choices[0].finish_reason in ("stop", "length")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "(a"}, "regular expression"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_json": {"type": "object", "not": {}}}, "JSON schema"),
        ({"guided_json": {"$ref": "http://127.0.0.1:9/x"}}, "JSON schema"),
        ({"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no text fits it"),
        ({"grammar": 'root ::= "a" missing'}, "missing"),
        ({"grammar": "start: ("}, "Lark"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "Send one of them"),
    ],
)
async def test_what_cannot_be_used_is_refused(
    server: RunningServer, fields: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        await server.client.chat.completions.create(**SETTINGS, stream=stream, extra_body=fields)  # type: ignore[call-overload]


async def test_hostile_grammars_cost_a_neighbour_nothing(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of work and thousands of states, while somebody else's stream goes on to the same end."""
    monkeypatch.setattr(server.engine._grammars, "_seconds", 1.0)  # type: ignore[attr-defined]
    greedy = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0.0}
    expected = (await server.client.completions.create(**greedy)).choices[0].text
    hostile: list[dict[str, Any]] = [
        {"guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(12_000)}}},
        {"guided_regex": "(.*a){60}", "max_tokens": 20},
        {"grammar": 'start: start start | start start start | "a" | ', "max_tokens": 20},
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1} | " for i in range(30)) + '\nr30: "a" | '},
    ]

    async def attack(fields: dict[str, Any]) -> int:
        response = await server.http.post("/v1/completions", json={"prompt": "x", **fields})
        return response.status_code

    neighbour = asyncio.ensure_future(server.client.completions.create(**greedy))
    codes = await asyncio.gather(*map(attack, hostile))
    assert (await neighbour).choices[0].text == expected
    assert codes[0] == 400
    assert set(codes) <= {200, 400, 500}
    await server.engine.check_health()


async def test_too_many_at_once_are_told_to_come_back(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_WAITING", 0)
    response = await server.http.post("/v1/completions", json={"prompt": "x", "guided_regex": "q{3}"})
    assert response.status_code in (429, 503)
    assert "retry-after" in response.headers


async def test_other_protocols(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    options = {"num_predict": 60, "seed": 3}
    chat = {"model": MODEL, "messages": MESSAGES, "format": schema, "stream": False, "options": options}
    answer = (await server.http.post("/api/chat", json=chat)).json()
    assert json.loads(answer["message"]["content"]) == {"n": 7}
    generate = {"model": MODEL, "prompt": "Say it.", "format": "json", "stream": False, "options": options}
    answer = (await server.http.post("/api/generate", json=generate)).json()
    assert answer["response"].lstrip().startswith("{")
    assert (await server.http.post("/api/chat", json={**chat, "format": "xml"})).status_code == 400
    kobold = {"prompt": "Once", "max_length": 40, "grammar": 'root ::= "yes" | "no"', "sampler_seed": 5}
    answer = (await server.http.post("/api/v1/generate", json=kobold)).json()
    assert answer["results"][0]["text"] in ("yes", "no")
    llama_cpp = {"prompt": "x", "n_predict": 100, "grammar": kobold["grammar"]}
    answer = (await server.http.post("/completion", json=llama_cpp)).json()
    assert (answer["stop_type"], answer["stopping_word"]) == ("eos", "")  # it is complete, no stop text was met
    refused = await server.http.post("/api/v1/generate", json={**kobold, "grammar": "root ::= ("})
    assert refused.status_code in (400, 422)


async def test_koboldcpp_hears_that_a_complete_grammar_is_no_stop_sequence(server: RunningServer) -> None:
    for extra, reason in (({}, 1), ({"stop_sequence": ["e"]}, 2), ({"max_length": 1}, 0)):
        body = {"prompt": "Say yes:", "grammar": 'root ::= "yes, yes, yes"', **extra}
        await server.http.post("/api/v1/generate", json=body)
        assert (await server.http.get("/api/extra/perf")).json()["stop_reason"] == reason
