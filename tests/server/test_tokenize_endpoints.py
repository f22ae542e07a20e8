"""/tokenize, /detokenize and /tokenizer_info, also under /v1."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import BOS, EOS
from running import RunningServer, running_server


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_there_and_back(server: RunningServer, prefix: str) -> None:
    text = "héllo 🏰"
    answer = (await server.http.post(f"{prefix}/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == [BOS, *text.encode()]
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][:3] == ["<s>", "h", "\ufffd"]
    back = await server.http.post(f"{prefix}/detokenize", json={"tokens": answer["tokens"][1:], "model": "story-alias"})
    assert back.json() == {"prompt": text, "content": text}
    plain = (await server.http.post(f"{prefix}/tokenize", json={"prompt": "a", "add_special_tokens": False})).json()
    assert plain == {"count": 1, "max_model_len": 512, "tokens": [97]}
    info = (await server.http.get(f"{prefix}/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["eos_token_ids"]) == ("<s>", "</s>", [EOS])
    assert info["chat_template"] == server.engine.chat_template.source


async def test_conversations_tokenize_as_generation_sees_them(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "a"}]
    answer = (await server.http.post("/tokenize", json={"messages": messages})).json()
    await server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert answer["tokens"] == server.engine.seen[-1][0] == [*b"user: a\nassistant:"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"messages": 5}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1, 258]}, "tokens"),
        ("/detokenize", {"tokens": [2**80]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
    ],
)
async def test_wrong_input(server: RunningServer, path: str, body: dict[str, Any], param: str) -> None:
    response = await server.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


async def test_longer_than_the_context_still_tokenizes(server: RunningServer) -> None:
    answer = (await server.http.post("/tokenize", json={"prompt": "x" * 100_000})).json()
    assert answer["count"] == 100_001


async def test_request_templates_need_trust() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template": "[{{ messages[0].content }}]"}
    async with running_server() as server:
        assert (await server.http.post("/tokenize", json=body)).status_code == 400
    async with running_server(trust_request_chat_template=True) as server:
        assert (await server.http.post("/tokenize", json=body)).json()["tokens"] == [*b"[a]"]
        for bad in (
            "{% for i in range(10**9) %}x{% endfor %}",
            "{{ 'a' * 10**10 }}",
            "{{ ''.__class__.__mro__ }}",
            "{%",
        ):
            refused = await server.http.post("/tokenize", json={**body, "chat_template": bad})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] in ("messages", "chat_template")
