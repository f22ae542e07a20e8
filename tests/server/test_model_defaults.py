"""What the model's authors recommend holds on every endpoint, field by field, until a request says otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine, FakeModel
from running import running_server

from aphrodite.sampling.params import SamplingParams

RECOMMENDED = SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "Tell"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell"}]}),
    ],
)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.6, 20, 1.1)),
        ({"temperature": None, "top_p": 0.5}, (0.6, 20, 1.1)),
        ({"temperature": 1.0}, (1.0, 20, 1.1)),  # named, though it is the general default
        ({"temperature": 0, "top_k": -1, "rep_pen": 1.0}, (0.0, 0, 1.0)),
    ],
)
async def test_a_requests_own_values_win(
    path: str, prompt: dict[str, Any], fields: dict[str, Any], expected: tuple[float, int, float]
) -> None:
    engine = FakeEngine()
    engine.model = FakeModel(sampling_defaults=RECOMMENDED)
    async with running_server(engine) as server:
        response = await server.http.post(path, json={**prompt, "max_tokens": 2, **fields})
        assert response.status_code == 200, response.text
    params = engine.seen[-1][1]
    assert (params.temperature, params.top_k, params.repetition_penalty) == expected
    assert params.top_p == fields.get("top_p", 1.0)
    assert params.max_tokens == 2
