"""From a chat request's messages to token ids: the one gate to chat templates, for every endpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from aphrodite.chat.negative import negative_messages
from aphrodite.chat.stops import with_template_stops
from aphrodite.chat.template import ChatTemplate
from aphrodite.engine.preparation import wants_negative_prompt, with_negative_prompt
from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.body import THREAD_BYTES, off_loop
from aphrodite.server.context import ModelContext
from aphrodite.server.errors import invalid, unsupported
from aphrodite.server.openai.messages import read_messages, text_size
from aphrodite.server.openai.prompts import encode, truncation
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.server.openai.tools import ToolUse

_EFFORTS: Final = {"minimal": "low", "xhigh": "high", "max": "high"}  # templates know three levels


async def chat_prompt(
    fields: ChatFields, params: SamplingParams, context: ModelContext, tools: ToolUse
) -> tuple[list[int], SamplingParams]:
    """The conversation's token ids; `params` with the template's stops and the ids that guidance moves away from."""
    budget = params.thinking_token_budget
    engine = context.engine
    keep = truncation(
        fields.truncate_prompt_tokens, max_model_len=engine.model.max_model_len, max_tokens=params.max_tokens
    )
    last = slice(None) if keep is None else slice(-keep, None)
    token_ids = await render_chat(fields, context, tools, bounded=keep is None, budget=budget)
    if wants_negative_prompt(params):
        negative = await render_chat(
            fields, context, tools, bounded=keep is None, budget=budget, negative=params.negative_prompt
        )
        params = with_negative_prompt(params, negative[last])
    if fields.chat_template is None:  # who sends a template sends its stops too
        params = with_template_stops(params, engine.chat_template, engine.tokenizer, vocab_size=engine.model.vocab_size)
    return token_ids[last], params


async def render_chat(
    fields: ChatFields,
    context: ModelContext,
    tools: ToolUse,
    *,
    bounded: bool,
    budget: int | None = None,
    negative: str | None = None,
) -> list[int]:
    """Token ids of the rendered conversation; `bounded` refuses what cannot fit the context.

    Args:
        tools: what `read_tool_use` says of the fields.
        budget: of reasoning, for templates that tell the model of it.
        negative: instead the conversation that guidance moves away from, with this for a system message.

    Raises:
        ApiError, InvalidRequestError: 400, naming the field.
    """
    messages = read_messages(fields.messages, max_messages=context.config.max_messages)
    field = "messages" if negative is None else "negative_prompt"
    continues = fields.continue_final_message
    opens = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    if continues and opens:
        raise invalid("continue_final_message", "cannot be combined with add_generation_prompt")
    if continues and messages[-1]["role"] != "assistant":
        raise invalid("continue_final_message", "needs the last message to be the assistant's")
    _check_template(fields, context)
    if negative is not None:
        messages = negative_messages(messages, negative)

    def render() -> str:
        return template_of(fields, context).render(
            messages,
            add_generation_prompt=opens,
            continue_final_message=continues,
            tools=tools.tools,
            documents=fields.documents,
            extra=_variables(fields, budget),
        )

    # A template that came with the request may take long, whatever the messages' size; documents may be long.
    thread = fields.chat_template is not None or bool(fields.documents or tools.tools)
    size = THREAD_BYTES + 1 if thread else text_size(messages)
    try:
        text = await off_loop(size, render)
    except InvalidRequestError as error:
        if negative is None:
            raise
        message = f"with negative_prompt as its system message: {error}"
        raise InvalidRequestError(message, param=field, code=error.code) from None
    return await encode(text, context, field=field, special=fields.add_special_tokens, bounded=bounded)


def _variables(fields: ChatFields, budget: int | None) -> dict[str, Any]:
    """What the template is told beside the messages; what the request says by the variables' own names holds."""
    effort, told = fields.reasoning_effort, dict[str, Any]()
    if budget is not None:
        told["thinking_budget"] = budget
    if effort is not None:
        told["enable_thinking"] = effort != "none"
    if effort not in (None, "none"):
        told["reasoning_effort"] = _EFFORTS.get(effort, effort)
    return told | fields.chat_template_kwargs


def _check_template(fields: ChatFields, context: ModelContext) -> None:
    if fields.chat_template is not None and not context.config.trust_request_chat_template:
        why = "this server takes no templates from requests (start it with --trust-request-chat-template)"
        raise unsupported("chat_template", why)


def template_of(fields: ChatFields, context: ModelContext) -> ChatTemplate:
    """The request's own template, else the model's."""
    if fields.chat_template is None:
        return context.engine.chat_template
    tokenizer = context.engine.tokenizer
    return _own_template(fields.chat_template, tokenizer.bos_token, tokenizer.eos_token)


@lru_cache(maxsize=16)  # one request asks several times, and its client's next one brings the same
def _own_template(source: str, bos_token: str | None, eos_token: str | None) -> ChatTemplate:
    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token, name="the request's chat template")
