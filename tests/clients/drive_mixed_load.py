"""Grammars beside plain chats: do answers that have to be JSON of a schema, or tool calls, hold the others up?

    python tests/clients/drive_mixed_load.py http://127.0.0.1:2242 [KEY]

Eight streams with the `roleplay` preset, while eight others ask again and again: first freely, then for JSON of a
schema that no request had before, or demanding a tool call. The prompts, and so what the plain streams wait for while
they are computed, are of the same kind both times. The plain streams' 99th percentile of the time between tokens may
grow by no more than half. Needs httpx.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Any

import httpx
from checks import Checks, address, require

URL, KEY = address()
STREAMS, TOKENS, ROUNDS = 8, 128, 3
MOST = 1.5
NUMBERS = itertools.count(time.time_ns() % 1_000_000)


def plain_body(number: int) -> dict[str, Any]:
    talk = [{"role": "user", "content": f"You are captain {number} of a small ship. Tell me of the storm."}]
    fixed = {"preset": "roleplay", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    return {"messages": talk, "seed": number, **fixed}


def other_body(*, bound: bool) -> dict[str, Any]:
    """A question with a tool that is new to the server, or `bound` to a new schema."""
    number = next(NUMBERS)
    sailor = {"type": "object", "properties": {"age": {"type": "integer"}}}
    schema = {
        "type": "object",
        "properties": {
            f"name_{number}": {"type": "string", "maxLength": 40},
            "mood": {"enum": [f"mood {number} {index}" for index in range(20)]},
            "crew": {"type": "array", "items": sailor, "maxItems": 4},
        },
        "required": [f"name_{number}", "mood", "crew"],
        "additionalProperties": False,
    }
    talk = [{"role": "user", "content": f"Describe ship {number}."}]
    body = {"messages": talk, "max_tokens": TOKENS, "stream": True}
    if number % 2:
        tool = {"type": "function", "function": {"name": f"describe_{number}", "parameters": schema}}
        return body | {"tools": [tool], "tool_choice": "required" if bound else "auto"}
    if not bound:
        return body | {"ignore_eos": True}
    return body | {"response_format": {"type": "json_schema", "json_schema": {"name": "ship", "schema": schema}}}


async def stream(http: httpx.AsyncClient, body: dict[str, Any]) -> list[float]:
    """Seconds between an answer's chunks."""
    gaps: list[float] = []
    last: float | None = None
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        require(response.status_code == 200, (await response.aread())[:300] if response.is_error else b"")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            require("error" not in json.loads(line[6:]), line[:300])
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now
    return gaps


async def plain(http: httpx.AsyncClient, count: int) -> list[float]:
    """Gaps of all rounds, the first of each answer left out: it has the role only."""
    gaps: list[float] = []
    for turn in range(ROUNDS):
        answers = await asyncio.gather(*(stream(http, plain_body(turn * STREAMS + one)) for one in range(count)))
        gaps += [gap for answer in answers for gap in answer[1:]]
    return gaps


async def others(http: httpx.AsyncClient, done: asyncio.Event, *, bound: bool) -> int:
    """The other answers until `done`; how many."""
    finished = 0
    while not done.is_set():
        await stream(http, other_body(bound=bound))
        finished += 1
    return finished


async def beside(http: httpx.AsyncClient, label: str, *, bound: bool) -> float:
    """The plain streams' 99th percentile beside the others, in milliseconds."""
    done = asyncio.Event()
    tasks = [asyncio.ensure_future(others(http, done, bound=bound)) for _ in range(STREAMS)]
    high = told(label, await plain(http, STREAMS))
    done.set()
    print(f"    {sum(await asyncio.gather(*tasks))} other answers meanwhile")
    return high


def told(label: str, gaps: list[float]) -> float:
    """The 99th percentile in milliseconds."""
    ordered = sorted(gap * 1000 for gap in gaps)
    middle, high = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    print(f"    {label}: between tokens {middle:.1f} ms, p99 {high:.1f}, longest {ordered[-1]:.1f}")
    return high


async def measure(check: Checks) -> None:
    limits = httpx.Limits(max_connections=64)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=URL, timeout=300, limits=limits, headers=headers) as http:
        await asyncio.gather(*(stream(http, plain_body(number)) for number in range(STREAMS)))  # warms up
        with check(f"{STREAMS} plain streams beside {STREAMS} under grammars"):
            free = await beside(http, "beside free answers", bound=False)
            held = await beside(http, "beside grammars", bound=True)
            require(held <= MOST * free, held, free)


def main() -> None:
    check = Checks("mixed load")
    asyncio.run(measure(check))
    check.end()


if __name__ == "__main__":
    main()
