"""The agent frameworks that speak `/v1/responses`: openai-agents (tried: 0.24.0) and pydantic-ai (2.68.0).

pip install openai-agents 'pydantic-ai-slim[openai]'
python tests/clients/drive_agents.py http://127.0.0.1:2242 [KEY]
"""

from __future__ import annotations

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import Checks, address, require
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.models.openai import OpenAIResponsesModel as PydanticModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, KEY = address()
City = Literal["Oslo", "Rome"]
ASKED: list[str] = []


class Place(BaseModel):
    city: City


@function_tool
def get_weather(city: City) -> str:
    """The weather of a city."""
    ASKED.append(city)
    return "Rain"


async def openai_agents(client: AsyncOpenAI, name: str, check: Checks) -> None:
    model = OpenAIResponsesModel(model=name, openai_client=client)
    # An answer that is cut off counts as an error there, so a stop has to end it.
    short = ModelSettings(max_tokens=400, temperature=0.0, extra_body={"stop": [".", ",", "\n"]})
    plain = Agent(name="plain", instructions="Be brief.", model=model, model_settings=short)
    with check("agents: an answer, and another that goes on from it on the server"):
        first = await Runner.run(plain, "Name a city by the sea.")
        require(first.final_output, first)
        second = await Runner.run(plain, "And another.", previous_response_id=first.last_response_id)
        require(second.final_output, second)
    with check("agents: an answer that goes on from items that the client keeps"):
        again = [*first.to_input_list(), {"role": "user", "content": "And another."}]
        require((await Runner.run(plain, again)).final_output == second.final_output, again)
    with check("agents: a stream"):
        streamed = Runner.run_streamed(plain, "Name a city by the sea.")
        kinds = [event.type async for event in streamed.stream_events()]
        require(streamed.final_output == first.final_output and "raw_response_event" in kinds, kinds)
    with check("agents: an output of a type"):
        typed = Agent(name="typed", model=model, output_type=Place)
        require((await Runner.run(typed, "Where is the Colosseum?")).final_output.city in ("Oslo", "Rome"), typed)
    with check("agents: a tool that has to be called, then an answer"):
        demanded = ModelSettings(max_tokens=48, temperature=0.0, tool_choice="required")
        calling = Agent(name="calling", model=model, tools=[get_weather], model_settings=demanded)
        ASKED.clear()
        result = await Runner.run(calling, "How is the weather in Oslo?", max_turns=4)
        require(ASKED and set(ASKED) <= {"Oslo", "Rome"}, (ASKED, result.new_items))


async def pydantic_ai(client: AsyncOpenAI, name: str, check: Checks) -> None:
    model = PydanticModel(name, provider=OpenAIProvider(openai_client=client))
    short = {"max_tokens": 24, "temperature": 0.0}
    plain = PydanticAgent(model, instructions="Be brief.", model_settings=short)
    with check("pydantic-ai: an answer, and another that goes on from it"):
        first = await plain.run("Name a city by the sea.")
        require(first.output, first)
        require((await plain.run("And another.", message_history=first.all_messages())).output, first)
    with check("pydantic-ai: a stream"):
        async with plain.run_stream("Name a city by the sea.") as streamed:
            texts = [text async for text in streamed.stream_text()]
        require(texts and texts[-1] == first.output, (texts, first.output))
    with check("pydantic-ai: an output of a type, by a call that is demanded"):
        typed = PydanticAgent(model, output_type=Place)
        require((await typed.run("Where is the Colosseum?")).output.city in ("Oslo", "Rome"), typed)


async def main() -> None:
    set_tracing_disabled(True)
    check = Checks("responses")
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        await openai_agents(client, name, check)
        await pydantic_ai(client, name, check)
    check.end()


if __name__ == "__main__":
    asyncio.run(main())
