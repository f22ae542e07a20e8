"""A client that loses its connection continues the stream: nothing twice, nothing missing, nobody else's."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

import httpx
import pytest
from fake_engine import FakeEngine
from running import RunningServer, running_server

from aphrodite.errors import QueueFullError
from aphrodite.server import resumable

CHAT = {"messages": [{"role": "user", "content": "Tell"}], "max_tokens": 60, "seed": 5, "stream": True}
COMPLETION = {"prompt": "Tell", "max_tokens": 60, "seed": 5, "stream": True}
NUM_EVENTS = 52  # of COMPLETION: some of its 60 tokens are parts of letters
BODIES: list[Any] = [
    pytest.param("/v1/completions", COMPLETION, id="completion"),
    pytest.param("/v1/completions", {**COMPLETION, "n": 2, "logprobs": 2, "prompt": ["a", "b"]}, id="four answers"),
    pytest.param("/v1/chat/completions", CHAT, id="chat"),
    pytest.param("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, id="chat with usage"),
]


class Event(NamedTuple):
    number: int | None
    data: str


def events_of(text: str) -> list[Event]:
    """Whole events of a stream, comments and the end mark left out."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines and lines["data"] != "[DONE]":
            found.append(Event(int(lines["id"]) if "id" in lines else None, lines["data"]))
    return found


def story(events: list[Event]) -> list[Any]:
    """What the events tell, without what is another's in every run."""
    chunks = [json.loads(event.data) for event in events]
    return [{key: value for key, value in chunk.items() if key not in ("id", "created")} for chunk in chunks]


class Connection:
    """A client by hand, that can break off at any byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.body = b""

    @classmethod
    async def open(cls, server: RunningServer, path: str, body: dict[str, Any]) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        connection = cls(reader, writer)
        await reader.readuntil(b"\r\n\r\n")
        return connection

    async def read_events(self, count: int) -> list[Event]:
        """Read until so many events have come whole, and break off."""
        while len(events_of(self.body.decode(errors="ignore"))) < count:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            self.body += (await self._reader.readexactly(size + 2))[:-2]
        self._writer.transport.abort()
        return events_of(self.body.decode())[:count]


async def resume(server: RunningServer, stream_id: str, after: int | None, **headers: str) -> httpx.Response:
    if after is not None:
        headers["last-event-id"] = str(after)
    return await server.http.get(f"/v1/streams/{stream_id}", headers=headers)


@pytest.mark.parametrize("lost_after", [1, 7, 30])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_lost_connection_is_continued(path: str, body: dict[str, Any], lost_after: int) -> None:
    async with running_server(FakeEngine()) as server:
        expected = story(events_of((await server.http.post(path, json=body)).text))
    async with running_server(FakeEngine(hold_after=max(1, lost_after - 1))) as server:
        connection = await Connection.open(server, path, {**body, "resumable": True})
        first = await connection.read_events(min(lost_after, 6))
        stream_id = json.loads(first[0].data)["id"]
        server.engine.gate.set()
        rest = await resume(server, stream_id, first[-1].number)
        assert rest.status_code == 200
        assert rest.headers["content-type"].startswith("text/event-stream")
        assert rest.text.endswith("data: [DONE]\n\n")
        joined = first + events_of(rest.text)
        assert [event.number for event in joined] == list(range(1, len(joined) + 1))
        assert story(joined) == expected
        again = await resume(server, stream_id, None)  # it is kept for a while, and from its beginning
        assert events_of(again.text) == joined


async def test_openais_client_reads_a_resumable_stream(server: RunningServer) -> None:
    stream = await server.client.chat.completions.create(model="fake/story", **CHAT, extra_body={"resumable": True})
    assert stream.response.headers["x-stream-id"].startswith("chatcmpl-")
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    whole = await server.client.chat.completions.create(model="fake/story", **{**CHAT, "stream": False})
    assert text == whole.choices[0].message.content


async def test_llama_cpps_stream_is_continued_too() -> None:
    body = {"prompt": "Tell", "n_predict": 60, "seed": 5, "stream": True}
    async with running_server(FakeEngine(hold_after=5)) as server:
        server.engine.gate.set()
        expected = await server.http.post("/completion", json=body)
        server.engine.gate.clear()
        async with server.http.stream("POST", "/completion", json={**body, "resumable": True}) as response:
            stream_id = response.headers["x-stream-id"]
        server.engine.gate.set()
        told = await resume(server, stream_id, None)
        assert "[DONE]" not in told.text
        pieces = [[json.loads(event.data) for event in events_of(text)] for text in (expected.text, told.text)]
        for piece in pieces:
            del piece[-1]["timings"]
        assert pieces[0] == pieces[1]


async def test_two_listeners_hear_the_same() -> None:
    async with running_server(FakeEngine(hold_after=3)) as server:
        connection = await Connection.open(server, "/v1/completions", {**COMPLETION, "resumable": True})
        first = await connection.read_events(2)
        stream_id = json.loads(first[0].data)["id"]
        both = [asyncio.ensure_future(resume(server, stream_id, after)) for after in (0, 1)]
        await server.engine.holding.wait()
        server.engine.gate.set()
        whole, behind = [events_of(answer.text) for answer in await asyncio.gather(*both)]
        assert whole[1:] == behind
        assert len(whole) == NUM_EVENTS


async def test_others_leave_no_stream_behind(server: RunningServer) -> None:
    response = await server.http.post("/v1/completions", json=COMPLETION)
    assert "x-stream-id" not in response.headers
    assert all(event.number is None for event in events_of(response.text))
    stream_id = json.loads(events_of(response.text)[0].data)["id"]
    gone = await resume(server, stream_id, 1)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "stream_not_found")


async def test_an_answer_that_nobody_comes_back_for_is_ended() -> None:
    async with running_server(FakeEngine(hold_after=3), stream_resume_seconds=0.05) as server:
        connection = await Connection.open(server, "/v1/completions", {**COMPLETION, "resumable": True})
        (first,) = await connection.read_events(1)
        await server.engine.until_running(1)
        await asyncio.wait_for(server.engine.idle.wait(), 20)
        assert (await resume(server, json.loads(first.data)["id"], 1)).status_code == 404


async def test_a_listener_keeps_it_longer_than_that() -> None:
    async with running_server(FakeEngine(hold_after=3), stream_resume_seconds=0.05, ping_interval=0.02) as server:
        async with server.http.stream("POST", "/v1/completions", json={**COMPLETION, "resumable": True}) as response:
            pings, text = 0, ""
            async for part in response.aiter_text():
                text += part
                pings += part.count(": ping")
                if pings == 10:
                    server.engine.gate.set()
        assert len(events_of(text)) == NUM_EVENTS


async def test_a_stream_is_its_keys_own() -> None:
    async with running_server(FakeEngine(hold_after=3), api_keys=("mine", "yours")) as server:
        mine, yours = ({"authorization": f"Bearer {key}"} for key in ("mine", "yours"))
        body = {**COMPLETION, "resumable": True}
        async with server.http.stream("POST", "/v1/completions", json=body, headers=mine) as response:
            stream_id = response.headers["x-stream-id"]
        for headers in (yours, {}):
            status = 404 if headers else 401
            assert (await resume(server, stream_id, 0, **headers)).status_code == status
            assert (await server.http.delete(f"/v1/streams/{stream_id}", headers=headers)).status_code == status
        server.engine.gate.set()
        assert len(events_of((await resume(server, stream_id, 0, **mine)).text)) == NUM_EVENTS


async def test_deleting_ends_the_answer() -> None:
    async with running_server(FakeEngine(hold_after=3)) as server:
        connection = await Connection.open(server, "/v1/completions", {**COMPLETION, "resumable": True})
        (first,) = await connection.read_events(1)
        stream_id = json.loads(first.data)["id"]
        async with server.http.stream("GET", f"/v1/streams/{stream_id}") as listener:
            deleted = await server.http.delete(f"/v1/streams/{stream_id}")
            assert deleted.json() == {"id": stream_id, "object": "stream", "deleted": True}
            await asyncio.wait_for(server.engine.idle.wait(), 20)
            assert (await listener.aread()).endswith(b"data: [DONE]\n\n")
        assert (await server.http.delete(f"/v1/streams/{stream_id}")).status_code == 404


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "²", "9" * 30, "61"])
async def test_wrong_event_ids_are_refused(server: RunningServer, value: str) -> None:
    response = await server.http.post("/v1/completions", json={**COMPLETION, "resumable": True})
    stream_id = response.headers["x-stream-id"]
    wrong = await server.http.get(f"/v1/streams/{stream_id}", headers={"last-event-id": value.encode()})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "Last-Event-ID")


async def test_streams_can_be_switched_off_and_are_for_streams() -> None:
    async with running_server(stream_resume_seconds=0) as server:
        response = await server.http.post("/v1/completions", json={**COMPLETION, "resumable": True})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "resumable")
        assert (await server.http.post("/v1/completions", json=COMPLETION)).status_code == 200
    async with running_server() as server:
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            response = await server.http.post(path, json={**body, "resumable": True, "stream": False})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "resumable")
            response = await server.http.post(path, json={**body, "resumable": "yes"})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "resumable")


async def test_an_early_error_keeps_its_status() -> None:
    engine = FakeEngine(refuse=QueueFullError("full", retry_after=2.0))
    async with running_server(engine) as server:
        response = await server.http.post("/v1/completions", json={**COMPLETION, "resumable": True})
        assert (response.status_code, response.headers["retry-after"]) == (429, "2")


async def test_who_comes_back_late_hears_what_went_wrong() -> None:
    async with running_server(FakeEngine(fail_after=3)) as server:
        response = await server.http.post("/v1/completions", json={**COMPLETION, "resumable": True})
        for text in (response.text, (await resume(server, response.headers["x-stream-id"], 2)).text):
            *_, last = events_of(text)
            assert json.loads(last.data)["error"]["code"] == "request_failed"


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "MAX_BYTES", 10_000)
    async with running_server() as server:
        body = {**COMPLETION, "resumable": True, "max_tokens": 100}
        first = await server.http.post("/v1/completions", json=body)
        plain = await server.http.post("/v1/completions", json={**body, "resumable": False})
        events = events_of(first.text)
        assert len(events) == len(events_of(plain.text)) > 80  # a listener who keeps up misses nothing
        first_id = first.headers["x-stream-id"]
        expired = await resume(server, first_id, 1)
        assert (expired.status_code, expired.json()["error"]["code"]) == (410, "events_expired")
        assert events_of((await resume(server, first_id, 80)).text) == events[80:]
        await server.http.post("/v1/completions", json=body)
        assert (await resume(server, first_id, 80)).status_code == 404  # it made room for the second


async def test_streams_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "MAX_STREAMS", 2)
    async with running_server(FakeEngine(hold_after=1)) as server:
        body = {**COMPLETION, "resumable": True}
        ids = []
        for _ in range(2):
            connection = await Connection.open(server, "/v1/completions", body)
            ids.append(json.loads((await connection.read_events(1))[0].data)["id"])
        full = await server.http.post("/v1/completions", json=body)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "too_many_streams")
        server.engine.gate.set()
        assert (await resume(server, ids[0], 1)).status_code == 200  # it has ended when all of it has been told
        assert (await server.http.post("/v1/completions", json=body)).status_code == 200
        assert (await resume(server, ids[0], 1)).status_code == 404
        assert (await resume(server, ids[1], 1)).status_code == 200
