"""What SillyTavern 1.19.0's own server sent, connection type by connection type, answered as it reads it.

`data/sillytavern_1.19.0.json` is what arrived here from its types aphrodite, vllm, tabby, koboldcpp, llamacpp, ollama,
generic, from its custom chat and its classic KoboldAI: status, model list, tokens, whole and streamed answers with
every sampler that its settings have. `data/sillytavern_1.19.0_page.json` is what its page makes of the settings that it
starts with, and of all samplers, for each type. tests/clients/README.md says how they were recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, FakeModel
from running import RunningServer, running_server

DATA = Path(__file__).parent / "data"
RECORD: list[dict[str, Any]] = json.loads((DATA / "sillytavern_1.19.0.json").read_text())
PAGE: list[dict[str, Any]] = json.loads((DATA / "sillytavern_1.19.0_page.json").read_text())
GENERATES = ("completion", "completions", "generate", "stream")


def connection(request: dict[str, Any]) -> str:
    body = request["body"] or {}
    return f"{body.get('api_type', '')} {request['path']} {'streamed' if body.get('stream') else ''}".strip()


async def send(server: RunningServer, request: dict[str, Any]) -> httpx.Response:
    headers = {} if request["content_type"] is None else {"content-type": request["content_type"]}
    content = b"" if request["body"] is None else json.dumps(request["body"]).encode()
    return await server.http.request(request["method"], request["path"], content=content, headers=headers)


def server_of_the_model() -> FakeEngine:
    engine = FakeEngine()
    engine.model = FakeModel(name="SmolLM2-135M-Instruct", aliases=(), max_model_len=4096)
    return engine


@pytest.mark.parametrize("request_", RECORD, ids=connection)
async def test_every_request_is_answered(request_: dict[str, Any]) -> None:
    engine = server_of_the_model()
    async with running_server(engine) as server:
        response = await send(server, request_)
    assert response.status_code == 200, response.text[:500]
    assert "warnings" not in response.text
    if request_["path"].rpartition("/")[2] not in GENERATES:
        return
    params = engine.seen[-1][1]
    asked = request_["body"].get("options", request_["body"])
    assert params.temperature == pytest.approx(asked["temperature"])
    assert params.top_p == asked["top_p"]
    if "custom_include_body" in asked:  # as its server has merged it in
        assert (params.min_p, params.banned_strings) == (0.05, ("tapestry",))


def texts(answer: dict[str, Any]) -> list[str]:
    """What SillyTavern takes for the texts of an answer."""
    choices = answer.get("choices") or answer.get("results")
    if choices is None:
        return [answer.get("content") or answer["response"]]
    return [choice.get("text") or choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize(
    "request_",
    [request for request in RECORD if "n" in (request["body"] or {}) and not request["body"].get("stream")],
    ids=connection,
)
async def test_swipes_come_each_by_its_own(request_: dict[str, Any]) -> None:
    async with running_server(server_of_the_model()) as server:
        answer = (await send(server, request_)).json()
    assert len(texts(answer)) == request_["body"]["n"]
    assert all(texts(answer))


def of_type(kind: str, *, stream: bool) -> dict[str, Any]:
    found = [
        request
        for request in RECORD
        if (request["body"] or {}).get("api_type") == kind and request["body"]["stream"] is stream
    ]
    return found[0]


async def test_every_sampler_of_its_aphrodite_settings_arrives() -> None:
    engine = server_of_the_model()
    async with running_server(engine) as server:
        await send(server, of_type("aphrodite", stream=False))
    params = engine.seen[-1][1]
    assert (params.n, params.seed, params.min_tokens, params.stop) == (3, 7, 2, ("\nUser:",))
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.top_a) == (0.7, 0.95, 40, 0.05, 0.1)
    assert (params.tfs, params.smoothing_factor, params.repetition_penalty) == (0.99, 0.1, 1.1)
    assert (params.frequency_penalty, params.presence_penalty) == (-0.1, 0.1)
    assert (params.dynatemp_min, params.dynatemp_max, params.temperature_last) == (0.5, 1.2, True)
    assert (params.dry_multiplier, params.dry_base, params.dry_allowed_length) == (0.8, 1.75, 2)
    assert params.dry_sequence_breakers == ("\n", ":", '"', "*")
    assert (params.xtc_probability, params.xtc_threshold) == (0.5, 0.1)
    assert (params.custom_token_bans, params.banned_strings) == ((1, 2), ("tapestry",))
    assert params.logit_bias == {5: -100.0}
    assert params.sampler_priority[:3] == ("dry", "penalties", "no_repeat_ngram")


async def test_log_probabilities_are_where_it_looks() -> None:
    request = next(r for r in RECORD if (r["body"] or {}).get("api_type") == "aphrodite" and r["body"].get("logprobs"))
    async with running_server(server_of_the_model()) as server:
        choice = (await send(server, request)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(logprobs["token_logprobs"])
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"].startswith(token, offset) or token.startswith("bytes:")


async def test_stream_chunks_have_no_key_that_it_takes_for_an_error() -> None:
    async with running_server(server_of_the_model()) as server:
        text = (await send(server, of_type("aphrodite", stream=True))).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line]
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1, 2}
    assert not any(key in chunk for chunk in chunks for key in ("error", "message", "detail"))


@pytest.mark.parametrize("request_", PAGE, ids=lambda request: f"{request['type']} {request['settings']}")
async def test_what_its_page_makes_of_the_settings_is_answered(request_: dict[str, Any]) -> None:
    engine = server_of_the_model()
    async with running_server(engine) as server:
        response = await server.http.post(request_["path"], json=request_["body"])
    assert response.status_code == 200, response.text[:500]
    assert "warnings" not in response.text
    answer = response.json()
    assert len(answer if isinstance(answer, list) else texts(answer)) == request_["body"].get("n", 1)


async def test_biases_and_bans_of_its_llama_cpp_type_arrive() -> None:
    engine = server_of_the_model()
    (request,) = [row for row in PAGE if (row["type"], row["settings"]) == ("llamacpp", "everything")]
    async with running_server(engine) as server:
        await server.http.post(request["path"], json=request["body"])
    params = engine.seen[-1][1]
    assert params.logit_bias == {5: -100.0, 6: -100.0, 9: 3.0}
    assert params.banned_strings == ("tapestry",)
    assert params.sampler_priority[:3] == ("penalties", "dry", "top_nsigma")
