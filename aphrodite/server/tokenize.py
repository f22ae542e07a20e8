"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the model's tokenizer, for clients that count or prepare."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from aphrodite.server.body import BYTES_PER_TOKEN, off_loop, parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import invalid
from aphrodite.server.openai.prompts import check_ids, encode
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.server.openai.rendering import render_chat
from aphrodite.server.openai.tools import read_tool_use
from aphrodite.server.responses import json_response


class TokenizeFields(pydantic.BaseModel):
    """`POST /tokenize` of a text. With `messages` in its place, the fields are those of a chat completion."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    prompt: str = Field(description="The text.")
    add_special_tokens: bool = Field(default=True, description="Let the tokenizer add begin-of-sequence and the like.")


class ContentFields(pydantic.BaseModel):
    """`POST /tokenize` as llama.cpp's clients send it."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    content: str = Field(description="The text.")
    add_special: bool = Field(default=False, description="Let the tokenizer add begin-of-sequence and the like.")


class TokenStringsField(pydantic.BaseModel):
    """What `POST /tokenize` takes besides, for texts and messages."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    return_token_strs: bool = Field(default=False, description="Also return each token as text.")


class DetokenizeFields(pydantic.BaseModel):
    """`POST /detokenize`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    tokens: list[int] = Field(description="Token ids.")
    skip_special_tokens: bool = Field(default=False, description="Leave special tokens out of the text.")


class TokenizerEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a conversation, as generation would see it."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        if body.get("prompt") is None and body.get("messages") is None and body.get("content") is not None:
            return await self._tokenize_content(request, body)
        strings = parse(TokenStringsField, body).return_token_strs
        if body.get("messages") is not None:
            if body.get("prompt") is not None:
                raise invalid("prompt", "send either prompt or messages")
            chat = parse(ChatFields, body)
            context = await self._context.resolve(request, chat.model)
            token_ids = await render_chat(chat, context, read_tool_use(chat), bounded=False)
        else:
            fields = parse(TokenizeFields, body)
            context = await self._context.resolve(request, fields.model)
            token_ids = await encode(
                fields.prompt, context, field="prompt", special=fields.add_special_tokens, bounded=False
            )
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": context.engine.model.max_model_len,
            "tokens": token_ids,
        }
        if strings:
            answer["token_strs"] = [context.engine.tokenizer.token_text(token_id) for token_id in token_ids]
        return json_response(answer)

    async def _tokenize_content(self, request: Request, body: dict[str, Any]) -> Response:
        """As llama.cpp's clients ask, who read nothing but the tokens."""
        fields = parse(ContentFields, body)
        context = await self._context.resolve(request, fields.model)
        ids = await encode(fields.content, context, field="content", special=fields.add_special, bounded=False)
        return json_response({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(DetokenizeFields, body)
        context = await self._context.resolve(request, fields.model)
        check_ids(fields.tokens, context, field="tokens")
        tokenizer = context.engine.tokenizer
        text = await off_loop(
            BYTES_PER_TOKEN * len(fields.tokens),
            lambda: tokenizer.decode(fields.tokens, skip_special_tokens=fields.skip_special_tokens),
        )
        return json_response({"prompt": text, "content": text})

    async def info(self, request: Request) -> Response:
        """What a client needs to prepare prompts itself: special tokens and the chat template."""
        engine = (await self._context.resolve(request, None)).engine
        tokenizer = engine.tokenizer
        return json_response(
            {
                "tokenizer_class": "AphroditeTokenizer",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": engine.model.max_model_len,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "eos_token_ids": tokenizer.eos_token_ids,
                "add_bos_token": tokenizer.adds_bos,
                "chat_template": engine.chat_template.source,
            }
        )
