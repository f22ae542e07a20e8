"""What TabbyAPI's and llama.cpp's clients ask a server before they use it."""

from __future__ import annotations

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

import aphrodite
from aphrodite.server.auth import is_admin
from aphrodite.server.body import BYTES_PER_TOKEN, off_loop, parse, read_object
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import ApiError
from aphrodite.server.openai.prompts import check_ids, encode
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.server.openai.rendering import render_chat
from aphrodite.server.openai.tools import ToolUse
from aphrodite.server.responses import json_response


class TabbyEncodeFields(pydantic.BaseModel):
    """`POST /v1/token/encode` of a text. A list of messages in its place is rendered as a chat."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    text: str = Field(description="The text.")
    add_bos_token: bool = Field(default=True, description="Let the tokenizer add begin-of-sequence and the like.")


class TabbyDecodeFields(pydantic.BaseModel):
    """`POST /v1/token/decode`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    tokens: list[int] = Field(description="Token ids.")
    decode_special_tokens: bool = Field(default=True, description="Show special tokens in the text.")


class ProbeEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def model(self, request: Request) -> Response:
        """The model that is loaded, as TabbyAPI describes it."""
        if self._context.current() is None:
            raise ApiError(400, "No model is loaded. A request that names one loads it.", code="no_model_loaded")
        context = await self._context.resolve(request, None)
        model = context.engine.model
        template = context.engine.chat_template
        parameters = {
            "max_seq_len": model.max_model_len,
            "cache_size": model.num_cache_tokens,
            "max_batch_size": model.max_num_seqs,
            "prompt_template": None if template is None else template.name,
            "prompt_template_content": None if template is None else template.source,
            "use_vision": False,
            "draft": None,
        }
        head = {"id": context.name, "object": "model", "created": model.created, "owned_by": "aphrodite"}
        return json_response({**head, "parameters": parameters})

    async def encode(self, request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        context = await self._context.resolve(request, None)
        if isinstance(body.get("text"), list):
            chat = parse(ChatFields, {"messages": body["text"], "add_generation_prompt": False})
            ids = await render_chat(chat, context, ToolUse(), bounded=False)
        else:
            fields = parse(TabbyEncodeFields, body)
            ids = await encode(fields.text, context, field="text", special=fields.add_bos_token, bounded=False)
        return json_response({"tokens": ids, "length": len(ids)})

    async def decode(self, request: Request) -> Response:
        """The text of token ids."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(TabbyDecodeFields, body)
        context = await self._context.resolve(request, None)
        check_ids(fields.tokens, context, field="tokens")
        tokenizer, skip = context.engine.tokenizer, not fields.decode_special_tokens
        text = await off_loop(
            BYTES_PER_TOKEN * len(fields.tokens), lambda: tokenizer.decode(fields.tokens, skip_special_tokens=skip)
        )
        return json_response({"text": text})

    async def permission(self, request: Request) -> Response:
        """What the request's key allows: `admin`, or `api`."""
        return json_response({"permission": "admin" if is_admin(request) else "api"})

    async def props(self, request: Request) -> Response:
        """The server's properties, as llama.cpp names them."""
        context = await self._context.resolve(request, None)
        model, tokenizer = context.engine.model, context.engine.tokenizer
        template = context.engine.chat_template

        return json_response(
            {
                "default_generation_settings": {"n_ctx": model.max_model_len},
                "n_ctx": model.max_model_len,
                "total_slots": model.max_num_seqs,
                "model_alias": context.name,
                "model_path": model.root,
                "chat_template": "" if template is None else template.source,
                "bos_token": tokenizer.bos_token or "",
                "eos_token": tokenizer.eos_token or "",
                "modalities": {"vision": False, "audio": False},
                "build_info": f"aphrodite-{aphrodite.__version__}",
            }
        )

    async def slots(self, request: Request) -> Response:
        """A slot for each answer that can run, and how many do."""
        loaded = self._context.current()
        if loaded is None:
            return json_response([])
        model, running = loaded.engine.model, loaded.engine.stats().num_running
        slots = [
            {"id": number, "n_ctx": model.max_model_len, "is_processing": number < running}
            for number in range(model.max_num_seqs)
        ]
        return json_response(slots)

    async def service_info(self, request: Request) -> Response:
        """Which protocols are spoken here, and where (the service-info proposal of KoboldAI's community)."""
        return json_response(
            {
                "version": 0.1,
                "software": {
                    "name": "Aphrodite Engine",
                    "version": aphrodite.__version__,
                },
                "api": {
                    "openai": {"name": "OpenAI API", "rel_url": "/v1", "documentation": "/docs"},
                    "koboldai": {"name": "KoboldAI API", "rel_url": "/api", "documentation": "/docs"},
                    "anthropic": {"name": "Anthropic Messages API", "rel_url": "/v1", "documentation": "/docs"},
                    "ollama": {"name": "Ollama API", "rel_url": "/api", "documentation": "/docs"},
                },
            }
        )
