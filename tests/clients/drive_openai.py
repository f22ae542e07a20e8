"""OpenAI's client, 2.x or 3.x, with its own strict validation of every answer.

python tests/clients/drive_openai.py http://127.0.0.1:2242 [KEY]
"""

from __future__ import annotations

import json
from typing import Any

import openai
from checks import Checks, address, refusal, require
from pydantic import BaseModel, ConfigDict

URL, KEY = address()
MESSAGES: list[Any] = [{"role": "user", "content": "Name a city by the sea."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


class Place(BaseModel):
    """A form for answers, small enough for a small model to come to its end."""

    model_config = ConfigDict(extra="forbid")

    name: str
    by_the_sea: bool


def connect(*, strict: bool) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120, _strict_response_validation=strict
    )


def models(client: openai.OpenAI) -> str:
    (name, *_) = [model.id for model in client.models.list()]
    require(client.models.retrieve(name).id == name)
    return name


def chats(client: openai.OpenAI, model: str, check: Checks) -> None:
    common: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "seed": 3}
    with check("a chat with n 3, log-probabilities and usage"):
        answer = client.chat.completions.create(**common, n=3, logprobs=True, top_logprobs=4)
        require([choice.index for choice in answer.choices] == [0, 1, 2])
        for choice in answer.choices:
            rows = choice.logprobs.content
            spoken = bytes(byte for row in rows for byte in row.bytes).decode(errors="replace")
            require(all(len(row.top_logprobs) == 4 for row in rows))
            require(choice.message.content in spoken, choice.message.content, spoken)
        require(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens)
    with check("a streamed chat is the whole one"):
        whole = client.chat.completions.create(**common).choices[0]
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(**common, stream=True, stream_options=options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        require(text == whole.message.content, text, whole.message.content)
        require(chunks[-1].usage.completion_tokens == 12 or whole.finish_reason == "stop")
    # The helper refuses answers that end at their length.
    with (
        check("its stream helper, n 2"),
        client.chat.completions.stream(
            **common, n=2, logprobs=True, extra_body={"guided_choice": ["By the sea.", "On a hill."]}
        ) as stream,
    ):
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
        require({"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds, kinds)
        require(len(final.choices) == 2)
    with check("samplers in extra_body"):
        extra = {"min_p": 0.05, "repetition_penalty": 1.1, "dry_multiplier": 0.8, "xtc_probability": 0.5, "top_k": 40}
        client.chat.completions.create(**common, stop=["zzz"], logit_bias={"5": -100}, extra_body=extra)
    with check("a raw answer brings a request id and no ignored fields"):
        raw = client.chat.completions.with_raw_response.create(**common, user="me", store=False, metadata={"a": "b"})
        require(raw.headers["x-request-id"] and "x-ignored-fields" not in raw.headers, dict(raw.headers))
        require(raw.parse()._request_id == raw.headers["x-request-id"])


def structured(client: openai.OpenAI, model: str, check: Checks) -> None:
    common: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 120, "temperature": 0}
    form = {"json_schema": {"name": "place", "schema": Place.model_json_schema()}, "type": "json_schema"}
    with check("JSON of a schema"):
        text = client.chat.completions.create(**common, response_format=form).choices[0].message.content
        Place.model_validate_json(text)
    with check("parse() with a pydantic class"):
        parsed = client.chat.completions.parse(**common, response_format=Place).choices[0].message.parsed
        require(isinstance(parsed, Place), parsed)
    with (
        check("a stream with a pydantic class"),
        client.chat.completions.stream(**common, response_format=Place) as stream,
    ):
        done = [event for event in stream if event.type == "content.done"]
        require(isinstance(done[0].parsed, Place), done)
    with check("any JSON object"):
        answer = client.chat.completions.create(
            **common, response_format={"type": "json_object"}, frequency_penalty=0.5, logit_bias={}
        ).choices[0]
        require(answer.message.content.lstrip().startswith("{"), answer)


def tools(client: openai.OpenAI, model: str, check: Checks) -> None:
    common: dict[str, Any] = {
        "model": model, "messages": MESSAGES, "max_completion_tokens": 100, "temperature": 0, "tools": [WEATHER, NOW],
    }  # fmt: skip
    named = {"type": "function", "function": {"name": "get_weather"}}
    with check("a tool by name, and its result"):
        answer = client.chat.completions.create(**common, tool_choice=named)
        (call,) = answer.choices[0].message.tool_calls
        require(set(json.loads(call.function.arguments)) == {"city", "days"}, call)
        require(answer.choices[0].finish_reason in ("tool_calls", "stop"), answer)
        talk = [*MESSAGES, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain"}]
        follow = client.chat.completions.create(**common | {"messages": talk}, tool_choice="none")
        require(follow.choices[0].message.content and not follow.choices[0].message.tool_calls, follow)
    with check("a call demanded"):
        answer = client.chat.completions.create(**common, tool_choice="required", parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls
        require(call.function.name in ("get_weather", "now") and call.id, call)
    with check("a call demanded, streamed by its helper"):
        with client.chat.completions.stream(**common, tool_choice=named) as stream:
            pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
            final = stream.get_final_completion().choices[0].message.tool_calls[0].function
        require("".join(piece.arguments_delta for piece in pieces) == final.arguments, pieces)
        require(set(final.parsed_arguments) == {"city", "days"}, final)
    with check("tools offered and not demanded"):
        answer = client.chat.completions.create(**common | {"max_completion_tokens": 10}).choices[0]
        require(answer.message.content is not None or answer.message.tool_calls, answer)


def completions(client: openai.OpenAI, model: str, check: Checks) -> None:
    """Its types deny what OpenAI itself sends: a stream's null finish_reason, an echo's first null log-probability."""
    lenient = connect(strict=False)
    common: dict[str, Any] = {"model": model, "max_tokens": 8, "seed": 1}
    with check("completions of texts and of token ids, n 3, log-probabilities"):
        answer = client.completions.create(**common, prompt=["The sea", "The hill"], n=3, logprobs=5)
        require([choice.index for choice in answer.choices] == list(range(6)))
        require(all(len(choice.logprobs.tokens) == 8 for choice in answer.choices))
        require(client.completions.create(**common, prompt=[504, 3941]).usage.prompt_tokens == 2)
    with check("a streamed completion is the whole one"):
        whole = client.completions.create(**common, prompt="The sea").choices[0].text
        stream = lenient.completions.create(**common, prompt="The sea", stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
        require(text == whole, text, whole)
    with check("an echo with log-probabilities"):
        answer = lenient.completions.create(**common | {"max_tokens": 0}, prompt="The sea", echo=True, logprobs=1)
        logprobs = answer.choices[0].logprobs
        require(answer.choices[0].text == "The sea" and logprobs.token_logprobs[-1] < 0, answer)


def embeddings(client: openai.OpenAI, model: str, check: Checks) -> None:
    with check("embeddings, packed as the client asks for them, and as numbers"):
        # Its strict validation looks at the numbers before it unpacks them.
        packed = connect(strict=False).embeddings.create(model=model, input=["The sea", "A hill"])
        plain = client.embeddings.create(model=model, input=["The sea", "A hill"], encoding_format="float")
        require([row.index for row in packed.data] == [0, 1] and packed.usage.prompt_tokens > 0, packed.usage)
        for first, second in zip(packed.data, plain.data, strict=True):
            require(max(abs(a - b) for a, b in zip(first.embedding, second.embedding, strict=True)) < 1e-5)


def responses(client: openai.OpenAI, model: str, check: Checks) -> None:
    common: dict[str, Any] = {"model": model, "max_output_tokens": 40, "temperature": 0}
    with check("a response, and one that follows it"):
        first = client.responses.create(**common, input="Name a city by the sea.", instructions="Be brief.")
        require(first.output_text and first.usage.output_tokens > 0, first)
        second = client.responses.create(**common, input="And another?", previous_response_id=first.id)
        require(second.previous_response_id == first.id and second.output_text, second)
        require(client.responses.retrieve(first.id).output_text == first.output_text)
    with check("a streamed response"), client.responses.stream(**common, input="Name a city.") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        require(stream.get_final_response().output_text == text, text)
    with check("a response with a pydantic class"):
        parsed = client.responses.parse(**common | {"max_output_tokens": 120}, input="A city.", text_format=Place)
        require(isinstance(parsed.output_parsed, Place), parsed)
    with check("a response with a tool"):
        flat = {"type": "function", **WEATHER["function"]}
        answer = client.responses.create(**common, input="Weather?", tools=[flat], tool_choice="required")
        call = next(item for item in answer.output if item.type == "function_call")
        require(json.loads(call.arguments)["city"] in ("Oslo", "Rome"), call)


def errors(client: openai.OpenAI, model: str, check: Checks) -> None:
    ask = client.chat.completions.create
    with check("errors are its exceptions"):
        missing = refusal(openai.NotFoundError, lambda: ask(model="no-such-model", messages=MESSAGES))
        require(missing.code == "model_not_found", missing)
        long = refusal(openai.BadRequestError, lambda: ask(model=model, messages=[{**MESSAGES[0], "content": BIG}]))
        require(long.code == "context_length_exceeded" and any(word.isdigit() for word in str(long).split()), long)
        wrong = refusal(openai.BadRequestError, lambda: ask(model=model, messages=MESSAGES, temperature="hot"))
        require(wrong.param == "temperature", wrong)


BIG = "word " * 100_000


def main() -> None:
    check = Checks(f"openai {openai.__version__}")
    client = connect(strict=True)
    model = ""
    with check("models"):
        model = models(client)
    for part in (chats, structured, tools, completions, embeddings, responses, errors):
        part(client, model, check)
    check.end()


if __name__ == "__main__":
    main()
