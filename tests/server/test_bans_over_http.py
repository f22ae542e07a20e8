"""Bans, stop regexes and loops over HTTP: OpenAI's client before the real engine with the real model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import Completion
from openai.types.chat import ChatCompletion
from running import RunningServer, running_server

from aphrodite.config import EngineConfig
from aphrodite.engine.async_engine import AsyncEngine

MODEL = "SmolLM2-135M-Instruct"
PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story about a city."}]
GREEDY = {"max_tokens": 40, "temperature": 0.0}


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


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def complete(server: RunningServer, **extra: Any) -> Completion:
    raw = await server.client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, **{**GREEDY, **extra.pop("fields", {})}, extra_body=extra
    )
    return Completion.model_validate(json.loads(raw.content), strict=True)


async def test_a_banned_word_is_in_no_answer(server: RunningServer) -> None:
    plain = (await complete(server)).choices[0].text
    word = next(word for word in plain.split() if word.isalpha() and len(word) > 3)
    for banned in ({"banned_strings": [word]}, {"banned_phrases": json.dumps([word])}, {"banned_regex": f"(?i){word}"}):
        answer = await complete(server, **banned, fields={"n": 3, "temperature": 1.2, "seed": 5, "logprobs": 2})
        assert len({choice.text for choice in answer.choices}) == 3
        for choice in answer.choices:
            assert word.lower() not in choice.text.lower()
            assert choice.logprobs is not None
            assert len(choice.logprobs.tokens or []) == 40
            assert "".join(choice.logprobs.tokens or []) == choice.text
    raw = await server.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=40, temperature=0, extra_body={"banned_strings": ["city", "the"]}
    )
    chat = ChatCompletion.model_validate(json.loads(raw.content), strict=True)
    content = (chat.choices[0].message.content or "").lower()
    assert content
    assert "city" not in content
    assert "the" not in content


async def test_a_stream_equals_the_whole_and_never_shows_the_word(server: RunningServer) -> None:
    plain = (await complete(server)).choices[0].text
    word = next(word for word in plain.split() if word.isalpha() and len(word) > 3)
    stream = await server.client.completions.create(
        model=MODEL, prompt=PROMPT, stream=True, **GREEDY, extra_body={"banned_strings": [word]}
    )
    pieces = [chunk.choices[0].text async for chunk in stream if chunk.choices]
    assert word.lower() not in "".join(pieces).lower()
    assert "".join(pieces) == (await complete(server, banned_strings=[word])).choices[0].text


async def test_what_cannot_be_banned_is_named_in_the_choice(server: RunningServer) -> None:
    tokens = (await server.http.post("/tokenize", json={"prompt": "x", "add_special_tokens": False})).json()["tokens"]
    extra = {"banned_strings": ["x"], "allowed_token_ids": tokens}
    answer = await complete(server, **extra)
    assert answer.choices[0].text == "x" * 40
    (warning,) = answer.choices[0].model_extra["warnings"]  # type: ignore[index]
    assert "could not be avoided" in warning
    stream = await server.client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **GREEDY, extra_body=extra)
    last = [chunk async for chunk in stream][-1].choices[0]
    assert last.model_extra is not None
    assert last.model_extra["warnings"] == [warning]
    assert "warnings" not in ((await complete(server, banned_strings=["xylophone"])).choices[0].model_extra or {})


async def test_stop_regex_and_loops_end_answers_with_a_reason(server: RunningServer) -> None:
    plain = (await complete(server)).choices[0].text
    stopped = (await complete(server, stop_regex=[r"\b[A-Z]\w+\b"])).choices[0]
    assert stopped.finish_reason == "stop"
    assert (stopped.model_extra or {})["stop_reason"] == r"\b[A-Z]\w+\b"
    assert plain.startswith(stopped.text)
    assert not any(char.isupper() for char in stopped.text)
    loop = {
        "allowed_token_ids": [260, 281],
        "ignore_eos": True,
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
    }
    ended = (await complete(server, **loop)).choices[0]
    assert (ended.finish_reason, (ended.model_extra or {})["stop_reason"]) == ("stop", "repetition_detected")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("banned_strings", [""]),
        ("banned_strings", ["x"] * 4097),
        ("banned_strings", ["x" * 257]),
        ("banned_strings", [3]),
        ("banned_strings_case_sensitive", 1),
        ("banned_regex", ["("]),
        ("banned_regex", ["a*"]),
        ("banned_regex", ["(a{500}){500}"]),
        ("banned_regex", ["a"] * 65),
        ("stop_regex", [r"(a)\1"]),
        ("stop_regex", ["a" * 513]),
        ("repetition_detection", {"max_pattern_size": 3}),
        ("repetition_detection", {"max_pattern_size": 3, "min_count": 1}),
        ("repetition_detection", {"max_pattern_size": 257, "min_count": 3}),
        ("repetition_detection", {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 3}),
        ("repetition_detection", {"max_pattern_size": 2, "min_count": 3, "window": 1}),
        ("repetition_detection", {"max_pattern_size": -1, "min_count": 3}),
        ("repetition_detection", 3),
    ],
)
async def test_what_is_out_of_bounds_is_refused_by_name(server: RunningServer, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(server, **{field: value})
    assert caught.value.param == field
