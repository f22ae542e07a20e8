"""What both endpoints say about sampling: traces of tokens, and warnings about doubtful fields."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import STORY

from aphrodite.sampling.fields import canonical_names
from aphrodite.server.openai import warnings
from aphrodite.server.openai.protocol import ChatFields, CompletionFields
from aphrodite.server.openai.warnings import MAX_WARNINGS, field_warnings

if TYPE_CHECKING:
    from running import RunningServer

ENDPOINTS = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}

# All that SillyTavern sends to an Aphrodite server, with the values of its defaults where they matter.
SILLYTAVERN: dict[str, Any] = {
    "max_new_tokens": 4, "max_tokens": 4, "temperature": 0.7, "top_p": 0.5, "typical_p": 1, "typical": 1,
    "sampler_seed": -1, "min_p": 0, "repetition_penalty": 1.2, "frequency_penalty": 0, "presence_penalty": 0,
    "top_k": 40, "skew": 0, "min_tokens": 0, "add_bos_token": True, "smoothing_factor": 0, "smoothing_curve": 1,
    "dry_allowed_length": 2, "dry_multiplier": 0, "dry_base": 1.75, "dry_sequence_breakers": '["\\n", ":"]',
    "dry_penalty_last_n": 0, "max_tokens_second": 0, "stopping_strings": ["zzz"], "stop": ["zzz"],
    "truncation_length": 2048, "ban_eos_token": False, "skip_special_tokens": True, "include_reasoning": True,
    "top_a": 0, "tfs": 1, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "custom_token_bans": [],
    "banned_strings": [], "api_type": "aphrodite", "api_server": "http://127.0.0.1:2242",
    "sampler_order": [6, 0, 1, 3, 4, 2, 5], "xtc_threshold": 0.1, "xtc_probability": 0, "nsigma": 0,
    "top_n_sigma": 0, "min_keep": 0, "adaptive_target": -0.01, "adaptive_decay": 0.9, "n": 1,
    "temperature_last": True, "eta_cutoff": 0, "epsilon_cutoff": 0, "ignore_eos": False,
    "spaces_between_special_tokens": True, "early_stopping": False, "include_stop_str_in_output": False,
    "dynatemp_min": 0, "dynatemp_max": 0, "dynatemp_exponent": 1, "no_repeat_ngram_size": 0, "logit_bias": {},
}  # fmt: skip


async def chunks(server: RunningServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = await server.http.post(path, json={**ENDPOINTS[path], **fields, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def whole(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    response = await server.http.post(path, json={**ENDPOINTS[path], **fields})
    assert response.status_code == 200, response.text
    return response.json()


def check_trace(trace: list[dict[str, Any]], text: str) -> None:
    assert "".join(token["token"] for token in trace) == text
    for token in trace:
        assert token["token_id"] == ord(token["token"])
        assert token["selection"] == "drawn"
        assert token["why"].startswith("The only candidate left; ")
        assert (token["model"]["candidates"], token["model"]["rank"], token["model"]["probability"]) == (258, 2, 0.25)
        assert [entry["probability"] for entry in token["model"]["top"]] == [0.5, 0.25]
        (stage,) = token["stages"]
        assert stage["stage"] == "xtc"
        assert (stage["candidates_before"], stage["candidates"]) == (258, 1)
        assert (stage["rank_before"], stage["rank"]) == (2, 1)
        assert stage["top"] == [{"token": token["token"], "token_id": token["token_id"], "probability": 1.0}]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_trace_comes_with_each_token(server: RunningServer, path: str) -> None:
    body = await whole(server, path, max_tokens=8, n=2, sampler_trace=True)
    assert len(body["choices"]) == 2
    for choice in body["choices"]:
        check_trace(choice["sampler_trace"], STORY[:8])
    streamed: list[dict[str, Any]] = []
    for chunk in await chunks(server, path, max_tokens=8, sampler_trace=True):
        for choice in chunk["choices"]:
            if choice.get("sampler_trace"):
                text = choice["text"] if "text" in choice else choice["delta"]["content"]
                check_trace(choice["sampler_trace"], text)
                streamed += choice["sampler_trace"]
    check_trace(streamed, STORY[:8])


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_without_it_there_is_no_such_key(server: RunningServer, path: str) -> None:
    body = await whole(server, path, max_tokens=4)
    assert "sampler_trace" not in body["choices"][0]
    assert "warnings" not in body
    for chunk in await chunks(server, path, max_tokens=4):
        assert "sampler_trace" not in chunk["choices"][0]
        assert "warnings" not in chunk


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_the_text_of_a_stop_string_takes_its_trace_along(server: RunningServer, path: str) -> None:
    body = await whole(server, path, max_tokens=40, sampler_trace=True, stop=["upon"])
    check_trace(body["choices"][0]["sampler_trace"], "Once ")


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_doubtful_field_is_named_in_the_answer(server: RunningServer, path: str) -> None:
    fields = {"max_tokens": 4, "temprature": 0.5, "penalty_alpha": 0.6, "something": 1}
    expected = [
        "`temprature` is not a known field; it was ignored. Did you mean `temperature`?",
        "`penalty_alpha` (contrastive search) is not supported; it was ignored.",
    ]
    assert (await whole(server, path, **fields))["warnings"] == expected
    first, *others = await chunks(server, path, **fields)
    assert first["warnings"] == expected
    assert others
    for chunk in (first, *others):  # SillyTavern takes a chunk with one of these for an error
        assert not {"error", "message", "detail"} & chunk.keys()
    assert not any("warnings" in chunk for chunk in others)
    texts = [
        choice.get("text") or choice.get("delta", {}).get("content")
        for chunk in (first, *others)
        for choice in chunk["choices"]
    ]
    assert "".join(text or "" for text in texts) == STORY[:4]


async def test_a_warning_comes_once_a_stream_of_many_answers(server: RunningServer) -> None:
    found = await chunks(server, "/v1/completions", max_tokens=4, n=3, minP=0.1)
    assert sum("warnings" in chunk for chunk in found) == 1
    assert "warnings" in found[0]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_what_sillytavern_sends_is_taken_without_a_word(server: RunningServer, path: str) -> None:
    body = await whole(server, path, **SILLYTAVERN)
    assert "warnings" not in body


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("top-p", "top_p"),
        ("topP", "top_p"),
        ("min_pp", "min_p"),
        ("repitition_penalty", "repetition_penalty"),
        ("freqency_penalty", "frequency_penalty"),
        ("dry_multipler", "dry_multiplier"),
        ("max_token", "max_tokens"),
    ],
)
def test_slips_are_recognized(name: str, near: str) -> None:
    assert field_warnings({name: 1}, ChatFields) == [
        f"`{name}` is not a known field; it was ignored. Did you mean `{near}`?"
    ]


def test_nothing_that_is_known_is_doubted() -> None:
    known = dict.fromkeys([*canonical_names(), *CompletionFields.model_fields, "user", "tools", "grammar"], 7)
    assert field_warnings(known, CompletionFields) == []


@pytest.mark.parametrize("name", ["foo", "x", "", "prompt_id", "character", "💥", "a" * 5000])
def test_other_fields_are_not_meant_to_be_samplers(name: str) -> None:
    assert field_warnings({name: 1}, ChatFields) == []


def test_a_supported_parameter_is_never_called_unsupported() -> None:
    for name in canonical_names():
        assert field_warnings({name: 123}, CompletionFields) == []


def test_many_slips_are_bounded_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "_logged", set())
    monkeypatch.setattr(logging.getLogger("aphrodite"), "propagate", True)
    fields = {f"temperatur{number}": 1 for number in range(50)}
    with caplog.at_level(logging.WARNING, logger="aphrodite"):
        assert len(field_warnings(fields, ChatFields)) == MAX_WARNINGS
        assert len(field_warnings(fields, ChatFields)) == MAX_WARNINGS
    assert len(caplog.records) == MAX_WARNINGS
