"""One response: its body, and its events where it is streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from aphrodite.chat.events import Event, TextPiece
from aphrodite.engine.output import merge_outputs
from aphrodite.errors import InvalidRequestError
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.server.body import off_loop
from aphrodite.server.context import ModelContext
from aphrodite.server.errors import ApiError, prompt_as
from aphrodite.server.generation import Generation, UsageCounter, stream_pieces
from aphrodite.server.openai.answers import AnswerReader
from aphrodite.server.openai.finish import answer_extras
from aphrodite.server.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from aphrodite.server.openai.responses.fields import ResponsesFields, echoed_tools
from aphrodite.server.openai.responses.items import new_id
from aphrodite.server.openai.responses.output import OutputBuilder, StreamEvent
from aphrodite.server.openai.responses.store import StoredItem, stored
from aphrodite.server.sse import EventSink, StreamFormat, named_event

_ERROR_CODES = {429: "rate_limit_exceeded"}  # OpenAI's clients know no others that would fit


def response_head(
    fields: ResponsesFields, generation: Generation, *, is_stored: bool, warnings: list[str]
) -> dict[str, Any]:
    """What a response says from its beginning: the settings that it was made with."""
    params = generation.params
    return {
        "id": generation.response_id,
        "object": "response",
        "created_at": generation.created,
        "completed_at": None,
        "status": "in_progress",
        "background": fields.background,
        "error": None,
        "frequency_penalty": params.frequency_penalty,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": params.max_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata,
        "model": generation.model,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls,
        "presence_penalty": params.presence_penalty,
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "reasoning": {"effort": fields.reasoning.effort, "summary": None},
        "safety_identifier": fields.safety_identifier,
        "service_tier": "default",
        "store": is_stored,
        "temperature": params.temperature,
        "text": {"format": fields.text.format or {"type": "text"}, "verbosity": fields.text.verbosity or "medium"},
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "tools": echoed_tools(fields),
        "top_logprobs": params.logprobs or 0,
        "top_p": params.top_p,
        "truncation": fields.truncation,
        "usage": None,
        "user": fields.user,
        **({"warnings": warnings} if warnings else {}),
    }


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an answer: its last events, and the whole of it."""

    events: list[StreamEvent]
    status: str
    body: bytes
    items: tuple[StoredItem, ...]


Keep = Callable[[Ending, tuple[bytes, ...]], None]
"""Stores the end of an answer, with its events if they may be told again."""


class Answer:
    """One request's answer, streamed or whole.

    Args:
        head: what it says from its beginning.
        reader: takes the answer apart; None: it is text.
        keep: stores it once it is complete, None: nothing does.

    Attributes:
        ending: None until it is complete.
    """

    def __init__(
        self,
        context: ModelContext,
        generation: Generation,
        fields: ResponsesFields,
        head: dict[str, Any],
        reader: AnswerReader | None,
        keep: Keep | None,
    ) -> None:
        self._context = context
        self._generation = generation
        self._head = head
        self._reader = reader
        self._keep = keep
        self.ending: Ending | None = None
        self._token_ids = fields.return_token_ids
        self._timed = fields.return_timings
        self._names = TokenNames(context.engine.tokenizer, as_ids=fields.return_tokens_as_token_ids)
        self._builder = OutputBuilder(_new_call_id if reader is None else reader.call_id)
        self._counter = UsageCounter(generation.prompts)
        self._pieces: list[RequestOutput] = []  # all, if the whole tells of each token; else the last
        self._num_sent = 0  # events

    @property
    def format(self) -> StreamFormat:
        """How its stream is written. No mark ends it: the last event tells that it is the last."""
        return StreamFormat(mark=b"", failure=self._failure)

    async def whole(self) -> bytes:
        """The response's body."""
        async with aclosing(self._told()) as told:
            async for _ in told:
                pass
        return (await self._end()).body

    async def stream(self, events: EventSink) -> None:
        """Write the response's events."""
        async with aclosing(self.events()) as told:
            async for lines in told:
                await events.write(b"".join(lines))

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """The response's events on the wire as they come, one an entry; the last one has the whole of it."""
        try:
            async with aclosing(self._told()) as told:
                async for piece in told:
                    if lines := self._encoded(piece):
                        yield lines
        except InvalidRequestError as error:
            raise prompt_as(error, "input") from None
        ending = await self._end()
        last = {"type": f"response.{ending.status}", "response": msgspec.Raw(ending.body)}
        yield self._encoded([*ending.events, last])

    def snapshot(self) -> bytes:
        """The body of a response that is not complete."""
        return msgspec.json.encode(self._head | {"status": "in_progress" if self._num_sent else "queued"})

    def stop(self, error: ApiError | None) -> list[bytes]:
        """The last event of a response that will not be complete: it failed; None: it was cancelled."""
        items = self._builder.items
        response = self._head | {"output": items, "status": "cancelled" if error is None else "failed"}
        if error is not None:
            code = "server_error" if error.status >= 500 else _ERROR_CODES.get(error.status, "invalid_prompt")
            response["error"] = {"code": code, "message": error.message}
        body = msgspec.json.encode(response)
        self.ending = Ending([], response["status"], body, stored(items))
        kind = "response.incomplete" if error is None else "response.failed"  # there is none for what was cancelled
        return self._encoded([{"type": kind, "response": msgspec.Raw(body)}])

    async def _told(self) -> AsyncGenerator[list[StreamEvent], None]:
        """What each piece of the answer brings."""
        params = self._generation.params
        detailed = self._token_ids or params.sampler_trace or params.prompt_logprobs is not None
        pieces = stream_pieces(self._context, self._generation)
        async with aclosing(pieces):
            async for _, output in pieces:
                self._counter.observe(0, output)
                if not detailed:
                    self._pieces.clear()
                self._pieces.append(output)
                told = self._progress(output) if self._generation.progress else []
                for answer in output.outputs:
                    logprobs = [] if answer.logprobs is None else chat_logprobs(answer.logprobs, self._names)["content"]
                    told += self._builder.feed(self._read(answer), logprobs)
                yield told

    def _progress(self, output: RequestOutput) -> list[StreamEvent]:
        """How much of the prompt is computed, until the answer begins; OpenAI has no event of its own for it."""
        if self._builder.begun:
            return []
        progress = self._counter.progress(0, output)
        return [{"type": "response.in_progress", "response": self._head, "prompt_progress": progress}]

    def _read(self, answer: CompletionOutput) -> list[Event]:
        if self._reader is not None:
            return self._reader.read(answer)
        return [TextPiece(answer.text)] if answer.text else []

    def _encoded(self, told: list[StreamEvent]) -> list[bytes]:
        """Events on the wire, numbered; those that open a response before the first."""
        if not self._num_sent:
            opening = [{"type": f"response.{name}", "response": self._head} for name in ("created", "in_progress")]
            told = [*opening, *told]
        lines = []
        for event in told:
            lines.append(named_event(event["type"], msgspec.json.encode({**event, "sequence_number": self._num_sent})))
            self._num_sent += 1
        return lines

    async def _end(self) -> Ending:
        """The end of an answer that was read, stored if it is to be."""
        size = self._generation.body_bytes(self._counter.usage()["total_tokens"])
        self.ending = await off_loop(size, self._ending)
        if self._keep is not None:
            self._keep(self.ending, ())
        return self.ending

    def _ending(self) -> Ending:
        output = merge_outputs(self._pieces)
        (answer,) = output.outputs
        incomplete = answer.finish_reason == "length"
        events = self._builder.finish(incomplete=incomplete)
        items = self._builder.items
        status = "incomplete" if incomplete else "completed"
        response = self._head | {
            "status": status,
            "completed_at": None if incomplete else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "output": items,
            "usage": self._usage(),
            **self._details(output, answer),
        }
        return Ending(events, status, msgspec.json.encode(response), stored(items))

    def _details(self, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
        """What a response says beyond OpenAI's."""
        details = answer_extras(answer, self._names, token_ids=self._token_ids)
        if answer.warnings:
            details["warnings"] = [*self._head.get("warnings", ()), *answer.warnings]
        if self._token_ids:
            details["prompt_token_ids"] = output.prompt_token_ids
        if self._timed:
            details["timings"] = self._counter.timings()
        if output.prompt_logprobs is not None:
            details["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._names)
        return details

    def _usage(self) -> dict[str, Any]:
        """Token counts under the names that they have here."""
        usage = self._counter.usage()
        thought = 0
        if self._reader is not None:
            thought = self._reader.usage_details()["completion_tokens_details"]["reasoning_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": usage["total_tokens"],
        }

    def _failure(self, error: ApiError) -> bytes:
        return b"".join(self.stop(error))


def _new_call_id() -> str:
    return new_id("call")
