"""OpenAI's own client against a running server: every field, strictly valid responses, typed errors."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import chain
from typing import Any

import openai
import pytest
from fake_engine import BOS, STORY, FakeEngine, FakeModel
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from running import RunningServer, running_server

from aphrodite.chat.template import ChatTemplate
from aphrodite.errors import EngineDeadError, QueueFullError

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story."}]


async def completion(server: RunningServer, **fields: Any) -> Completion:
    """A completion that is valid to the letter."""
    raw = await server.client.completions.with_raw_response.create(model="fake/story", **fields)
    return Completion.model_validate(json.loads(raw.content), strict=True)


async def chat(server: RunningServer, **fields: Any) -> ChatCompletion:
    fields.setdefault("messages", MESSAGES)
    raw = await server.client.chat.completions.with_raw_response.create(model="fake/story", **fields)
    return ChatCompletion.model_validate(json.loads(raw.content), strict=True)


async def events(server: RunningServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The stream's chunks as JSON; the end mark is checked and left out."""
    async with server.http.stream("POST", path, json={**fields, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_models_are_listed_and_found(server: RunningServer) -> None:
    page = await server.client.models.list()
    assert [model.id for model in page.data] == ["fake/story", "story-alias"]
    raw = await server.http.get("/v1/models/fake/story")
    card = Model.model_validate(raw.json(), strict=True)
    assert card.id == "fake/story"
    assert raw.json()["sampling_defaults"] == {}
    assert (await server.client.models.retrieve("story-alias")).id == "story-alias"


async def test_completion_of_a_text(server: RunningServer) -> None:
    answer = await completion(server, prompt="Tell", max_tokens=17)
    assert answer.choices[0].text == STORY.encode()[:17].decode()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 17, 22)
    assert server.engine.seen[-1][0] == [BOS, *b"Tell"]


async def test_default_of_max_tokens_is_16_for_completions_and_open_for_chat(server: RunningServer) -> None:
    assert len((await completion(server, prompt="x")).choices[0].text) == 16
    answer = await chat(server)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (STORY, "stop")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("", [[BOS]]),
    ],
)
async def test_prompt_forms(server: RunningServer, prompt: Any, expected: list[list[int]]) -> None:
    answer = await completion(server, prompt=prompt, max_tokens=2)
    assert sorted(seen[0] for seen in server.engine.seen) == sorted(expected)
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))


async def test_null_prompt_is_an_empty_document(server: RunningServer) -> None:
    response = await server.http.post("/v1/completions", json={"prompt": None, "max_tokens": 1})
    assert response.status_code == 200
    assert server.engine.seen[-1][0] == [BOS]


async def test_answers_of_batches_are_numbered_by_prompt_then_answer(server: RunningServer) -> None:
    answer = await completion(server, prompt=["a", "b"], n=3, seed=5, max_tokens=4)
    assert [choice.index for choice in answer.choices] == list(range(6))
    story = STORY.encode()
    assert [c.text for c in answer.choices] == [story[5 + i : 9 + i].decode() for i in range(3)] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 24


async def test_streams_of_batches_equal_the_whole_answers(server: RunningServer) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "seed": 40, "max_tokens": 30}
    whole = await completion(server, **fields)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async for chunk in await server.client.completions.create(model="fake/story", stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == dict.fromkeys(range(4), "length")


async def test_chat_stream_opens_with_the_role_and_ends_with_usage(server: RunningServer) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 40, "stream_options": {"include_usage": True}}
    chunks = await events(server, "/v1/chat/completions", **fields)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert not chunk.keys() & {"error", "message", "detail"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 40
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
    assert text == (await chat(server, max_tokens=40)).choices[0].message.content
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_without_usage_no_chunk_has_the_key(server: RunningServer) -> None:
    chunks = await events(server, "/v1/completions", prompt="a", max_tokens=3)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_continuous_usage_counts_up(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await events(server, "/v1/completions", prompt="a", max_tokens=4, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


async def test_characters_of_several_tokens_arrive_whole(server: RunningServer) -> None:
    chunks = await events(server, "/v1/completions", prompt="a", max_tokens=300)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == STORY
    assert "🏰" in pieces
    assert "\ufffd" not in "".join(pieces)


async def test_stop_strings_end_the_answer(server: RunningServer) -> None:
    answer = await completion(server, prompt="a", max_tokens=200, stop=["nobody", "zzz"])
    assert answer.choices[0].text == STORY.partition("nobody")[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_dump()["stop_reason"] == "nobody"
    kept = await completion(
        server, prompt="a", max_tokens=200, stop="nobody", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text.endswith("nobody")


async def test_completion_logprobs_have_offsets_into_the_text(server: RunningServer) -> None:
    answer = await completion(server, prompt="a", max_tokens=60, logprobs=3)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert tokens is not None
    assert offsets is not None
    assert len(tokens) == len(offsets) == 60
    assert choice.logprobs.token_logprobs == [-0.25] * 60
    assert choice.logprobs.top_logprobs is not None
    assert all(
        len(top) == 3 and top[token] == -0.25 for token, top in zip(tokens, choice.logprobs.top_logprobs, strict=True)
    )
    for token, offset, following in zip(tokens, offsets, [*offsets[1:], len(choice.text)], strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset:following] == token
    assert "bytes:\\xf0" in tokens
    assert offsets == sorted(offsets)


async def test_streamed_logprobs_equal_the_whole_ones_with_one_token_a_chunk(server: RunningServer) -> None:
    fields = {"prompt": "a", "max_tokens": 17, "logprobs": 2}
    whole = (await completion(server, **fields)).choices[0].logprobs
    chunks = await events(server, "/v1/completions", **fields)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert all(len(piece["tokens"]) == 1 for piece in logprobs)
    assert whole is not None
    for key, value in whole.model_dump().items():
        assert list(chain.from_iterable(piece[key] for piece in logprobs)) == value


async def test_echo_with_logprobs_and_no_new_tokens_scores_the_prompt(server: RunningServer) -> None:
    """What lm-eval asks for to compute the likelihood of a text."""
    for prompt in ("héllo", [BOS, *"héllo".encode()]):
        fields = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        response = await server.http.post("/v1/completions", json=fields)
        choice = response.json()["choices"][0]
        assert choice["text"].endswith("héllo")
        assert choice["logprobs"]["token_logprobs"] == [None] + [-0.25] * 6
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["tokens"][:2] == ["<s>", "h"]
        start = len(choice["text"]) - 5
        assert choice["logprobs"]["text_offset"] == [0, *(start + i for i in (0, 1, 1, 2, 3, 4))]
        assert response.json()["usage"]["completion_tokens"] == 0


async def test_echo_puts_the_prompt_before_each_answer(server: RunningServer) -> None:
    fields: dict[str, Any] = {"prompt": ["Tell ", "Say "], "echo": True, "max_tokens": 4, "n": 2, "logprobs": 0}
    whole = (await server.http.post("/v1/completions", json=fields)).json()["choices"]
    assert [choice["text"] for choice in whole] == ["Tell Once"] * 2 + ["Say Once"] * 2
    chunks = await events(server, "/v1/completions", **fields)
    for expected in whole:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in own) == expected["text"]
        offsets = list(chain.from_iterable(piece["logprobs"]["text_offset"] for piece in own))
        assert offsets == expected["logprobs"]["text_offset"]


async def test_chat_logprobs_have_bytes_and_alternatives(server: RunningServer) -> None:
    answer = await chat(server, max_tokens=30, logprobs=True, top_logprobs=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(byte for row in logprobs.content for byte in row.bytes or ()) == STORY.encode()[:30]
    assert all(len(row.top_logprobs) == 4 and row.top_logprobs[0].token == row.token for row in logprobs.content)
    plain = await chat(server, max_tokens=3, logprobs=True)
    assert plain.choices[0].logprobs is not None
    assert [row.top_logprobs for row in plain.choices[0].logprobs.content or ()] == [[], [], []]


async def test_logprobs_that_are_not_finite_become_the_least(server: RunningServer, monkeypatch: Any) -> None:
    from aphrodite.core.plan import TokenLogprobs

    row = TokenLogprobs(1, -math.inf, 9, [2], [-math.inf])
    monkeypatch.setattr(FakeEngine, "_logprobs", lambda *_: row)
    answer = await completion(server, prompt="a", max_tokens=1, logprobs=1)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [-9999.0]


async def test_token_ids_come_back_when_asked_for(server: RunningServer) -> None:
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    fields = {"prompt": "a", "max_tokens": 3, "logprobs": 1, **extra}
    choice = (await server.http.post("/v1/completions", json=fields)).json()["choices"][0]
    assert choice["token_ids"] == list(b"Onc")
    assert choice["prompt_token_ids"] == [BOS, 97]
    assert choice["logprobs"]["tokens"] == ["token_id:79", "token_id:110", "token_id:99"]
    chunks = await events(server, "/v1/completions", **fields)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [BOS, 97]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[79], [110], [99]]
    body = (await server.http.post("/v1/chat/completions", json={"messages": MESSAGES, **extra})).json()
    assert bytes(body["prompt_token_ids"]).decode() == "user: Tell me a story.\nassistant:"


async def test_prompt_logprobs(server: RunningServer) -> None:
    answer = (
        await server.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 1, "prompt_logprobs": 1})
    ).json()
    rows = answer["choices"][0]["prompt_logprobs"]
    assert rows[0] is None
    assert rows[2] == {"98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}


async def test_sampler_fields_and_aliases_work_at_top_level_on_both_endpoints(server: RunningServer) -> None:
    extra = {"top_k": -1, "min_p": 0.1, "rep_pen": 1.2, "stopping_strings": ["x"], "min_tokens": 1, "ignore_eos": True}
    await completion(server, prompt="a", max_tokens=2, temperature=0.5, logit_bias={"65": -5}, extra_body=extra)
    await chat(server, max_completion_tokens=2, temperature=0.5, logit_bias={"65": -5}, extra_body=extra)
    first, second = (seen[1] for seen in server.engine.seen)
    assert first == second
    assert (first.top_k, first.min_p, first.repetition_penalty, first.stop) == (0, 0.1, 1.2, ("x",))
    assert (first.max_tokens, first.logit_bias, first.ignore_eos) == (2, {65: -5.0}, True)


async def test_every_sampling_parameter_is_accepted_on_both_endpoints(server: RunningServer) -> None:
    from aphrodite.sampling.fields import parameter_table

    for row in parameter_table():
        for name in (row.name, *row.param.aliases):
            if name in ("logprobs", "max_tokens") or row.name == "max_tokens":
                continue
            default = list(row.default) if isinstance(row.default, tuple) else row.default
            for path, start in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": MESSAGES})):
                response = await server.http.post(f"/v1/{path}", json={**start, "max_tokens": 1, name: default})
                assert response.status_code == 200, (name, response.text)
                assert "x-ignored-fields" not in response.headers


async def test_messages_reach_the_template_as_texts(server: RunningServer) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    await chat(server, messages=messages, max_tokens=1, extra_body={"chat_template_kwargs": {"mood": "dark"}})
    prompt = bytes(server.engine.seen[-1][0]).decode()
    assert prompt == (
        'system: Be brief.\nuser: one\ntwo\nassistant: <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        "user: <tool_response>\n42\n</tool_response>\n[mood=dark]\nassistant:"
    )


async def test_the_last_message_can_be_continued(server: RunningServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Once"}]
    await chat(server, messages=messages, max_tokens=1, extra_body={"continue_final_message": True})
    assert bytes(server.engine.seen[-1][0]).decode() == "user: Go\nassistant: Once"


async def test_truncation_keeps_the_end(server: RunningServer) -> None:
    await completion(server, prompt="abcdef", max_tokens=1, extra_body={"truncate_prompt_tokens": 2})
    assert server.engine.seen[-1][0] == [*b"ef"]
    await completion(server, prompt="a" * 600, max_tokens=12, extra_body={"truncate_prompt_tokens": -1})
    assert server.engine.seen[-1][0] == [97] * 500


async def test_priority_and_salt_reach_the_engine(server: RunningServer) -> None:
    await completion(server, prompt="a", max_tokens=1, extra_body={"priority": -3, "cache_salt": "me"})
    assert server.engine.seen[-1][2:] == (-3, "me")


async def test_model_may_be_left_out_and_answers_under_the_name_asked_for(server: RunningServer) -> None:
    body = (await server.http.post("/v1/completions", json={"prompt": "a"})).json()
    assert body["model"] == "fake/story"
    answer = await server.client.completions.create(model="story-alias", prompt="a")
    assert answer.model == "story-alias"


async def test_unknown_fields_are_named_in_a_header_and_harmless_ones_are_not(server: RunningServer) -> None:
    fields = {
        "prompt": "a", "max_tokens": 1, "api_server": "http://x", "dry_sequence_breakers": "[]", "evil\r\nx": 1,
        "user": "me", "store": False, "metadata": {}, "early_stopping": None, "guided_grammar": "", "tools": [],
    }  # fmt: skip
    for stream in (False, True):
        response = await server.http.post("/v1/completions", json={**fields, "stream": stream})
        assert response.status_code == 200
        ignored = response.headers["x-ignored-fields"].split(", ")
        assert "api_server" in ignored
        assert "?" in ignored
        assert not {"user", "store", "metadata", "early_stopping", "guided_grammar", "tools"} & set(ignored)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"n": 1, "best_of": 2}, "best_of"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
async def test_fields_that_would_change_the_answer_are_refused(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    response = await server.http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert response.json()["error"]["param"] == param


async def test_suffix_is_refused(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await completion(server, prompt="a", suffix="b")
    assert caught.value.param == "suffix"


async def test_typed_errors(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await server.client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    assert "fake/story" in missing.value.message
    with pytest.raises(openai.BadRequestError) as long:
        await completion(server, prompt="a" * 600)
    assert long.value.code == "context_length_exceeded"
    assert "512" in long.value.message
    with pytest.raises(openai.BadRequestError) as chat_long:
        await chat(server, messages=[{"role": "user", "content": "a" * 480}], max_tokens=100)
    assert (chat_long.value.code, chat_long.value.param) == ("context_length_exceeded", "messages")
    server.engine.refuse = QueueFullError("full", retry_after=3.0)
    with pytest.raises(openai.RateLimitError) as full:
        await completion(server, prompt="a")
    assert full.value.response.headers["retry-after"] == "3"
    assert full.value.code == "server_overloaded"
    server.engine.refuse = EngineDeadError("the engine process 7 has ended")
    with pytest.raises(openai.InternalServerError) as dead:
        await completion(server, prompt="a")
    assert dead.value.status_code == 503
    server.engine.refuse = ZeroDivisionError("/etc/passwd 0xabcdef12")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as bug:
            await server.client.completions.create(model="fake/story", prompt="a", stream=stream)
        assert bug.value.status_code == 500
        assert "passwd" not in bug.value.response.text
        assert bug.value.request_id is not None
        assert bug.value.request_id in bug.value.message


async def test_keys_are_typed_errors_too() -> None:
    async with running_server(api_keys=("secret",)) as server:
        assert (await completion(server, prompt="a")).choices
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                await stranger.models.list()
        assert caught.value.code == "invalid_api_key"


async def test_an_answer_that_fails_in_the_engine_says_so_without_details(server: RunningServer) -> None:
    server.engine.fail_after = 2
    with pytest.raises(openai.InternalServerError) as caught:
        await completion(server, prompt="a")
    assert "secret" not in caught.value.response.text
    assert caught.value.response.headers["x-should-retry"] == "false"
    chunks = await events(server, "/v1/completions", prompt="a")
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["O", "n"]
    assert chunks[-1]["error"]["code"] == "request_failed"
    with pytest.raises(openai.APIError, match="could not finish"):
        async for _ in await server.client.completions.create(model="fake/story", prompt="a", stream=True):
            pass


async def test_engine_death_in_mid_stream_is_the_last_event() -> None:
    async with running_server(FakeEngine(hold_after=3)) as server:
        stream = asyncio.ensure_future(events(server, "/v1/completions", prompt="a"))
        await server.engine.holding.wait()
        server.engine.dead.set()
        chunks = await stream
        assert len(chunks) == 4
        assert chunks[-1]["error"]["code"] == "engine_dead"
        assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}


async def test_a_silent_stream_is_pinged() -> None:
    async with running_server(FakeEngine(hold_after=0), ping_interval=0.02) as server:
        fields = {"prompt": "a", "max_tokens": 2, "stream": True}
        async with server.http.stream("POST", "/v1/completions", json=fields) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == ": ping"
            server.engine.gate.set()
            rest = [line async for line in lines if line and line != ": ping"]
        assert len(rest) == 3
        assert rest[-1] == "data: [DONE]"


async def test_a_generation_has_a_deadline() -> None:
    async with running_server(FakeEngine(hold_after=1), request_timeout=0.1) as server:
        response = await server.http.post("/v1/completions", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        chunks = await events(server, "/v1/completions", prompt="a")
        assert chunks[0]["choices"][0]["text"] == "O"
        assert chunks[-1]["error"]["code"] == "timeout"
        await server.engine.idle.wait()


async def test_a_templates_end_of_turn_ends_answers() -> None:
    loop = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    engine = FakeEngine(chat_template=ChatTemplate(loop))
    async with running_server(engine) as server:
        await chat(server, messages=MESSAGES, max_tokens=1, stop=["mine"])
        await chat(server, messages=MESSAGES, max_tokens=1, extra_body={"ignore_eos": True})
    assert [set(params.stop) for _, params, _, _ in engine.seen] == [{"mine", "<|im_end|>"}, set()]


async def test_documents_reach_a_template_that_shows_them() -> None:
    documents = {"documents": [{"title": "T", "text": "once"}]}
    source = "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}{{ messages[-1].content }}"
    engine = FakeEngine(chat_template=ChatTemplate(source))
    async with running_server(engine) as server:
        await chat(server, messages=MESSAGES[-1:], max_tokens=1, extra_body=documents)
        shown = server.engine.tokenizer.decode(engine.seen[0][0])
        assert shown == "[T: once]" + MESSAGES[-1]["content"]
    async with running_server() as server:
        with pytest.raises(openai.BadRequestError, match="does not show documents") as error:
            await chat(server, messages=MESSAGES, extra_body=documents)
        assert error.value.param == "documents"


async def test_names_can_be_set_for_serving() -> None:
    async with running_server(FakeEngine(FakeModel("gpt-4o", ()))) as server:
        assert [model.id for model in (await server.client.models.list()).data] == ["gpt-4o"]
        assert (await server.client.completions.create(model="gpt-4o", prompt="a")).model == "gpt-4o"


async def test_a_long_answer_of_a_wide_batch_is_complete() -> None:
    async with running_server(FakeEngine(FakeModel(max_model_len=2048))) as server:
        fields: dict[str, Any] = {"prompt": ["a"] * 20, "max_tokens": 110, "stream": True}
        texts: dict[int, str] = {}
        async for chunk in await server.client.completions.create(model="fake/story", **fields):
            texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
        assert list(texts.values()) == [STORY[: len(texts[0])]] * 20
