"""`aphrodite.OpenAI`: openai's client, with this engine's fields as keyword arguments, against a running server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_engine import STORY, raw_state
from running import RunningServer

from aphrodite import AsyncOpenAI, OpenAI
from aphrodite.sampling.fields import canonical_names

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def client(server: RunningServer) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=str(server.client.base_url), max_retries=0)


async def test_sampler_names_go_straight_in(server: RunningServer, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fake/story", messages=MESSAGES, temperature=0.7, repetition_penalty=1.15, min_p=0.05, rep_pen_range=64
    )
    assert answer.choices[0].message.content == STORY
    params = server.engine.seen[-1][1]
    assert (params.temperature, params.repetition_penalty, params.min_p) == (0.7, 1.15, 0.05)
    assert params.repetition_penalty_range == 64


async def test_completions_take_them_too_streamed(server: RunningServer, client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake/story", prompt="Tell", stream=True, top_a=0.2, truncate_prompt_tokens=3
    )
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == STORY.encode()[:16].decode()
    assert server.engine.seen[-1][1].top_a == 0.2
    assert len(server.engine.seen[-1][0]) == 3


async def test_embeddings_take_their_own_fields(server: RunningServer, client: AsyncOpenAI) -> None:
    found = await client.embeddings.create(
        model="fake/story", input=[97, 98], encoding_format="float", pooling="cls", normalize=False
    )
    assert found.data[0].embedding == pytest.approx(raw_state(97))
    with pytest.raises(TypeError, match="min_p"):
        await client.embeddings.create(model="fake/story", input="a", min_p=0.1)


async def test_what_openai_derives_of_its_methods_takes_them(server: RunningServer, client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="fake/story", messages=MESSAGES, dry_multiplier=0.8
    )
    assert raw.status_code == 200
    assert server.engine.seen[-1][1].dry_multiplier == 0.8
    options: dict[str, Any] = {"model": "fake/story", "messages": MESSAGES, "xtc_probability": 0.5}
    async with client.chat.completions.stream(**options) as stream:
        await stream.until_done()
    assert server.engine.seen[-1][1].xtc_probability == 0.5
    copied = client.with_options(max_retries=1)
    assert isinstance(copied, AsyncOpenAI)
    await copied.completions.create(model="fake/story", prompt="x", top_nsigma=1.5)
    assert server.engine.seen[-1][1].top_nsigma == 1.5


async def test_a_client_without_async(server: RunningServer) -> None:
    def ask() -> str | None:
        with OpenAI(base_url=str(server.client.base_url), max_retries=0) as client:
            answer = client.chat.completions.create(model="fake/story", messages=MESSAGES, smoothing_factor=0.3)
            return str(answer.choices[0].message.content)

    assert await asyncio.to_thread(ask) == STORY
    assert server.engine.seen[-1][1].smoothing_factor == 0.3


async def test_extra_body_wins_and_stays(server: RunningServer, client: AsyncOpenAI) -> None:
    body = {"min_p": 0.1, "tfs": 0.9}
    await client.completions.create(model="fake/story", prompt="x", min_p=0.05, extra_body=body)
    params = server.engine.seen[-1][1]
    assert (params.min_p, params.tfs) == (0.1, 0.9)
    assert body == {"min_p": 0.1, "tfs": 0.9}


async def test_an_unknown_name_is_a_type_error(client: AsyncOpenAI) -> None:
    with pytest.raises(TypeError, match="repetition_penality"):
        await client.completions.create(model="m", prompt="x", repetition_penality=1.1)


def test_it_talks_to_this_machine_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "APHRODITE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert str(OpenAI().base_url) == "http://127.0.0.1:2242/v1/"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("APHRODITE_API_KEY", "secret")
    client = OpenAI()
    assert (str(client.base_url), client.api_key) == ("http://127.0.0.1:9/v1/", "secret")


async def test_every_sampler_can_be_named(server: RunningServer, client: AsyncOpenAI) -> None:
    neutral = dict.fromkeys(canonical_names())  # null means "not given"
    answer = await client.completions.create(model="fake/story", prompt="x", **neutral)
    assert answer.choices[0].finish_reason == "length"
    assert len(neutral) > 60
