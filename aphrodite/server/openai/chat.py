"""`POST /v1/chat/completions`."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from aphrodite.errors import InvalidRequestError
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import invalid, prompt_as
from aphrodite.server.generation import Generation, UsageCounter, collect, stream_pieces
from aphrodite.server.openai.answers import AnswerReader
from aphrodite.server.openai.chunks import ChunkWriter
from aphrodite.server.openai.finish import answer_extras, openai_finish_reason
from aphrodite.server.openai.logprobs import TokenNames, chat_logprobs, num_top_logprobs, prompt_logprobs
from aphrodite.server.openai.preparing import prepare_chat
from aphrodite.server.openai.protocol import (
    ChatFields,
    ignored_header,
    refuse_best_of,
    refuse_unsupported,
    sampling_params,
)
from aphrodite.server.openai.telemetry import Telemetry
from aphrodite.server.openai.warnings import field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.resumable import refuse_resumable
from aphrodite.server.sse import OPENAI_FORMAT, EventSink


class ChatEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response | ASGIApp:
        """Answer a conversation."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        refuse_unsupported(body, ChatFields)
        fields = parse(ChatFields, body)
        early = OPENAI_FORMAT if fields.stream and not fields.resumable else None
        context = await self._context.resolve(request, fields.model, stream=early)
        num_logprobs = _num_logprobs(fields, context)
        base = msgspec.structs.replace(context.engine.model.sampling_defaults, logprobs=num_logprobs)
        preset = preset_of(request, fields.preset, context.config)
        params = sampling_params(body, ChatFields, context.engine.model, base=base, preset=preset)
        refuse_best_of(fields.best_of, params.n)
        if params.prompt_logprobs is not None and fields.stream:
            raise invalid("prompt_logprobs", "come with whole answers only; leave out stream")
        chat = await prepare_chat(fields, params, context)
        generation = Generation.of(
            "chatcmpl",
            context.name,
            [chat.token_ids],
            chat.params,
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            progress=fields.stream and fields.return_progress,
        )
        warnings = [*field_warnings(body, ChatFields, preset), *chat.warnings]
        answer = _Answer(context, generation, fields, chat.reader, warnings)
        headers = ignored_header(body, ChatFields)
        try:
            if fields.stream:
                return self._context.streams.response(
                    request, generation.response_id, answer.stream, headers, resumable=fields.resumable
                )
            refuse_resumable(fields.resumable)
            whole = await context.supervisor.run(answer.whole(), request.receive)
        except InvalidRequestError as error:
            raise prompt_as(error, "messages") from None
        return json_response(whole, headers)


def _num_logprobs(fields: ChatFields, context: ModelContext) -> int | None:
    wanted = fields.top_logprobs
    if wanted is None or (wanted == 0 and not fields.logprobs):
        return 0 if fields.logprobs else None
    if not fields.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return num_top_logprobs(wanted, context.engine.model)


class _Answer:
    """One request's answer, streamed or whole."""

    def __init__(
        self,
        context: ModelContext,
        generation: Generation,
        fields: ChatFields,
        reader: AnswerReader | None,
        warnings: list[str],
    ) -> None:
        self._reader = reader
        self._context = context
        self._generation = generation
        self._warnings = warnings
        self._fields = fields
        self._names = TokenNames(context.engine.tokenizer, as_ids=fields.return_tokens_as_token_ids)

    async def whole(self) -> bytes:
        """The response's body."""
        outputs, counter = await collect(self._context, self._generation)
        (output,) = outputs
        size = self._generation.body_bytes(counter.usage()["total_tokens"])
        return await off_loop(size, lambda: self._body(output, counter))

    def _body(self, output: RequestOutput, counter: UsageCounter) -> bytes:
        body = {
            **self._generation.head("chat.completion"),
            "choices": [self._choice(answer) for answer in output.outputs],
            "usage": self._usage(counter),
        }
        if self._fields.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        if output.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._names)
        if self._fields.return_timings or self._fields.timings_per_token:
            body["timings"] = counter.timings()
        if self._warnings:
            body["warnings"] = self._warnings
        return msgspec.json.encode(body)

    async def stream(self, events: EventSink) -> None:
        """Write the response's chunks, the end mark excepted."""
        try:
            await self._stream(events)
        except InvalidRequestError as error:
            raise prompt_as(error, "messages") from None

    async def _stream(self, events: EventSink) -> None:
        options = self._fields.stream_options
        writer = ChunkWriter(
            self._generation.head("chat.completion.chunk"),
            _delta,
            usage_key=options.include_usage,
            warnings=self._warnings,
        )
        counter = UsageCounter(self._generation.prompts)
        telemetry = Telemetry.of(self._fields, counter)
        params = self._generation.params
        detailed = params.logprobs is not None or params.sampler_trace or self._fields.return_token_ids
        plain = not detailed and not telemetry.every_chunk and self._reader is None
        opened: set[int] = set()
        pieces = stream_pieces(self._context, self._generation)
        async with aclosing(pieces):
            async for _, output in pieces:
                counter.observe(0, output)
                data = telemetry.progress(0, output, lambda beside: writer.choice(0, {}, beside=beside))
                for answer in output.outputs:
                    if answer.index not in opened:
                        opened.add(answer.index)
                        data += self._opening(writer, output, answer.index, telemetry)
                    if plain and answer.finish_reason is None:
                        data += writer.text(answer.index, answer.text)
                    elif self._reader is None:
                        data += self._chunk(writer, answer, answer.text, telemetry)
                    else:
                        data += self._chunks(writer, answer, self._reader, telemetry, detailed=detailed)
                await events.write(data)
        if options.include_usage:
            await events.write(writer.usage(self._usage(counter), telemetry.timings(finished=True)))

    def _opening(self, writer: ChunkWriter, output: RequestOutput, index: int, telemetry: Telemetry) -> bytes:
        """A choice's first chunk: whose turn it is."""
        beside = {"prompt_token_ids": output.prompt_token_ids} if self._fields.return_token_ids else None
        return writer.choice(index, None, usage=telemetry.usage(), beside=beside)

    def _chunks(
        self,
        writer: ChunkWriter,
        answer: CompletionOutput,
        reader: AnswerReader,
        telemetry: Telemetry,
        *,
        detailed: bool,
    ) -> bytes:
        """The chunks of a piece that was taken apart; what else is told of it goes with the last."""
        deltas = [reader.delta(event) for event in reader.read(answer)]
        if answer.finish_reason is not None or (detailed and not deltas):
            deltas.append({})
        usage, beside = telemetry.usage(), telemetry.timings(finished=False)
        data = b"".join(writer.choice(answer.index, piece, usage=usage, beside=beside) for piece in deltas[:-1])
        return data + self._chunk(writer, answer, deltas[-1], telemetry) if deltas else b""

    def _chunk(
        self, writer: ChunkWriter, answer: CompletionOutput, piece: str | dict[str, Any], telemetry: Telemetry
    ) -> bytes:
        return writer.choice(
            answer.index,
            piece,
            logprobs=chat_logprobs(answer.logprobs, self._names) if answer.logprobs is not None else None,
            finish_reason=self._finish_reason(answer),
            usage=telemetry.usage(),
            extra=self._extra(answer),
            beside=telemetry.timings(finished=answer.finish_reason is not None),
        )

    def _choice(self, answer: CompletionOutput) -> dict[str, Any]:
        return {
            "index": answer.index,
            "message": self._message(answer),
            "logprobs": chat_logprobs(answer.logprobs, self._names) if answer.logprobs is not None else None,
            "finish_reason": self._finish_reason(answer),
            **self._extra(answer),
        }

    def _message(self, answer: CompletionOutput) -> dict[str, Any]:
        if self._reader is not None:
            return self._reader.message(answer)
        return {"role": "assistant", "content": answer.text, "refusal": None}

    def _finish_reason(self, answer: CompletionOutput) -> str | None:
        return openai_finish_reason(answer) if self._reader is None else self._reader.finish_reason(answer)

    def _usage(self, counter: UsageCounter) -> dict[str, Any]:
        """Token counts at the end, those of reasoning with them."""
        usage = counter.usage()
        return usage if self._reader is None else usage | self._reader.usage_details()

    def _extra(self, answer: CompletionOutput) -> dict[str, Any]:
        return answer_extras(answer, self._names, token_ids=self._fields.return_token_ids)


def _delta(piece: str | dict[str, Any] | None) -> dict[str, Any]:
    """The part of a choice that holds a piece of text, or a delta that was made already; None opens the turn."""
    if isinstance(piece, dict):
        return {"delta": piece}
    return {"delta": {"role": "assistant", "content": ""} if piece is None else {"content": piece}}
