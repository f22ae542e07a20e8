"""llama.cpp's own way of generating: `POST /completion`.

Sampling parameters go by llama.cpp's names, which are among those of all endpoints. What a request leaves open is the
model's recommendation.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.core.plan import TokenLogprobs
from aphrodite.outputs import CompletionOutput
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import ApiError, unsupported
from aphrodite.server.generation import Generation, UsageCounter, collect, stream_pieces
from aphrodite.server.openai.logprobs import TokenNames, chat_logprobs
from aphrodite.server.openai.prompts import read_prompts
from aphrodite.server.openai.protocol import (
    Resumable,
    ReturnProgress,
    TimingsPerToken,
    ignored_header,
    refuse_unsupported,
    sampling_params,
    without_empty_stops,
)
from aphrodite.server.openai.telemetry import Telemetry
from aphrodite.server.openai.warnings import budget_warnings, field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.resumable import refuse_resumable
from aphrodite.server.routing import post
from aphrodite.server.sse import EventSink, StreamFormat, event


class LlamaCppFields(pydantic.BaseModel):
    """`POST /completion`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    prompt: Any = Field(description="Text, or token ids.")
    n_predict: int | None = Field(default=None, description="Most tokens; below 0 is no limit.", lt=2**31)
    stream: bool = Field(default=False, description="Send the answer piece by piece as server-sent events.")
    n_probs: int = Field(default=0, description="Add so many most likely tokens at each position.", ge=0, lt=2**31)
    return_tokens: bool = Field(default=False, description="Add the answer's token ids.")
    timings_per_token: TimingsPerToken = False
    return_progress: ReturnProgress = False
    resumable: Resumable = False
    preset: str | None = Field(default=None, description="A sampler preset of /v1/presets.", max_length=256)
    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    cache_prompt: bool = Field(default=True, description="Has no meaning here: prefixes are always cached.")
    id_slot: int = Field(default=-1, description="Has no meaning here: requests are not bound to a slot.")
    n_keep: int = Field(default=0, description="Has no meaning here: prompts are not shifted.")


_KINDS = {401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}


def llama_cpp_error(error: ApiError) -> dict[str, Any]:
    """An error as llama.cpp writes it: `code` is the status. Which field is wrong stands beside that."""
    kind = "not_supported_error" if error.code == "unsupported_parameter" else _KINDS.get(error.status, error.kind)
    return {"error": {"code": error.status, "message": error.message, "type": kind, "param": error.param}}


def _failure(error: ApiError) -> bytes:
    return event(error.encode(llama_cpp_error))


_FORMAT = StreamFormat(mark=b"", failure=_failure)


def llama_cpp_routes(context: ServerContext) -> list[Route]:
    """The routes of this module."""
    create = CompletionEndpoint(context).create
    return [post("/completion", create), post("/completions", create)]


class CompletionEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response | ASGIApp:
        """Continue a text."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        refuse_unsupported(body)
        fields = parse(LlamaCppFields, body)
        early = _FORMAT if fields.stream and not fields.resumable else None
        context = await self._context.resolve(request, fields.model, stream=early)
        model, limit = context.engine.model, fields.n_predict
        base = msgspec.structs.replace(
            model.sampling_defaults,
            max_tokens=None if limit is None or limit < 0 else limit,
            logprobs=min(fields.n_probs, model.max_logprobs) or None,
        )
        preset = preset_of(request, fields.preset, context.config)
        params = sampling_params(without_empty_stops(body), LlamaCppFields, model, base=base, preset=preset)
        prompts = await read_prompts(fields.prompt, context, add_special_tokens=True, truncate=None)
        if len(prompts) > 1:
            raise unsupported("prompt", "one prompt; use /v1/completions")
        progress = fields.stream and fields.return_progress
        generation = Generation.of("cmpl", context.name, [prompts[0].token_ids], params, progress=progress)
        warnings = field_warnings(body, LlamaCppFields, preset) + budget_warnings(params, context)
        answer = _Answer(context, generation, fields, warnings)
        headers = ignored_header(body, LlamaCppFields)
        if fields.stream:
            return self._context.streams.response(
                request, generation.response_id, answer.stream, headers, resumable=fields.resumable, format=_FORMAT
            )
        refuse_resumable(fields.resumable)
        whole = await context.supervisor.run(answer.whole(), request.receive)
        return json_response(whole, headers)


@dataclass(slots=True)
class _Answer:
    """The answer to a prompt, streamed or whole; several, if that was asked for, differ in their `index`."""

    context: ModelContext
    generation: Generation
    fields: LlamaCppFields
    warnings: list[str]

    async def whole(self) -> bytes:
        """The response's body: an object, or of several answers a list of such."""
        (output,), counter = await collect(self.context, self.generation)

        def build() -> bytes:
            bodies = [self._piece(answer) | self._end(answer, counter) for answer in output.outputs]
            return msgspec.json.encode(bodies if self.generation.params.n > 1 else bodies[0])

        return await off_loop(self.generation.body_bytes(sum(answer.num_tokens for answer in output.outputs)), build)

    async def stream(self, events: EventSink) -> None:
        """Write the answer's events."""
        counter = UsageCounter(self.generation.prompts)
        telemetry = Telemetry(counter, per_token=self.fields.timings_per_token, progress=self.fields.return_progress)
        pieces = stream_pieces(self.context, self.generation)
        async with aclosing(pieces):
            async for number, output in pieces:
                counter.observe(number, output)
                data = telemetry.progress(number, output, self._progress)
                for answer in output.outputs:
                    piece = self._piece(answer) | telemetry.timings(finished=False)
                    if answer.finish_reason is not None:
                        piece |= self._end(answer, counter)
                    data += event(msgspec.json.encode(piece))
                await events.write(data)

    def _progress(self, beside: dict[str, Any]) -> bytes:
        piece = {"index": 0, "content": "", "tokens": [], "stop": False, "id_slot": -1, "tokens_predicted": 0}
        (prompt,) = self.generation.prompts
        return event(msgspec.json.encode({**piece, "tokens_evaluated": len(prompt), **beside}))

    def _piece(self, answer: CompletionOutput) -> dict[str, Any]:
        piece: dict[str, Any] = {"index": answer.index, "content": answer.text, "id_slot": -1, "stop": False}
        piece["tokens"] = answer.token_ids if self.fields.return_tokens or self.fields.stream else []
        if answer.logprobs is not None:
            piece["completion_probabilities"] = self._probabilities(answer.logprobs)
        return piece

    def _probabilities(self, entries: list[TokenLogprobs]) -> list[dict[str, Any]]:
        names = TokenNames(self.context.engine.tokenizer, as_ids=False)
        rows: list[dict[str, Any]] = chat_logprobs(entries, names)["content"]
        for row, entry in zip(rows, entries, strict=True):
            row["id"] = entry.token_id
            for top, token_id in zip(row["top_logprobs"], entry.top_ids, strict=True):
                top["id"] = token_id
        return rows

    def _end(self, answer: CompletionOutput, counter: UsageCounter) -> dict[str, Any]:
        """What the last piece says besides."""
        usage = counter.usage()
        params = self.generation.params
        words = {*params.stop, *params.stop_regex}  # an answer whose grammar is complete stops for another reason
        word = str(answer.stop_reason) if answer.stop_reason in words else ""
        kind = "limit" if answer.finish_reason == "length" else "word" if word else "eos"
        extra = {"warnings": self.warnings} if self.warnings else {}
        return {
            "stop": True,
            "model": self.generation.model,
            "stop_type": kind,
            "stopping_word": word,
            "truncated": False,
            "tokens_predicted": answer.num_tokens,
            "tokens_evaluated": usage["prompt_tokens"],
            "tokens_cached": usage["prompt_tokens_details"]["cached_tokens"],
            "timings": counter.timings(),
            **extra,
        }
