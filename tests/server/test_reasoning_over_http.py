"""Reasoning split from chat answers, through OpenAI's client."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from running import running_server
from scripted import ScriptedEngine, marked_tokenizer

from aphrodite.chat.answer import AnswerFormat
from aphrodite.sampling.table import ReasoningMarks
from aphrodite.server.openai.answers import AnswerReader
from aphrodite.server.openai.tools import ToolUse

MESSAGES = [{"role": "user", "content": "2+2?"}]
THOUGHT = "<think>\nTwo and [TOOL_CALLS]two.\n</think>\n\nFour."


async def ask(server: Any, **fields: Any) -> ChatCompletion:
    answer = await server.client.chat.completions.create(model="fake/story", messages=MESSAGES, **fields)
    return ChatCompletion.model_validate(answer.model_dump(), strict=True)


async def test_whole_answers_have_reasoning_beside_their_text() -> None:
    async with running_server(ScriptedEngine("qwen-3", THOUGHT)) as server:
        answer = await ask(server)
    message = answer.choices[0].message
    assert message.content == "Four."
    assert message.reasoning_content == message.reasoning == "Two and two."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("\nTwo and two.\n") + 3


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
async def test_templates_get_reasoning_that_comes_back(name: str) -> None:
    earlier = [*MESSAGES, {"role": "assistant", "content": "Four.", name: "Two twice."}]
    engine = ScriptedEngine("seed-oss", "Nine.")
    async with running_server(engine) as server:
        messages: Any = [*earlier, {"role": "user", "content": "3*3?"}]
        await server.client.chat.completions.create(model="fake/story", messages=messages)
    assert "<seed:think>Two twice.</seed:think>\nFour." in engine.prompt


@pytest.mark.parametrize("details", [{}, {"logprobs": True}, {"n": 2}])
async def test_streams_bring_reasoning_first(details: dict[str, Any]) -> None:
    chunks: list[ChatCompletionChunk] = []
    async with running_server(ScriptedEngine("qwen-3", THOUGHT)) as server:
        stream = await server.client.chat.completions.create(
            model="fake/story", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **details
        )
        async for chunk in stream:
            chunks.append(ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True))
    for index in range(details.get("n", 1)):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        thoughts = "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in choices)
        text = "".join(choice.delta.content or "" for choice in choices)
        assert (thoughts, text) == ("Two and two.", "Four.")
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
        if "logprobs" in details:
            named = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
            assert len(named) == chunks[-1].usage.completion_tokens
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == details.get("n", 1) * 17


async def test_what_opens_or_leaves_out_reasoning() -> None:
    engine = ScriptedEngine("deepseek-r1", "Two.</think>Four.")  # whose prompt ends with <think>
    async with running_server(engine) as server:
        message = (await ask(server)).choices[0].message
        assert (message.reasoning, message.content) == ("Two.", "Four.")
        message = (await ask(server, extra_body={"include_reasoning": False})).choices[0].message
        assert message.content == "Four."
        assert not hasattr(message, "reasoning")
        none = await ask(server, reasoning_effort="none")  # the template cannot, so the sampler closes it
        assert not hasattr(none, "warnings")
        assert engine.seen[-1][1].thinking_token_budget == 0
        assert engine.seen[-1][1].reasoning == ReasoningMarks("<think>", "</think>", True)


async def test_a_parser_is_chosen_at_start() -> None:
    async with running_server(ScriptedEngine("chatml", THOUGHT), reasoning_parser="think") as server:
        assert (await ask(server)).choices[0].message.content == "Four."
    async with running_server(ScriptedEngine("qwen-3", THOUGHT), reasoning_parser="none") as server:
        message = (await ask(server)).choices[0].message
        assert message.content == "\nTwo and two.\n\n\nFour."  # special tokens are left out
        assert not hasattr(message, "reasoning")


async def test_effort_and_continued_answers() -> None:
    engine = ScriptedEngine("qwen-3", "Four.")
    async with running_server(engine) as server:
        await ask(server, reasoning_effort="none")
        assert engine.prompt.endswith("<think>\n\n</think>\n\n")
        await ask(server, reasoning_effort="high")
        assert not engine.prompt.endswith("</think>\n\n")
        warned = await ask(server, reasoning_effort="low")
        assert not hasattr(warned, "warnings")
        engine.text = " more.</think>Four."
        begun = [*MESSAGES, {"role": "assistant", "content": "<think>Some"}]
        answer = await server.client.chat.completions.create(
            model="fake/story", messages=begun, extra_body={"continue_final_message": True}
        )
        assert (answer.choices[0].message.reasoning, answer.choices[0].message.content) == ("more.", "Four.")
    engine = ScriptedEngine("gpt-oss", "<|channel|>analysis<|message|>Hm.<|end|>")
    async with running_server(engine) as server:
        assert (await ask(server, reasoning_effort="xhigh")).choices[0].message.reasoning == "Hm."
        assert "Reasoning: high" in engine.prompt
    async with running_server() as server:
        assert "says nothing of reasoning" in (await ask(server, reasoning_effort="low")).warnings[0]


BUDGET = {"extra_body": {"thinking_token_budget": 7}}


async def seen(server: Any, **fields: Any) -> tuple[int | None, ReasoningMarks | None]:
    """The budget and the marks that a request brings to the engine."""
    await ask(server, **fields)
    params = server.engine.seen[-1][1]
    return params.thinking_token_budget, params.reasoning


async def test_a_budget_comes_with_the_marks_that_end_it() -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Four"}]
    async with running_server(ScriptedEngine("qwen-3", "Four.")) as server:
        assert await seen(server, **BUDGET) == (7, ReasoningMarks("<think>", "</think>", False))
        assert await seen(server) == (None, None)
        thinking = {"chat_template_kwargs": {"enable_thinking": False}} | BUDGET["extra_body"]
        assert await seen(server, extra_body=thinking) == (7, ReasoningMarks("<think>", "</think>", False))
        assert await seen(server, reasoning_effort="none") == (None, None)  # the template turns it off
        chosen = {"guided_choice": ["Four."]} | BUDGET["extra_body"]
        assert await seen(server, extra_body=chosen) == (None, None)  # no reasoning fits
        answer = await server.client.chat.completions.create(
            model="fake/story", messages=begun, extra_body={"continue_final_message": True} | BUDGET["extra_body"]
        )
        assert answer.choices[0].message.content == "Four."
        assert server.engine.seen[-1][1].thinking_token_budget is None
        refused = await server.http.post(
            "/v1/chat/completions",
            json={"model": "fake/story", "messages": MESSAGES, "thinking_token_budget": "many"},
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "thinking_token_budget")
    async with running_server(ScriptedEngine("deepseek-r1", "Two.</think>[]")) as server:
        assert await seen(server, **BUDGET) == (7, ReasoningMarks("<think>", "</think>", True))
        schema = {"guided_json": {"type": "array"}} | BUDGET["extra_body"]
        assert await seen(server, extra_body=schema) == (7, ReasoningMarks("<think>", "</think>", True))
    async with running_server(ScriptedEngine("gpt-oss", "<|channel|>analysis<|message|>Hm.")) as server:
        budget, marks = await seen(server, **BUDGET)
        assert marks is not None
        assert (budget, marks.start, marks.end) == (7, "<|channel|>analysis<|message|>", "<|end|>")
        assert marks.last_end.endswith("final<|message|>")


async def test_templates_that_tell_of_budgets_are_told() -> None:
    template = "{{ messages[-1].content }}{% if thinking_budget %} [{{ thinking_budget }}]{% endif %}<think></think>"
    engine = ScriptedEngine(template, "Four.")
    async with running_server(engine) as server:
        await ask(server, **BUDGET)
        assert engine.prompt.startswith("2+2? [7]")


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/completions", "prompt"), ("/completion", "prompt"), ("/api/v1/generate", "prompt")],
)
async def test_budgets_where_a_text_goes_on(path: str, prompt: str) -> None:
    """Raw text stays raw: its marks are in it."""
    engine = ScriptedEngine("qwen-3", "Two.</think>Four.")
    async with running_server(engine) as server:
        for text, is_open in (("2+2?<think>Hm, ", True), ("<think>a</think>", False), ("2+2?", False)):
            body = {prompt: text, "thinking_token_budget": 7}
            answer = (await server.http.post(path, json=body)).json()
            assert "warnings" not in answer
            assert engine.seen[-1][1].reasoning == ReasoningMarks("<think>", "</think>", is_open)
        await server.http.post(path, json={prompt: "x"})
        assert engine.seen[-1][1].reasoning is None
    async with running_server(ScriptedEngine("chatml", "Four.")) as server:
        answer = (await server.http.post(path, json={prompt: "2+2?", "thinking_token_budget": 7})).json()
        assert "says nothing of reasoning" in answer["warnings"][0]
        warned = await ask(server, **BUDGET)
        assert "says nothing of reasoning" in warned.warnings[0]


def test_a_tokenizer_goes_with_its_model() -> None:
    tokenizer = marked_tokenizer.__wrapped__()
    AnswerReader(AnswerFormat(), tokenizer, [], tools=ToolUse(), show_special=False, include_reasoning=True)
    left = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert left() is None
