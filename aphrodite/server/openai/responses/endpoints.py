"""`/v1/responses`: OpenAI's Responses API."""

from __future__ import annotations

from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import SamplerPreset
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import ApiError, Headers, invalid, prompt_as, unsupported
from aphrodite.server.generation import Generation
from aphrodite.server.openai.logprobs import num_top_logprobs
from aphrodite.server.openai.protocol import ignored_header, refuse_best_of, refuse_unsupported, sampling_params
from aphrodite.server.openai.responses.answer import Answer, Ending, Keep, response_head
from aphrodite.server.openai.responses.background import BackgroundAnswer
from aphrodite.server.openai.responses.fields import (
    LOGPROBS,
    ResponsesFields,
    field_notes,
    refuse_unsupported_fields,
    text_grammar,
)
from aphrodite.server.openai.responses.items import Item, new_id
from aphrodite.server.openai.responses.prompting import Prompt, conversation_prompt, count_input_tokens
from aphrodite.server.openai.responses.reading import check_calls, read_input
from aphrodite.server.openai.responses.store import Owner, ResponseStore, StoredItem, StoredResponse, stored
from aphrodite.server.openai.warnings import field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.routing import delete, get, post
from aphrodite.server.sse import EventSink, StreamFormat, named_event

_PAGE = 20  # input items that are listed at once
_MAX_PAGE = 100


def responses_routes(context: ServerContext) -> list[Route]:
    """All of the API's routes."""
    endpoints = ResponsesEndpoints(context)
    return [
        post("/v1/responses", endpoints.create),
        post("/v1/responses/input_tokens", endpoints.count),
        get("/v1/responses/{response_id}", endpoints.show),
        delete("/v1/responses/{response_id}", endpoints.delete),
        post("/v1/responses/{response_id}/cancel", endpoints.cancel),
        get("/v1/responses/{response_id}/input_items", endpoints.input_items),
    ]


class ResponsesEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._running: dict[str, BackgroundAnswer] = {}
        config = context.config
        self._store = ResponseStore(max_responses=config.max_stored_responses, max_bytes=config.response_store)

    async def create(self, request: Request) -> Response | ASGIApp:
        """Answer a conversation of items."""
        body, fields = await self._read(request)
        early = _FORMAT if fields.stream and not fields.resumable else None
        context = await self._context.resolve(request, fields.model, stream=early)
        preset = preset_of(request, fields.preset, context.config)
        params = _params(body, fields, context, preset)
        owner = _owner(request)
        conversation = await self._conversation(fields, owner)
        prompt = await conversation_prompt(fields, conversation.items, params, context)
        chat = prompt.chat
        generation = Generation(
            new_id("resp"),
            context.name,
            [chat.token_ids],
            chat.params,
            fields.priority,
            fields.cache_salt,
            progress=fields.stream and fields.return_progress,
        )
        warnings = [*field_warnings(body, ResponsesFields, preset), *_warnings(fields, prompt)]
        is_stored = fields.store and self._store.enabled
        head = response_head(fields, generation, is_stored=is_stored, warnings=warnings)

        def keep(ending: Ending, events: tuple[bytes, ...]) -> None:
            asked = (*conversation.history, *stored(conversation.new))
            self._store.put(StoredResponse(generation.response_id, owner, ending.body, asked, ending.items, events))

        headers = ignored_header(body, ResponsesFields)
        if fields.background:
            if not is_stored:
                raise invalid("background", "needs store to be true, and a server that stores responses")
            answer = Answer(context, generation, fields, head, chat.reader, None)
            name = generation.response_id
            begun = self._in_background(answer, keep, name, context)
            return self._followed(request, name, 0, headers) if fields.stream else json_response(begun, headers)
        answer = Answer(context, generation, fields, head, chat.reader, keep if is_stored else None)
        if fields.stream:
            return self._context.streams.response(
                request,
                generation.response_id,
                answer.stream,
                headers,
                resumable=fields.resumable,
                format=answer.format,
            )
        try:
            whole = await context.supervisor.run(answer.whole(), request.receive)
        except InvalidRequestError as error:
            raise prompt_as(error, "input") from None
        return json_response(whole, headers)

    async def count(self, request: Request) -> Response:
        """How many tokens a conversation of items has, as generation would see it."""
        _, fields = await self._read(request)
        context = await self._context.resolve(request, fields.model)
        conversation = await self._conversation(fields, _owner(request))
        num_tokens = await count_input_tokens(fields, conversation.items, context)
        return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})

    async def show(self, request: Request) -> Response | ASGIApp:
        """A stored response, or its events once more if it is computed in the background."""
        response = self._stored(request)
        running = self._running.get(response.id)
        if request.query_params.get("stream", "false") in ("false", "0"):
            return json_response(response.body if running is None else running.snapshot())
        begin = _number(request, "starting_after", -1, range(-1, 2**31)) + 1
        if running is None and not response.events:
            raise unsupported("stream", "only what is computed in the background is told again; leave it out")
        return self._followed(request, response.id, begin)

    async def delete(self, request: Request) -> Response:
        """Forget a stored response."""
        response = self._stored(request)
        if (running := self._running.get(response.id)) is not None:
            await running.cancel()
        self._store.delete(response.owner, response.id)
        return json_response({"id": response.id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """End an answer that is computed in the background."""
        response = self._stored(request)
        if (running := self._running.get(response.id)) is not None:
            await running.cancel()
        elif not response.events:
            raise invalid(None, "Only a response with background true can be cancelled; to end a stream, close it.")
        return json_response(self._stored(request).body)

    async def input_items(self, request: Request) -> Response:
        """The conversation that a stored response answers, a page at a time."""
        query = request.query_params
        items = list(self._stored(request).input_items)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("order", "must be asc or desc")
        if order == "desc":
            items.reverse()
        limit = _number(request, "limit", _PAGE, range(1, _MAX_PAGE + 1))
        after = query.get("after")
        begin = 0 if after is None else _behind(items, after)
        page = items[begin : begin + limit]
        return json_response(
            {
                "object": "list",
                "data": [msgspec.Raw(item.data) for item in page],
                "first_id": page[0].id if page else "",
                "last_id": page[-1].id if page else "",
                "has_more": begin + len(page) < len(items),
            }
        )

    def _in_background(self, answer: Answer, keep: Keep, name: str, context: ModelContext) -> bytes:
        """Begin to compute an answer; returns what there is of it."""
        hold = ExitStack()
        hold.enter_context(context.loaded.hold())
        hold.callback(self._running.pop, name, None)
        running = self._running[name] = BackgroundAnswer(answer, keep, hold)
        begun = running.snapshot()
        keep(Ending([], "queued", begun, ()), ())
        running.start(context.supervisor, name)
        return begun

    def _followed(self, request: Request, name: str, begin: int, headers: Headers = ()) -> ASGIApp:
        """The events of an answer in the background from number `begin` on, those to come with them."""

        async def tell(events: EventSink) -> None:
            running = self._running.get(name)
            if running is None:
                response = self._store.get(_owner(request), name)
                await events.write(b"".join(response.events[begin:]) if response is not None else b"")
                return
            async with aclosing(running.follow(begin)) as told:
                async for data in told:
                    await events.write(data)

        return self._context.streams.response(request, name, tell, headers, resumable=False, format=_FORMAT)

    async def _read(self, request: Request) -> tuple[dict[str, Any], ResponsesFields]:
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        refuse_unsupported(body, ResponsesFields)
        fields = parse(ResponsesFields, body)
        refuse_unsupported_fields(fields)
        return body, fields

    def _stored(self, request: Request) -> StoredResponse:
        """The response that the path names.

        Raises:
            ApiError: 404, this client has none of that name.
        """
        name = request.path_params["response_id"]
        response = self._store.get(_owner(request), name)
        if response is None:
            raise ApiError(
                404,
                f"Response with id {name[:256]!r} not found: it was never stored, or is no longer.",
                code="response_not_found",
            )
        return response

    async def _conversation(self, fields: ResponsesFields, owner: Owner) -> _Conversation:
        """What a request's input goes on from, and the input.

        Raises:
            ApiError: 400 or 404, naming the field.
        """
        history = self._history(fields.previous_response_id, owner)
        num_items = len(history) + (len(fields.input) if isinstance(fields.input, list) else 1)
        limit = self._context.config.max_messages
        if num_items > limit:
            raise invalid("input", f"has {num_items} items with those it goes on from, more than the {limit} allowed")

        def find(name: str) -> Item | None:
            item = self._store.find_item(owner, name)
            return None if item is None else item.decode()

        new = read_input(fields.input, find)
        size = sum(item.size for item in history)
        known = await off_loop(size, lambda: [item.decode() for item in history])
        check_calls(known, new)
        return _Conversation([*known, *new], history, new)

    def _history(self, name: str | None, owner: Owner) -> tuple[StoredItem, ...]:
        if name is None:
            return ()
        response = self._store.get(owner, name)
        if response is not None and response.id in self._running:
            why = "is still being computed; wait until its status is completed"
            raise invalid("previous_response_id", why, code="previous_response_not_completed")
        if response is None:
            raise ApiError(
                400,
                f"Previous response with id {name!r} not found: it was never stored, or is no longer.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return response.items


@dataclass(frozen=True, slots=True)
class _Conversation:
    """What a request asks about.

    Attributes:
        items: all of it.
        history: what was stored of it before.
        new: the request's own input.
    """

    items: list[Item]
    history: tuple[StoredItem, ...]
    new: list[Item]


def _owner(request: Request) -> Owner:
    owner: Owner = request.scope["state"]["api_key_digest"]
    return owner


def _params(
    body: dict[str, Any], fields: ResponsesFields, context: ModelContext, preset: SamplerPreset | None
) -> SamplingParams:
    """The sampling parameters, checked."""
    model = context.engine.model
    grammar = text_grammar(fields.text)
    wanted = fields.top_logprobs or (0 if LOGPROBS in fields.include else None)
    base = msgspec.structs.replace(
        model.sampling_defaults, grammar=grammar, logprobs=None if wanted is None else num_top_logprobs(wanted, model)
    )
    params = sampling_params(body, ResponsesFields, model, base=base, preset=preset)
    if grammar is not None and params.grammar != grammar:
        raise invalid("text.format", "and another field both say what the answer has to be; send one of them")
    refuse_best_of(fields.best_of, params.n)
    if params.n != 1:
        raise unsupported("n", "a response is one answer; leave it out")
    if params.prompt_logprobs is not None and fields.stream:
        raise invalid("prompt_logprobs", "come with whole answers only; leave out stream")
    return params


def _warnings(fields: ResponsesFields, prompt: Prompt) -> list[str]:
    warnings = field_notes(fields)
    warnings += (text.replace("reasoning_effort", "reasoning.effort") for text in prompt.chat.warnings)
    if prompt.num_dropped:
        warnings.append(f"The conversation was too long: its first {prompt.num_dropped} items were left out.")
    return warnings


def _number(request: Request, name: str, default: int, allowed: range) -> int:
    """An integer of the path's query."""
    text = request.query_params.get(name, str(default))
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12 and int(text) in allowed):
        raise invalid(name, f"must be {allowed[0]} to {allowed[-1]}")
    return int(text)


def _failed(error: ApiError) -> bytes:
    """The event of what went wrong while events were told again."""
    told = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return named_event("error", msgspec.json.encode({**told, "sequence_number": 0}))


_FORMAT = StreamFormat(mark=b"", failure=_failed)


def _behind(items: list[StoredItem], name: str) -> int:
    """Where the items after the last one of that name begin: a client may have named several alike."""
    for index in range(len(items), 0, -1):
        if items[index - 1].id == name:
            return index
    raise invalid("after", f"no input item has the id {name[:256]!r}")
