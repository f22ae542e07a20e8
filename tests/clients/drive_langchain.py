"""langchain-openai: invoke, stream, batch, tools and structured output, over chat and over /v1/responses.

python tests/clients/drive_langchain.py http://127.0.0.1:2242 [KEY]
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal

import openai
from checks import Checks, address, refusal, require
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict

URL, KEY = address()
TALK = [SystemMessage("You are brief."), HumanMessage("Name a city by the sea.")]


class Place(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Oslo", "Rome"]
    by_the_sea: bool


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"Rain in {city}"


def connect(name: str, **settings: Any) -> ChatOpenAI:
    settings = {"max_tokens": 60, "temperature": 0.5, "seed": 3, "stream_usage": True} | settings
    return ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120, **settings)


def answers(label: str, model: ChatOpenAI, check: Checks) -> None:
    with check(f"{label}: invoke, with usage"):
        answer = model.invoke(TALK)
        require(answer.text, answer)
        require(answer.usage_metadata["output_tokens"] > 0, answer.usage_metadata)
    with check(f"{label}: a stream is the whole answer"):
        chunks = list(model.stream(TALK))
        require("".join(chunk.text for chunk in chunks) == answer.text, chunks, answer)
        require(sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 0, chunks)
    with check(f"{label}: a batch"):
        require([one.text for one in model.batch([TALK, TALK])] == [answer.text] * 2)


def tools(label: str, model: ChatOpenAI, check: Checks) -> None:
    for choice in ("required", "get_weather"):
        with check(f"{label}: tools, {choice}"):
            answer = model.bind_tools([get_weather], tool_choice=choice).invoke(TALK)
            require(answer.tool_calls and answer.tool_calls[0]["args"]["city"] in ("Oslo", "Rome"), answer)
            results = [
                ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls
            ]
            require(isinstance(model.bind_tools([get_weather]).invoke([*TALK, answer, *results]), AIMessage))
    with check(f"{label}: a streamed tool"):
        whole: Any = None
        for chunk in model.bind_tools([get_weather], tool_choice="required").stream(TALK):
            whole = chunk if whole is None else whole + chunk
        require(whole.tool_calls[0]["args"]["city"] in ("Oslo", "Rome"), whole)


def structured(label: str, model: ChatOpenAI, check: Checks) -> None:
    for method in ("json_schema", "function_calling"):
        with check(f"{label}: structured output by {method}"):
            place = model.with_structured_output(Place, method=method).invoke(TALK)
            require(isinstance(place, Place), place)
    with check(f"{label}: strict structured output, streamed"):
        pieces = list(model.with_structured_output(Place, method="json_schema", strict=True).stream(TALK))
        require(isinstance(pieces[-1], Place), pieces)


def others(name: str, model: ChatOpenAI, check: Checks) -> None:
    with check("log-probabilities"):
        answer = model.bind(logprobs=True, top_logprobs=2).invoke(TALK)
        require(len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2, answer)
    with check("samplers in extra_body"):
        connect(name, extra_body={"min_p": 0.1, "repetition_penalty": 1.1}).invoke(TALK)
    with check("texts"):
        texts = OpenAI(model=name, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, max_tokens=8, seed=1)
        require("".join(texts.stream("The sea")) == texts.invoke("The sea"))
    with check("an unknown model"):
        refusal(openai.NotFoundError, lambda: connect("no-such-model").invoke(TALK))


def embeddings(name: str, check: Checks) -> None:
    with check("embeddings"):
        made = OpenAIEmbeddings(model=name, base_url=f"{URL}/v1", api_key=KEY, check_embedding_ctx_length=False)
        vectors = made.embed_documents(["The sea", "A hill"])
        require(len(vectors) == 2 and len(vectors[0]) == len(made.embed_query("The sea")), len(vectors))


def main() -> None:
    check = Checks(f"langchain-openai {version('langchain-openai')}")
    name = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0].id
    for label, model in (
        ("chat", connect(name)),
        ("responses", connect(name, use_responses_api=True, seed=None, temperature=0)),
    ):
        answers(label, model, check)
        tools(label, model, check)
        structured(label, model, check)
    others(name, connect(name), check)
    embeddings(name, check)
    check.end()


if __name__ == "__main__":
    main()
