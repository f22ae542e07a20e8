"""What the endpoints make of `guidance_scale` and `negative_prompt`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import BOS, TEMPLATE

from aphrodite.chat.template import ChatTemplate

if TYPE_CHECKING:
    from running import RunningServer

COMPLETION: dict[str, Any] = {"prompt": "x", "max_tokens": 2, "guidance_scale": 1.5}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
    {"role": "user", "content": "Hello"},
    {"role": "system", "content": "Later."},
]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2, "cfg_scale": 1.5}


async def negative(server: RunningServer, path: str, body: dict[str, Any]) -> list[int]:
    """The negative prompt that the engine was given."""
    response = await server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert "warnings" not in response.text
    _, params, *_ = server.engine.seen[-1]
    assert params.guidance_scale == 1.5
    assert params.negative_prompt == ""
    return list(params.negative_prompt_ids)


async def test_of_a_completion_it_is_a_prompt(server: RunningServer) -> None:
    for stream in (False, True):
        body = {**COMPLETION, "negative_prompt": "no", "stream": stream}
        assert await negative(server, "/v1/completions", body) == [BOS, *b"no"]
    body = {**COMPLETION, "negative_prompt": "no", "add_special_tokens": False}
    assert await negative(server, "/v1/completions", body) == [*b"no"]
    body = {**COMPLETION, "negative_prompt": "nobody", "truncate_prompt_tokens": 4}
    assert await negative(server, "/v1/completions", body) == [*b"body"]
    assert await negative(server, "/v1/completions", {**COMPLETION, "negative_prompt": ""}) == []
    body = {**COMPLETION, "negative_prompt": "no", "negative_prompt_ids": [7, 7]}
    response = await server.http.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert server.engine.seen[-1][1].negative_prompt_ids == (7, 7)


async def test_of_a_chat_it_is_the_system_message(server: RunningServer) -> None:
    rendered = ChatTemplate(TEMPLATE).render([{"role": "system", "content": "Be rude."}, *MESSAGES[2:]])
    for stream in (False, True):
        body = {**CHAT, "negative_prompt": "Be rude.", "stream": stream}
        assert await negative(server, "/v1/chat/completions", body) == [*rendered.encode()]
    without = {**CHAT, "messages": MESSAGES[2:], "negative_prompt": "Be rude."}
    assert await negative(server, "/v1/chat/completions", without) == [*rendered.encode()]
    body = {**CHAT, "negative_prompt": "Be rude.", "truncate_prompt_tokens": 10}
    assert await negative(server, "/v1/chat/completions", body) == [*rendered.encode()[-10:]]
    opened = {**CHAT, "messages": [MESSAGES[0], {"role": "assistant", "content": "Once"}]}
    opened |= {"negative_prompt": "Be rude.", "continue_final_message": True}
    assert bytes(await negative(server, "/v1/chat/completions", opened)).decode() == "system: Be rude.\nassistant: Once"


@pytest.mark.parametrize(("path", "base"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
async def test_what_does_not_fit_or_is_no_text_is_refused_by_name(
    server: RunningServer, path: str, base: dict[str, Any]
) -> None:
    for value in (3, ["a"], "x" * 600):
        body = json.dumps({**base, "negative_prompt": value})
        response = await server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, value
        assert response.json()["error"]["param"] == "negative_prompt"
    assert not server.engine.seen


async def test_a_template_that_refuses_the_negative_prompt_names_the_field(server: RunningServer) -> None:
    refusing = "{% if 'rude' in messages[0].content %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
    server.engine.chat_template = ChatTemplate(refusing)
    body = {**CHAT, "messages": MESSAGES[2:3], "negative_prompt": "Be rude."}
    response = await server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "negative_prompt"
    assert "no system message" in error["message"]


@pytest.mark.parametrize(("path", "base"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
async def test_without_a_scale_the_negative_prompt_is_not_even_read(
    server: RunningServer, path: str, base: dict[str, Any]
) -> None:
    fields = {key: value for key, value in base.items() if not key.endswith("_scale")}
    response = await server.http.post(path, json={**fields, "negative_prompt": "x" * 600})
    assert response.status_code == 200
