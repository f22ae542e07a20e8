"""Answers that `/v1/responses` computes in the background: polled, followed, cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from fake_engine import STORY, FakeEngine
from openai.types.responses import Response
from running import RunningServer, running_server


async def begin(server: RunningServer, **fields: Any) -> Response:
    given: dict[str, Any] = {"model": "fake/story", "input": "Tell me.", "background": True} | fields
    answer = await server.client.responses.create(**given)
    return Response.model_validate(answer.model_dump(by_alias=True), strict=True)


async def final(server: RunningServer, response_id: str) -> Response:
    """The response once it is no longer under way."""
    while True:
        answer = await server.client.responses.retrieve(response_id)
        if answer.status not in ("queued", "in_progress"):
            return Response.model_validate(answer.model_dump(by_alias=True), strict=True)


async def followed(server: RunningServer, response_id: str, **query: Any) -> list[Any]:
    stream = await server.client.responses.retrieve(response_id, stream=True, **query)
    return [event async for event in stream]


def text(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


@pytest.fixture
def held() -> FakeEngine:
    return FakeEngine(hold_after=5)


async def test_nobody_has_to_listen(held: FakeEngine) -> None:
    async with running_server(held) as server:
        begun = await begin(server, max_output_tokens=9)
        assert (begun.status, begun.background, begun.output) == ("queued", True, [])
        await held.holding.wait()
        assert (await server.client.responses.retrieve(begun.id)).status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="still being computed"):
            await begin(server, previous_response_id=begun.id)
        held.gate.set()
        answer = await final(server, begun.id)
        assert (answer.status, answer.output_text) == ("incomplete", STORY[:9])
        assert answer.background
        held.hold_after = None
        after = await begin(server, previous_response_id=begun.id, input="And?", max_output_tokens=1)
        await final(server, after.id)
        assert b"assistant: Once upon\nuser: And?" in bytes(held.seen[-1][0])
        assert (await server.client.responses.cancel(begun.id)).status == "incomplete"  # it was over before


async def test_whoever_lost_the_stream_goes_on_where_it_broke(held: FakeEngine) -> None:
    async with running_server(held) as server:
        stream = await server.client.responses.create(
            model="fake/story", input="Tell me.", background=True, stream=True, max_output_tokens=20
        )
        seen = []
        async for event in stream:
            seen.append(event)
            if text(seen) == STORY[:3]:
                break
        await stream.close()
        await held.holding.wait()
        assert held.running  # it goes on by itself
        name = seen[0].response.id
        rest = asyncio.ensure_future(followed(server, name, starting_after=seen[-1].sequence_number))
        held.gate.set()
        events = seen + await rest
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert text(events) == STORY.encode()[:20].decode()
        assert events[-1].type == "response.incomplete"
        again = await followed(server, name)
        assert [event.model_dump() for event in again] == [event.model_dump() for event in events]
        assert await followed(server, name, starting_after=events[-1].sequence_number) == []


async def test_without_it_a_client_that_leaves_ends_its_answer(held: FakeEngine) -> None:
    async with running_server(held) as server:
        stream = await server.client.responses.create(model="fake/story", input="Tell me.", stream=True)
        async for _ in stream:
            break
        await held.holding.wait()
        await stream.close()
        await asyncio.wait_for(held.idle.wait(), 20)


async def test_a_stream_is_continued_as_on_the_other_endpoints(server: RunningServer) -> None:
    body = {"input": "Tell me.", "max_output_tokens": 6, "stream": True, "resumable": True}
    whole = await server.http.post("/v1/responses", json=body)
    events = whole.text.split("\n\n")[:-1]
    assert [event.split("\n")[0] for event in events] == [f"id: {number}" for number in range(1, len(events) + 1)]
    path = f"/v1/streams/{whole.headers['x-stream-id']}"
    rest = await server.http.get(path, headers={"last-event-id": "4"})
    assert rest.text.split("\n\n")[:-1] == events[4:]
    assert '"status":"incomplete"' in events[-1]


async def test_an_answer_is_cancelled_or_deleted_while_it_is_computed(held: FakeEngine) -> None:
    async with running_server(held) as server:
        for _ in range(2):
            begun = await begin(server)
            await held.holding.wait()
            cancelled = await server.client.responses.cancel(begun.id)
            assert (cancelled.status, cancelled.id) == ("cancelled", begun.id)
            assert not held.running
            assert (await final(server, begun.id)).status == "cancelled"
            assert (await followed(server, begun.id))[-1].response.status == "cancelled"
            assert (await server.client.responses.cancel(begun.id)).status == "cancelled"
            held.holding.clear()
        begun = await begin(server)
        await held.holding.wait()
        await server.client.responses.delete(begun.id)
        assert not held.running
        with pytest.raises(openai.NotFoundError):
            await server.client.responses.retrieve(begun.id)


async def test_what_fails_says_so() -> None:
    async with running_server(FakeEngine(fail_after=3)) as server:
        answer = await final(server, (await begin(server)).id)
        assert (answer.status, answer.error.code) == ("failed", "server_error")
    async with running_server(FakeEngine(max_running=0)) as server:
        answer = await final(server, (await begin(server)).id)
        assert (answer.status, answer.error.code) == ("failed", "rate_limit_exceeded")
    async with running_server(FakeEngine(hold_after=3), request_timeout=0.05) as server:
        answer = await final(server, (await begin(server)).id)
        assert (answer.status, "longer" in answer.error.message) == ("failed", True)


async def test_a_server_that_goes_down_does_not_wait_for_it(held: FakeEngine) -> None:
    async with running_server(held) as server:
        await begin(server)
        await held.holding.wait()
    assert not held.running


async def test_keys_are_apart() -> None:
    async with running_server(FakeEngine(hold_after=2), api_keys=("a", "b")) as server:
        begun = await begin(server)
        other = server.client.with_options(api_key="b")
        for refused in (other.responses.cancel(begun.id), other.responses.retrieve(begun.id, stream=True)):
            with pytest.raises(openai.NotFoundError):
                await refused
        await server.client.responses.cancel(begun.id)
