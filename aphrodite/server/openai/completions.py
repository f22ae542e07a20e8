"""`POST /v1/completions`."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from aphrodite.core.plan import TokenLogprobs
from aphrodite.engine.preparation import wants_negative_prompt, with_negative_prompt
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import invalid
from aphrodite.server.generation import Generation, UsageCounter, collect, stream_pieces
from aphrodite.server.openai.chunks import ChunkWriter
from aphrodite.server.openai.finish import answer_extras, openai_finish_reason
from aphrodite.server.openai.logprobs import (
    TextOffsets,
    TokenNames,
    completion_logprobs,
    join_logprobs,
    prompt_logprobs,
)
from aphrodite.server.openai.prompts import Prompt, encode, read_prompts, truncation
from aphrodite.server.openai.protocol import (
    CompletionFields,
    ignored_header,
    refuse_best_of,
    refuse_unsupported,
    sampling_params,
)
from aphrodite.server.openai.telemetry import Telemetry
from aphrodite.server.openai.warnings import budget_warnings, field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.resumable import refuse_resumable
from aphrodite.server.sse import OPENAI_FORMAT, EventSink

_MAX_TOKENS = 16  # where the client says nothing


class CompletionEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response | ASGIApp:
        """Continue one or more prompts."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        refuse_unsupported(body)
        fields = parse(CompletionFields, body)
        early = OPENAI_FORMAT if fields.stream and not fields.resumable else None
        context = await self._context.resolve(request, fields.model, stream=early)
        base = msgspec.structs.replace(context.engine.model.sampling_defaults, max_tokens=_MAX_TOKENS)
        preset = preset_of(request, fields.preset, context.config)
        params = sampling_params(body, CompletionFields, context.engine.model, base=base, preset=preset)
        refuse_best_of(fields.best_of, params.n)
        if params.prompt_logprobs is not None and fields.stream:
            raise invalid("prompt_logprobs", "come with whole answers only; leave out stream, or use echo and logprobs")
        wants_prompt_logprobs = params.prompt_logprobs is not None
        if fields.echo and params.logprobs is not None and not wants_prompt_logprobs:
            params = msgspec.structs.replace(params, prompt_logprobs=params.logprobs)
        keep = truncation(
            fields.truncate_prompt_tokens,
            max_model_len=context.engine.model.max_model_len,
            max_tokens=params.max_tokens,
        )
        prompts = await read_prompts(
            fields.prompt, context, add_special_tokens=fields.add_special_tokens, truncate=keep
        )
        if wants_negative_prompt(params):
            special, bounded = fields.add_special_tokens, keep is None
            text = params.negative_prompt
            negative = await encode(text, context, field="negative_prompt", special=special, bounded=bounded)
            params = with_negative_prompt(params, negative if keep is None else negative[-keep:])
        generation = Generation.of(
            "cmpl",
            context.name,
            [prompt.token_ids for prompt in prompts],
            params,
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            progress=fields.stream and fields.return_progress,
        )
        warnings = field_warnings(body, CompletionFields, preset) + budget_warnings(params, context)
        answer = _Answer(context, generation, fields, prompts, wants_prompt_logprobs, warnings)
        headers = ignored_header(body, CompletionFields)
        if fields.stream:
            return self._context.streams.response(
                request, generation.response_id, answer.stream, headers, resumable=fields.resumable
            )
        refuse_resumable(fields.resumable)
        whole = await context.supervisor.run(answer.whole(), request.receive)
        return json_response(whole, headers)


@dataclass(slots=True)
class _ChoiceState:
    """What a streamed choice must remember from piece to piece; `length` is of the text sent so far."""

    offsets: TextOffsets
    length: int
    opened: bool = False


class _Answer:
    """One request's answer, streamed or whole."""

    def __init__(
        self,
        context: ModelContext,
        generation: Generation,
        fields: CompletionFields,
        prompts: list[Prompt],
        wants_prompt_logprobs: bool,
        warnings: list[str],
    ) -> None:
        self._context = context
        self._generation = generation
        self._fields = fields
        self._prompts = prompts
        self._wants_prompt_logprobs = wants_prompt_logprobs
        self._warnings = warnings
        self._prompt_entries: dict[int, list[TokenLogprobs | None] | None] = {}
        self._echoes: dict[int, tuple[str, dict[str, Any] | None]] = {}
        self._tokenizer = context.engine.tokenizer
        self._names = TokenNames(self._tokenizer, as_ids=fields.return_tokens_as_token_ids)
        self._silent = self._tokenizer.special_ids if generation.params.skip_special_tokens else frozenset()

    async def whole(self) -> bytes:
        """The response's body."""
        outputs, counter = await collect(self._context, self._generation)
        self._prompt_entries = {number: output.prompt_logprobs for number, output in enumerate(outputs)}
        usage = counter.usage()
        timed = self._fields.return_timings or self._fields.timings_per_token
        timings = {"timings": counter.timings()} if timed else {}

        def build() -> bytes:
            choices = [
                self._choice(number, output, answer)
                for number, output in enumerate(outputs)
                for answer in output.outputs
            ]
            body = {**self._generation.head("text_completion"), "choices": choices, "usage": usage, **timings}
            if self._warnings:
                body["warnings"] = self._warnings
            return msgspec.json.encode(body)

        return await off_loop(self._generation.body_bytes(usage["total_tokens"]), build)

    async def stream(self, events: EventSink) -> None:
        """Write the response's chunks, the end mark excepted."""
        options = self._fields.stream_options
        writer = ChunkWriter(
            self._generation.head("text_completion"),
            lambda text: {"text": text},
            usage_key=options.include_usage,
            warnings=self._warnings,
        )
        counter = UsageCounter(self._generation.prompts)
        telemetry = Telemetry.of(self._fields, counter)
        params = self._generation.params
        detailed = params.logprobs is not None or params.sampler_trace or self._fields.return_token_ids
        plain = not detailed and not telemetry.every_chunk
        n = self._generation.params.n
        states: dict[int, _ChoiceState] = {}
        pieces = stream_pieces(self._context, self._generation)
        async with aclosing(pieces):
            async for number, output in pieces:
                counter.observe(number, output)
                if output.prompt_logprobs is not None:
                    self._prompt_entries[number] = output.prompt_logprobs
                data = telemetry.progress(number, output, partial(_progress_chunk, writer, number * n))
                for answer in output.outputs:
                    index = number * n + answer.index
                    if plain and answer.finish_reason is None and (index in states or not self._fields.echo):
                        data += writer.text(index, answer.text)
                        continue
                    state = states.get(index)
                    if state is None:
                        state = states[index] = self._open_choice()
                    data += self._chunk(writer, number, output, answer, state, telemetry)
                await events.write(data)
        if options.include_usage:
            await events.write(writer.usage(counter.usage(), telemetry.timings(finished=True)))

    def _open_choice(self) -> _ChoiceState:
        return _ChoiceState(TextOffsets(self._names, self._silent), 0)

    def _chunk(
        self,
        writer: ChunkWriter,
        number: int,
        output: RequestOutput,
        answer: CompletionOutput,
        state: _ChoiceState,
        telemetry: Telemetry,
    ) -> bytes:
        """A chunk that is more than a piece of text; the first of a choice with `echo` brings the prompt."""
        text = answer.text
        logprobs = None
        extra = self._extra(answer)
        opens = not state.opened
        state.opened = True
        if opens and self._fields.return_token_ids:
            extra["prompt_token_ids"] = output.prompt_token_ids
        if opens and self._fields.echo:
            prompt_text, logprobs = self._echo(number)
            text = prompt_text + text
            state.offsets = TextOffsets(self._names, self._silent, start=len(prompt_text))
        state.length += len(text)
        if answer.logprobs is not None:
            own = completion_logprobs(answer.logprobs, answer.token_ids, self._names, state.offsets, state.length)
            logprobs = join_logprobs(logprobs, own) if logprobs else own
        return writer.choice(
            number * self._generation.params.n + answer.index,
            text,
            logprobs=logprobs,
            finish_reason=openai_finish_reason(answer),
            usage=telemetry.usage(),
            extra=extra,
            beside=telemetry.timings(finished=answer.finish_reason is not None),
        )

    def _choice(self, number: int, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
        """A choice of a whole response."""
        text, logprobs = self._echo(number) if self._fields.echo else ("", None)
        start = len(text)
        text += answer.text
        if answer.logprobs is not None:
            offsets = TextOffsets(self._names, self._silent, start=start)
            own = completion_logprobs(answer.logprobs, answer.token_ids, self._names, offsets, len(text))
            logprobs = join_logprobs(logprobs, own) if logprobs else own
        extra = self._extra(answer)
        if self._fields.return_token_ids:
            extra["prompt_token_ids"] = output.prompt_token_ids
        if self._wants_prompt_logprobs and output.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._names)
        return {
            "index": number * self._generation.params.n + answer.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": openai_finish_reason(answer),
            **extra,
        }

    def _extra(self, answer: CompletionOutput) -> dict[str, Any]:
        return answer_extras(answer, self._names, token_ids=self._fields.return_token_ids)

    def _echo(self, number: int) -> tuple[str, dict[str, Any] | None]:
        """A prompt's text and, if log-probabilities were asked for, its tokens'; made once for all its answers."""
        if number not in self._echoes:
            self._echoes[number] = self._make_echo(number)
        return self._echoes[number]

    def _make_echo(self, number: int) -> tuple[str, dict[str, Any] | None]:
        prompt = self._prompts[number]
        ids = prompt.token_ids
        silent: frozenset[int] = frozenset()
        if prompt.text is None:
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
        else:
            text = prompt.text
            first = ids[0]
            if self._tokenizer.is_special(first) and not text.startswith(self._tokenizer.token_text(first)):
                silent = frozenset({first})  # the tokenizer put it there
        if self._generation.params.logprobs is None:
            return text, None
        entries = self._prompt_entries.get(number) or [None] * len(ids)
        offsets = TextOffsets(self._names, silent)
        return text, completion_logprobs(entries, ids, self._names, offsets, len(text))


def _progress_chunk(writer: ChunkWriter, index: int, beside: dict[str, Any]) -> bytes:
    return writer.choice(index, "", beside=beside)
