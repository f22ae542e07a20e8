"""llama.cpp's `/completion` as its clients use it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import BOS, STORY
from running import RunningServer


async def test_a_whole_answer(server: RunningServer) -> None:
    body = {
        "prompt": "Tell", "n_predict": 9, "temperature": 0.5, "repeat_penalty": 1.1, "repeat_last_n": 64, "typ_p": 0.9,
        "dry_penalty_last_n": 100, "mirostat": 0, "samplers": ["top_k", "temperature"], "cache_prompt": True,
    }  # fmt: skip
    response = await server.http.post("/completion", json=body)
    answer = response.json()
    assert (answer["content"], answer["stop"], answer["stop_type"]) == (STORY[:9], True, "limit")
    assert (answer["tokens_predicted"], answer["tokens_evaluated"], answer["tokens"]) == (9, 5, [])
    assert "x-ignored-fields" not in response.headers
    token_ids, params = server.engine.seen[-1][:2]
    assert token_ids == [BOS, *b"Tell"]
    assert (params.temperature, params.repetition_penalty, params.repetition_penalty_range) == (0.5, 1.1, 64)
    assert (params.typical_p, params.dry_range, params.sampler_priority) == (0.9, 100, ("top_k", "temperature"))


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"n_predict": -1}, "eos", ""),
        ({}, "eos", ""),
        ({"stop": ["time"]}, "word", "time"),
        ({"n_predict": 3}, "limit", ""),
    ],
)
async def test_why_it_ended(server: RunningServer, fields: dict[str, Any], kind: str, word: str) -> None:
    answer = (await server.http.post("/completion", json={"prompt": "x", **fields})).json()
    assert (answer["stop_type"], answer["stopping_word"]) == (kind, word)


async def test_a_stream_is_the_whole_in_pieces(server: RunningServer) -> None:
    body = {"prompt": [97, 98], "n_predict": 40, "stream": True, "n_probs": 2}
    text = (await server.http.post("/completion", json=body)).text
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert "".join(piece["content"] for piece in pieces) == STORY.encode()[:40].decode()
    assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    rows = [row for piece in pieces for row in piece["completion_probabilities"]]
    assert [row["id"] for row in rows] == list(STORY.encode()[:40])
    assert all(len(row["top_logprobs"]) == 2 for row in rows)
    assert pieces[-1]["timings"]["predicted_n"] == 40
    assert server.engine.seen[-1][0] == [97, 98]


async def test_several_answers_are_a_list_and_streamed_by_index(server: RunningServer) -> None:
    body = {"prompt": "x", "n_predict": 5, "n": 3}
    whole = (await server.http.post("/completion", json=body)).json()
    assert [answer["index"] for answer in whole] == [0, 1, 2]
    assert all(answer["stop"] and answer["tokens_predicted"] == 5 for answer in whole)
    text = (await server.http.post("/completion", json={**body, "stream": True})).text
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    for answer in whole:
        mine = [piece for piece in pieces if piece["index"] == answer["index"]]
        assert "".join(piece["content"] for piece in mine) == answer["content"]
        assert [piece["stop"] for piece in mine] == [False] * (len(mine) - 1) + [True]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "x", "n_probs": -1}, "n_probs"),
        ({"prompt": "x", "n_predict": "many"}, "n_predict"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
    ],
)
async def test_errors_name_the_field(server: RunningServer, body: dict[str, Any], param: str) -> None:
    response = await server.http.post("/completion", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not server.engine.seen
