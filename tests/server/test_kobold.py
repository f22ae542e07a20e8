"""KoboldAI's API as its clients use it, and what koboldcpp added to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fake_engine import BOS, STORY, FakeEngine, FakeModel
from hypothesis import given
from hypothesis import strategies as st
from running import RunningServer, running_server

from aphrodite.outputs import RequestOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.kobold import Run, fitted

# What KoboldAI Lite sends with every request.
LITE = {
    "n": 1, "max_context_length": 400, "max_length": 20, "rep_pen": 1.07, "temperature": 0.75, "top_p": 0.92,
    "top_k": 100, "top_a": 0, "typical": 1, "tfs": 1, "rep_pen_range": 360, "rep_pen_slope": 0.7,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5], "memory": "", "trim_stop": True, "genkey": "KCPP1234", "min_p": 0.02,
    "dynatemp_range": 0.2, "dynatemp_exponent": 1, "smoothing_factor": 0.1, "nsigma": 0, "banned_tokens": ["zzz"],
    "render_special": False, "logprobs": False, "presence_penalty": 0.1, "logit_bias": {}, "quiet": True,
    "stop_sequence": ["\n###"], "use_default_badwordsids": False, "bypass_eos": False, "mirostat": 0,
    "mirostat_tau": 5.0, "mirostat_eta": 0.1, "dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": 320, "dry_sequence_breakers": ["\n", ":"], "xtc_probability": 0.5, "xtc_threshold": 0.2,
    "sampler_seed": 17, "images": [], "prompt": "Tell",
}  # fmt: skip


async def events(server: RunningServer, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """The stream's events, each with its name."""
    async with server.http.stream("POST", "/api/extra/generate/stream", json=fields) as response:
        assert response.status_code == 200
        text = "".join([part async for part in response.aiter_text()])
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.mark.parametrize("prefix", ["/api/v1", "/api/latest"])
async def test_everything_that_kobold_lite_sends_is_understood(server: RunningServer, prefix: str) -> None:
    response = await server.http.post(f"{prefix}/generate", json=LITE)
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    assert "warnings" not in response.json()
    (result,) = response.json()["results"]
    assert result["text"]
    assert (result["finish_reason"], result["prompt_tokens"], result["completion_tokens"]) == ("length", 5, 20)
    token_ids, params = server.engine.seen[-1][:2]
    assert token_ids == [BOS, *b"Tell"]
    expected = SamplingParams(
        max_tokens=20, repetition_penalty=1.07, repetition_penalty_range=360, repetition_penalty_slope=0.7,
        temperature=0.75, top_p=0.92, top_k=100, min_p=0.02, dynatemp_range=0.2, smoothing_factor=0.1,
        presence_penalty=0.1, dry_multiplier=0.8, dry_range=320, dry_sequence_breakers=("\n", ":"),
        xtc_probability=0.5, xtc_threshold=0.2, seed=17, banned_strings=("zzz",), stop=("\n###",),
        sampler_priority=params.sampler_priority, logit_bias={},
    )  # fmt: skip
    assert params == expected
    names = list(params.sampler_priority)
    assert names == ["penalties", "top_k", "top_a", "tfs", "typical_p", "top_p", "min_p", "temperature"]


async def test_a_stream_is_the_whole_in_pieces(server: RunningServer) -> None:
    pieces = await events(server, prompt="Tell", max_length=30)
    assert {name for name, _ in pieces} == {"message"}
    assert "".join(piece["token"] for _, piece in pieces) == STORY.encode()[:30].decode(errors="ignore")
    assert [piece["finish_reason"] for _, piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1][1]["finish_reason"] == "length"


async def test_the_models_recommendation_holds_where_nothing_is_said() -> None:
    engine = FakeEngine()
    engine.model = FakeModel(sampling_defaults=SamplingParams(temperature=0.3))
    async with running_server(engine) as server:
        await server.http.post("/api/v1/generate", json={"prompt": "x", "max_length": 2})
        await server.http.post("/api/v1/generate", json={"prompt": "x", "max_length": 2, "preset": "balanced"})
    assert [params.temperature for _, params, *_ in engine.seen] == [0.3, 1.0]


async def test_stops_and_special_tokens(server: RunningServer) -> None:
    body = {"prompt": "x", "stop_sequence": ["time"]}
    for trim, text in ((True, "Once upon a "), (False, "Once upon a time")):
        response = await server.http.post("/api/v1/generate", json={**body, "trim_stop": trim})
        assert response.json()["results"][0] | {"text": text, "finish_reason": "stop"} == response.json()["results"][0]
    await server.http.post(
        "/api/v1/generate",
        json={"prompt": "x", "bypass_eos": True, "render_special": True, "ban_eos_token": True, "max_length": 3},
    )
    params = server.engine.seen[-1][1]
    assert (params.ignore_eos, params.skip_special_tokens, params.ban_eos_token) == (True, False, True)


async def test_memory_stays_and_the_prompt_gives_way(server: RunningServer) -> None:
    body = {"memory": "MEM", "prompt": "0123456789", "max_context_length": 12, "max_length": 4}
    await server.http.post("/api/v1/generate", json=body)
    assert server.engine.seen[-1][0] == [BOS, *b"MEM", *b"6789"]
    response = await server.http.post("/api/v1/generate", json={**body, "max_length": 12})
    assert response.status_code == 400
    assert response.json()["detail"]["param"] == "max_length"


@given(st.text("ab", max_size=12), st.text("cd", max_size=12), st.integers(1, 30), st.booleans())
def test_what_fits_begins_like_the_whole_and_ends_like_the_prompt(
    memory: str, prompt: str, room: int, bos: bool
) -> None:
    start = [BOS] if bos else []
    memory_ids = [*start, *memory.encode()] if memory else []
    prompt_ids = list(prompt.encode()) if memory else [*start, *prompt.encode()]
    kept = fitted(memory_ids, prompt_ids, room, BOS)
    assert len(kept) <= room
    assert len(kept) == min(room, max(1, len(memory_ids + prompt_ids)))
    text = [token for token in kept if token != BOS]
    assert kept[:1] == [BOS] or not bos
    in_memory = [token for token in text if token in b"ab"]
    assert bytes(in_memory).decode() == memory[len(memory) - len(in_memory) :]
    assert prompt.endswith(bytes(text[len(in_memory) :]).decode())
    assert len(in_memory) == len(memory) or len(text) == len(in_memory)


async def test_a_run_can_be_looked_at_and_ended() -> None:
    engine = FakeEngine(hold_after=9)
    async with running_server(engine) as server:
        job = asyncio.ensure_future(server.http.post("/api/v1/generate", json={"prompt": "x", "genkey": "mine"}))
        await engine.holding.wait()
        for body, expected in (({"genkey": "mine"}, "Once upon"), ({"genkey": "other"}, ""), ({}, "Once upon")):
            answer = await server.http.post("/api/extra/generate/check", json=body)
            assert answer.json() == {"results": [{"text": expected}]}
        assert (await server.http.get("/api/extra/generate/check")).json()["results"][0]["text"] == "Once upon"
        wrong = await server.http.post("/api/extra/abort", json={"genkey": "other"})
        assert wrong.json() == {"success": "false", "done": "false"}
        done = await server.http.post("/api/extra/abort", json={"genkey": "mine"})
        assert done.json() == {"success": "true", "done": "true"}
        result = (await job).json()["results"][0]
        assert (result["text"], result["finish_reason"]) == ("Once upon", "stop")
        await asyncio.wait_for(engine.idle.wait(), 20)


async def test_a_run_that_is_ended_twice_at_once_ends_as_by_one() -> None:
    async def silent() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        await asyncio.Event().wait()
        yield 0, RequestOutput("r", [], [], finished=True)

    run = Run("mine")
    waiting = asyncio.ensure_future(run.next_of(silent()))
    await asyncio.sleep(0)
    run.end()
    run.end()  # before the first has reached it
    assert await waiting is None


async def test_empty_stop_sequences_are_passed_over(server: RunningServer) -> None:
    for path, fields in (
        ("/api/v1/generate", {"stop_sequence": ["", "time"]}),
        ("/completion", {"stop": ["", "time"]}),
        ("/completion", {"stop": ""}),
        ("/api/generate", {"model": "fake/story", "options": {"stop": ["", "time"]}}),
    ):
        answer = await server.http.post(path, json={"prompt": "x", **fields})
        assert answer.status_code == 200, answer.text
        assert server.engine.seen[-1][1].stop == (() if fields == {"stop": ""} else ("time",))


async def test_a_stream_that_is_ended_says_so() -> None:
    engine = FakeEngine(hold_after=9)
    async with running_server(engine) as server:
        job = asyncio.ensure_future(events(server, prompt="x", genkey="mine"))
        await engine.holding.wait()
        await server.http.post("/api/extra/abort", json={"genkey": "mine"})
        pieces = await job
        assert "".join(piece["token"] for _, piece in pieces) == "Once upon"
        assert pieces[-1][1] == {"token": "", "finish_reason": "stop"}
        await asyncio.wait_for(engine.idle.wait(), 20)


async def test_strangers_runs_stay_private() -> None:
    engine = FakeEngine(hold_after=9)
    async with running_server(engine) as server:
        jobs = [
            asyncio.ensure_future(server.http.post("/api/v1/generate", json={"prompt": "x", "genkey": key}))
            for key in ("a", "b")
        ]
        await engine.until_running(2)
        assert (await server.http.get("/api/extra/generate/check")).json() == {"results": [{"text": ""}]}
        assert (await server.http.post("/api/extra/abort", json={})).json()["success"] == "false"
        for key in ("a", "b"):
            await server.http.post("/api/extra/abort", json={"genkey": key})
        await asyncio.gather(*jobs)


async def test_several_answers_and_logprobs(server: RunningServer) -> None:
    response = await server.http.post(
        "/api/v1/generate", json={"prompt": "x", "n": 3, "max_length": 4, "logprobs": True}
    )
    results = response.json()["results"]
    assert [result["text"] for result in results] == ["Once"] * 3
    tokens = [row["token"] for row in results[0]["logprobs"]["content"]]
    assert "".join(tokens) == "Once"
    assert len(results[0]["logprobs"]["content"][0]["top_logprobs"]) == 5


async def test_kobold_lite_is_not_asked_for_placeholders(server: RunningServer) -> None:
    version = (await server.http.get("/api/extra/version")).json()["version"]
    assert tuple(map(int, version.split("."))) < (1, 88)  # from which on its prompts have {{[INPUT]}} in them


async def test_facts(server: RunningServer) -> None:
    for path, expected in {
        "/api/v1/model": {"result": "aphrodite/fake/story"},
        "/api/latest/info/version": {"result": "1.2.5"},
        "/api/v1/config/max_length": {"value": 256},
        "/api/v1/config/max_context_length": {"value": 512},
        "/api/extra/true_max_context_length": {"value": 512},
        "/api/v1/config/soft_prompts_list": {"values": []},
        "/api/v1/config/soft_prompt": {"value": ""},
        "/api/extra/preloadstory": {},
    }.items():
        assert (await server.http.get(path)).json() == expected, path
    version = (await server.http.get("/api/extra/version")).json()
    assert (version["result"], version["protected"]) == ("KoboldCpp", False)
    await server.http.post("/api/v1/generate", json={"prompt": "x", "max_length": 4})
    perf = (await server.http.get("/api/extra/perf")).json()
    assert (perf["total_gens"], perf["last_token_count"], perf["stop_reason"], perf["idle"]) == (1, 4, 0, 1)


@pytest.mark.parametrize("path", ["/api/extra/tokencount", "/api/extra/tokenize"])
async def test_tokens_are_counted(server: RunningServer, path: str) -> None:
    assert (await server.http.post(path, json={"prompt": "ab"})).json() == {"value": 3, "ids": [BOS, 97, 98]}
    assert (await server.http.post(path, json={"prompt": "ab", "special": False})).json()["value"] == 2
    text = await server.http.post("/api/extra/detokenize", json={"ids": [97, 98]})
    assert text.json() == {"result": "ab", "success": True}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/v1/generate", {"prompt": 3}, "prompt"),
        ("/api/v1/generate", {"prompt": "x", "max_length": 0}, "max_length"),
        ("/api/v1/generate", {"prompt": "x", "max_length": 513}, "max_length"),
        ("/api/v1/generate", {"prompt": "x", "rep_pen": -1}, "rep_pen"),
        ("/api/v1/generate", {"prompt": "x", "images": ["aGk="]}, "images"),
        ("/api/v1/generate", {"prompt": "x", "preset": "none such"}, "preset"),
        ("/api/extra/generate/stream", {"prompt": "x", "n": 2}, "n"),
        ("/api/extra/detokenize", {"ids": [258]}, "ids"),
        ("/api/extra/detokenize", {}, "ids"),
        ("/api/extra/tokencount", {"prompt": ["x"]}, "prompt"),
    ],
)
async def test_errors_have_koboldcpps_shape(server: RunningServer, path: str, body: Any, param: str) -> None:
    response = await server.http.post(path, json=body)
    assert response.status_code == 400
    assert set(response.json()) == {"detail"}
    assert response.json()["detail"]["param"] == param
    assert param in response.json()["detail"]["msg"]
    assert not server.engine.seen


async def test_a_wrong_key_is_refused_in_the_same_shape() -> None:
    async with running_server(api_keys=("right",)) as server:
        for path in ("/api/v1/generate", "/api/extra/generate/check", "/api/extra/abort"):
            response = await server.http.post(path, json={"prompt": "x"})
            assert response.status_code == 401
            assert response.json()["detail"]["type"] == "invalid_api_key"


async def test_an_engine_that_fails_in_mid_stream_is_told() -> None:
    async with running_server(FakeEngine(fail_after=4)) as server:
        pieces = await events(server, prompt="x")
        assert pieces[-1][0] == "error"
        assert "could not finish" in pieces[-1][1]["detail"]["msg"]
