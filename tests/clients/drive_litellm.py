"""LiteLLM as a library: its openai, hosted_vllm, text completion, anthropic and ollama routes.

python tests/clients/drive_litellm.py http://127.0.0.1:2242 [KEY]
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from checks import Checks, address, refusal, require

URL, KEY = address()
MESSAGES = [{"role": "user", "content": "Name a city by the sea."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SHORT: dict[str, Any] = {"max_tokens": 12, "seed": 3, "timeout": 120}
ROUTES = {
    "openai": f"{URL}/v1",
    "hosted_vllm": f"{URL}/v1",
    "anthropic": URL,
    "ollama_chat": URL,
    "ollama": URL,
}


def name_of_model() -> str:
    from openai import OpenAI

    return str(OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0].id)


def chat(route: str, model: str, check: Checks) -> None:
    common: dict[str, Any] = {"model": f"{route}/{model}", "api_base": ROUTES[route], "api_key": KEY, **SHORT}
    if route == "anthropic":
        del common["seed"]  # Anthropic has none
    with check(f"{route}: a whole answer"):
        answer = litellm.completion(**common, messages=MESSAGES)
        require(answer.choices[0].message.content, answer)
        require(answer.usage.completion_tokens > 0 and answer.usage.prompt_tokens > 0, answer.usage)
    with check(f"{route}: a stream"):
        options = {"include_usage": True}
        chunks = list(litellm.completion(**common, messages=MESSAGES, stream=True, stream_options=options))
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        require(built.choices[0].message.content, built)
        if "seed" in common:
            require(built.choices[0].message.content == answer.choices[0].message.content, built, answer)
        require(built.usage.completion_tokens == answer.usage.completion_tokens, built.usage, answer.usage)
    with check(f"{route}: an unknown model is its exception"):
        wrong = common | {"model": f"{route}/no-such-model"}
        refused = (litellm.NotFoundError, litellm.BadRequestError, litellm.APIConnectionError)
        error = refusal(refused, lambda: litellm.completion(**wrong, messages=MESSAGES))  # type: ignore[arg-type]
        require("no-such-model" in str(error), error)


def tools(route: str, model: str, check: Checks) -> None:
    common: dict[str, Any] = {
        "model": f"{route}/{model}", "api_base": ROUTES[route], "api_key": KEY, "max_tokens": 80, "temperature": 0,
        "tools": [WEATHER], "tool_choice": NAMED,
    }  # fmt: skip
    with check(f"{route}: a tool, and its result"):
        message = litellm.completion(**common, messages=MESSAGES).choices[0].message
        (call,) = message.tool_calls
        require(json.loads(call.function.arguments)["city"] in ("Oslo", "Rome"), call)
        result = {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "Rain"}
        talk = [*MESSAGES, message.model_dump(), result]
        follow = litellm.completion(**common | {"messages": talk, "tool_choice": "auto", "max_tokens": 10})
        require(follow.choices[0].finish_reason, follow)
    with check(f"{route}: a streamed tool"):
        chunks = list(litellm.completion(**common, messages=MESSAGES, stream=True))
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0]
        require(json.loads(built.message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome"), built)


def structured(route: str, model: str, check: Checks) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "weather", "schema": WEATHER["function"]["parameters"]},  # type: ignore[index]
    }
    with check(f"{route}: JSON of a schema"):
        answer = litellm.completion(
            model=f"{route}/{model}", api_base=ROUTES[route], api_key=KEY, max_tokens=80, messages=MESSAGES,
            response_format=form,
        )  # fmt: skip
        require(json.loads(answer.choices[0].message.content)["city"] in ("Oslo", "Rome"), answer)


def texts(model: str, check: Checks) -> None:
    common: dict[str, Any] = {"model": f"text-completion-openai/{model}", "api_base": f"{URL}/v1", "api_key": KEY}
    with check("text completion"):
        answer = litellm.text_completion(**common, prompt="The sea", logprobs=2, n=2, **SHORT)
        require(len(answer.choices) == 2 and len(answer.choices[0].logprobs.tokens) == 12, answer)
    with check("text completion, streamed"):
        chunks = list(litellm.text_completion(**common, prompt="The sea", stream=True, **SHORT))
        require("".join(chunk.choices[0].text or "" for chunk in chunks) == answer.choices[0].text, chunks)
    with check("samplers pass through"):
        litellm.text_completion(**common, prompt="The sea", extra_body={"min_p": 0.1, "dry_multiplier": 0.8}, **SHORT)


def others(model: str, check: Checks) -> None:
    common: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": KEY}
    for route in ("openai", "hosted_vllm"):
        with check(f"{route}: embeddings"):
            answer = litellm.embedding(model=f"{route}/{model}", input=["The sea", "A hill"], **common)
            require(len(answer.data) == 2 and answer.usage.prompt_tokens > 0, answer.usage)
    with check("openai: a response"):
        response = litellm.responses(model=f"openai/{model}", input="Name a city.", max_output_tokens=16, **common)
        require(response.output[0].content[0].text, response)


def main() -> None:
    check = Checks(f"litellm {version('litellm')}")
    model = name_of_model()
    for route in ROUTES:
        chat(route, model, check)
    for route in ("openai", "hosted_vllm", "anthropic"):
        tools(route, model, check)
    for route in ("openai", "hosted_vllm", "ollama_chat"):
        structured(route, model, check)
    texts(model, check)
    others(model, check)
    check.end()


if __name__ == "__main__":
    main()
