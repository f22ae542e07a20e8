"""From a chat request's messages to token ids: the one gate to chat templates, for every endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aphrodite.server.body import off_loop
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import ApiError, invalid
from aphrodite.server.openai.messages import read_messages
from aphrodite.server.openai.prompts import encode
from aphrodite.server.openai.protocol import ChatFields

if TYPE_CHECKING:
    from aphrodite.chat.template import ChatTemplate

# Names that the renderer sets itself; a request that could replace them would bypass what was checked.
_RESERVED = {
    "messages", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "tools", "documents",
    "bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now",
}  # fmt: skip


async def render_chat(fields: ChatFields, context: ServerContext, *, bounded: bool) -> list[int]:
    """Token ids of the rendered conversation; `bounded` refuses what cannot fit the context.

    Raises:
        ApiError, InvalidRequestError: 400, naming the field.
    """
    messages = read_messages(fields.messages, max_messages=context.config.max_messages)
    template = _template(fields, context)
    reserved = sorted(_RESERVED & fields.chat_template_kwargs.keys())
    if reserved:
        raise invalid(f"chat_template_kwargs.{reserved[0]}", "this name is reserved; use the field of that name")
    continues = fields.continue_final_message
    opens = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    if continues and opens:
        raise invalid("continue_final_message", "cannot be combined with add_generation_prompt")
    if continues and messages[-1]["role"] != "assistant":
        raise invalid("continue_final_message", "needs the last message to be the assistant's")

    def render() -> str:
        return template.render(
            messages,
            add_generation_prompt=opens,
            continue_final_message=continues,
            extra=fields.chat_template_kwargs or None,
        )

    size = sum(len(message["content"] or "") for message in messages)
    # A template that came with the request may take long, whatever the messages' size.
    text = await off_loop(2**63 if fields.chat_template is not None else size, render)
    return await encode(text, context, field="messages", special=fields.add_special_tokens, bounded=bounded)


def _template(fields: ChatFields, context: ServerContext) -> ChatTemplate:
    if fields.chat_template is not None:
        if not context.config.trust_request_chat_template:
            raise ApiError(
                400,
                "chat_template: this server does not take templates from requests"
                " (start it with --trust-request-chat-template).",
                param="chat_template",
                code="unsupported_parameter",
            )
        return _request_template(fields.chat_template, context)
    template = context.engine.chat_template
    if template is None:
        raise ApiError(
            400,
            "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
            param="messages",
            code="chat_template_missing",
        )
    return template


def _request_template(source: str, context: ServerContext) -> ChatTemplate:
    from aphrodite.chat.template import ChatTemplate

    return ChatTemplate(source)
