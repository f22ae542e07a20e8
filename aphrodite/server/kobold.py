"""KoboldAI's API with koboldcpp's additions: `/api/v1`, `/api/latest`, `/api/extra`.

Sampling parameters go by the names of all endpoints, koboldcpp's among them (`rep_pen`, `typical`, `sampler_order`,
`dry_penalty_last_n`, …). Where a request says nothing, the model's recommendation holds as it does everywhere, not
koboldcpp's fixed values.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.core.finish import GRAMMAR_COMPLETE
from aphrodite.engine.messages import EngineStats
from aphrodite.engine.output import merge_outputs
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.body import BYTES_PER_TOKEN, off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import ApiError, invalid, unsupported
from aphrodite.server.generation import Generation, stream_pieces
from aphrodite.server.openai.finish import openai_finish_reason
from aphrodite.server.openai.logprobs import TokenNames, chat_logprobs
from aphrodite.server.openai.prompts import check_ids, encode
from aphrodite.server.openai.protocol import ignored_header, refuse_unsupported, sampling_params, without_empty_stops
from aphrodite.server.openai.warnings import budget_warnings, field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.routing import get, post
from aphrodite.server.sse import EventResponse, EventStream, StreamFormat, named_event

API_VERSION = "1.2.5"  # of KoboldAI's API
# Clients ask for it to know what they may send. From 1.88 on KoboldAI Lite writes its prompts with {{[INPUT]}} and the
# like, in place of which koboldcpp puts the marks of the model's template; here the model would read them as they are.
KOBOLDCPP_VERSION = "1.87"
DEFAULT_LENGTH = 512
_TOP_LOGPROBS = 5
_ABORTED = b'{"token":"","finish_reason":"stop"}'


class KoboldFields(pydantic.BaseModel):
    """`POST /api/v1/generate` and `POST /api/extra/generate/stream`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    prompt: str = Field(default="", description="The text to continue.")
    memory: str = Field(default="", description="Text put before the prompt, which loses its beginning to make room.")
    max_length: int | None = Field(
        default=None,
        description="Most tokens of the answer; by default 512, or half of a shorter context.",
        ge=1,
        le=2**31 - 1,
    )
    max_context_length: int | None = Field(
        default=None,
        description="Most tokens of prompt and answer; by default the model's context.",
        ge=1,
        le=2**31 - 1,
    )
    genkey: str = Field(default="", description="A name by which the run can be looked at and ended.", max_length=256)
    trim_stop: bool = Field(default=True, description="Leave the stop sequence out of the text.")
    bypass_eos: bool = Field(default=False, description="Go on behind end-of-sequence tokens.")
    render_special: bool = Field(default=False, description="Show special tokens in the text.")
    use_default_badwordsids: bool = Field(default=False, description="Bar end-of-sequence tokens.")
    logprobs: bool = Field(default=False, description="Add log-probabilities of the answer's tokens.")
    preset: str | None = Field(default=None, description="A sampler preset of /v1/presets.", max_length=256)
    images: list[Any] = Field(default=[], description="Must be empty: this model reads text only.")
    quiet: bool = Field(default=False, description="Has no meaning here: texts are never printed.")


class KoboldKeyFields(pydantic.BaseModel):
    """Which run is meant."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    genkey: str = Field(default="", description="As the run was named.", max_length=256)


class KoboldTextFields(pydantic.BaseModel):
    """`POST /api/extra/tokencount`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    prompt: str = Field(default="", description="The text.")
    special: bool = Field(default=True, description="Let the tokenizer add begin-of-sequence and the like.")


class KoboldTokensFields(pydantic.BaseModel):
    """`POST /api/extra/detokenize`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    ids: list[int] = Field(description="Token ids.")


def kobold_error(error: ApiError) -> dict[str, Any]:
    """An error as koboldcpp writes it."""
    return {"detail": {"msg": error.message, "type": error.code or error.kind, "param": error.param}}


def _failure(error: ApiError) -> bytes:
    return named_event("error", error.encode(kobold_error))


_FORMAT = StreamFormat(mark=b"", failure=_failure)


class Run:
    """A generation while it runs: what it wrote so far, and the way to end it before its time."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.texts: list[str] = []  # of its first answer, piece by piece
        self._ended = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None  # that which waits for the next piece, while it does

    def end(self) -> None:
        """Have the next piece be the last that came."""
        if self._ended.is_set():  # a second cancellation would pass for one by the server
            return
        self._ended.set()
        if self._task is not None:
            self._task.cancel()

    async def next_of(self, stream: AsyncGenerator[tuple[int, RequestOutput], None]) -> RequestOutput | None:
        """The stream's next piece; None at its end, or once the run is ended."""
        if self._ended.is_set():
            return None
        task = self._task = asyncio.current_task()
        try:
            piece = await anext(stream, None)
        except asyncio.CancelledError:
            if not self._ended.is_set() or task is None or task.uncancel():
                raise  # the client has gone, or the server stops
            return None
        finally:
            self._task = None
        return None if piece is None else piece[1]


@dataclass(slots=True)
class Performance:
    """What `/api/extra/perf` tells of the latest run. Seconds."""

    began: float = field(default_factory=time.monotonic)
    latest: float = field(default_factory=time.monotonic)
    process: float = 0.0  # its prompt, waiting included
    generation: float = 0.0
    tokens: int = 0
    runs: int = 0
    stop_reason: int = -1  # koboldcpp's: 0 length, 1 end of sequence, 2 stop sequence

    def observe(self, began: float, first: float | None, last: Mapping[int, CompletionOutput]) -> None:
        """A run has come to its end; `first` is when its first piece came, `last` each answer's last piece."""
        self.latest = time.monotonic()
        self.process = (first or self.latest) - began
        self.generation = self.latest - (first or self.latest)
        self.tokens = sum(answer.num_tokens for answer in last.values())
        self.runs += 1
        answer = next(iter(last.values()))
        by_itself = answer.stop_reason in (None, GRAMMAR_COMPLETE)  # koboldcpp's grammars end with the end of sequence
        self.stop_reason = 0 if answer.finish_reason == "length" else 1 if by_itself else 2


def kobold_routes(context: ServerContext) -> list[Route]:
    """All of the protocol's routes."""
    generate = GenerateEndpoints(context)
    facts = FactEndpoints(context, generate)
    routes = []
    for prefix in ("/api/v1", "/api/latest"):
        routes += [
            post(f"{prefix}/generate", generate.whole),
            get(f"{prefix}/model", facts.model),
            get(f"{prefix}/info/version", facts.api_version),
            get(f"{prefix}/config/max_length", facts.max_length),
            get(f"{prefix}/config/max_context_length", facts.max_context_length),
            get(f"{prefix}/config/soft_prompt", facts.soft_prompt),
            get(f"{prefix}/config/soft_prompts_list", facts.soft_prompts),
        ]
    return [
        *routes,
        post("/api/extra/generate/stream", generate.stream),
        get("/api/extra/generate/check", generate.check_any),
        post("/api/extra/generate/check", generate.check),
        post("/api/extra/abort", generate.abort),
        post("/api/extra/tokencount", facts.token_count),
        post("/api/extra/tokenize", facts.token_count),
        post("/api/extra/detokenize", facts.detokenize),
        get("/api/extra/true_max_context_length", facts.max_context_length),
        get("/api/extra/version", facts.version),
        get("/api/extra/perf", facts.performance),
        get("/api/extra/preloadstory", facts.story),
    ]


class GenerateEndpoints:
    """Runs, and what may be asked of them while they run."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._runs: list[Run] = []
        self.performance = Performance()

    async def whole(self, request: Request) -> Response:
        """Continue a text."""
        job = await self._read(request)
        body = await self._context.supervisor.run(self._whole(job), request.receive)
        return json_response(body, job.headers)

    async def stream(self, request: Request) -> ASGIApp:
        """Continue a text, sent piece by piece."""
        job = await self._read(request, _FORMAT)
        if job.generation.params.n > 1:
            raise unsupported("n", "only one answer can be streamed here; use /v1/completions for more")

        async def produce(events: EventStream) -> None:
            finished = False
            async with aclosing(self._pieces(job)) as pieces:
                async for output in pieces:
                    finished = output.finished
                    for answer in output.outputs:
                        await events.write(named_event("message", self._event(job, answer)))
            if not finished:
                await events.write(named_event("message", _ABORTED))

        config = self._context.config
        return EventResponse(
            produce,
            self._context.supervisor,
            write_timeout=config.write_timeout,
            headers=job.headers,
            format=_FORMAT,
        )

    async def check_any(self, request: Request) -> Response:
        """The text so far of the only run that there is."""
        return json_response({"results": [{"text": self._text("")}]})

    async def check(self, request: Request) -> Response:
        """The text so far of a run."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth, optional=True)
        return json_response({"results": [{"text": self._text(parse(KoboldKeyFields, body).genkey)}]})

    async def abort(self, request: Request) -> Response:
        """End a run; it answers with what it has."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth, optional=True)
        runs = self._found(parse(KoboldKeyFields, body).genkey)
        for run in runs:
            run.end()
        success = "true" if runs else "false"
        return json_response({"success": success, "done": success})

    def _found(self, key: str) -> list[Run]:
        """The runs of a key; without one the only run there is, so that nobody meets a stranger's."""
        if key:
            return [run for run in self._runs if run.key == key]
        return self._runs if len(self._runs) == 1 else []

    def _text(self, key: str) -> str:
        runs = self._found(key)
        return "".join(runs[-1].texts) if runs else ""

    async def _read(self, request: Request, stream: StreamFormat | None = None) -> _Job:
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        refuse_unsupported({name: value for name, value in body.items() if name not in KoboldFields.model_fields})
        fields = parse(KoboldFields, body)
        if fields.images:
            raise unsupported("images", "this model reads text only; leave it out")
        context = await self._context.resolve(request, None, stream=stream)
        model = context.engine.model
        limit = min(fields.max_context_length or model.max_model_len, model.max_model_len)
        length = fields.max_length or default_length(limit)
        if length >= limit:
            raise invalid("max_length", f"is {length}, which leaves no room for a prompt in a context of {limit}")
        preset = preset_of(request, fields.preset, context.config)
        base = _base(fields, length, context)
        params = sampling_params(without_empty_stops(body), KoboldFields, model, base=base, preset=preset)
        token_ids = await _prompt(fields, max(1, limit - (params.max_tokens or 0)), context)
        generation = Generation.of("kobold", context.name, [token_ids], params)
        warnings = field_warnings(body, KoboldFields, preset) + budget_warnings(params, context)
        return _Job(context, generation, fields, warnings, ignored_header(body, KoboldFields))

    async def _pieces(self, job: _Job) -> AsyncGenerator[RequestOutput, None]:
        """The run's pieces until it ends, or until somebody ends it."""
        began = time.monotonic()
        first: float | None = None
        last: dict[int, CompletionOutput] = {}
        stream = stream_pieces(job.context, job.generation)
        async with aclosing(stream):
            with self._running(job.fields.genkey) as run:
                while (output := await run.next_of(stream)) is not None:
                    first = first or time.monotonic()
                    run.texts += [answer.text for answer in output.outputs if answer.index == 0]
                    last |= {answer.index: answer for answer in output.outputs}
                    yield output
        if last:
            self.performance.observe(began, first, last)

    async def _whole(self, job: _Job) -> bytes:
        async with aclosing(self._pieces(job)) as stream:
            pieces = [output async for output in stream]
        outputs = merge_outputs(pieces).outputs if pieces else []
        num_prompt = len(job.generation.prompts[0])

        def build() -> bytes:
            results = [self._result(job, answer, num_prompt) for answer in outputs] or [{"text": ""}]
            body: dict[str, Any] = {"results": results}
            if job.warnings:
                body["warnings"] = job.warnings
            return msgspec.json.encode(body)

        return await off_loop(sum(answer.num_tokens for answer in outputs) * BYTES_PER_TOKEN, build)

    def _result(self, job: _Job, answer: CompletionOutput, num_prompt: int) -> dict[str, Any]:
        return {
            "text": answer.text,
            "finish_reason": openai_finish_reason(answer) or "stop",  # without one it was ended by /abort
            "logprobs": self._logprobs(job, answer),
            "prompt_tokens": num_prompt,
            "completion_tokens": answer.num_tokens,
        }

    def _event(self, job: _Job, answer: CompletionOutput) -> bytes:
        content: dict[str, Any] = {"token": answer.text, "finish_reason": openai_finish_reason(answer)}
        if job.fields.logprobs:
            content["logprobs"] = self._logprobs(job, answer)
        return msgspec.json.encode(content)

    def _logprobs(self, job: _Job, answer: CompletionOutput) -> dict[str, Any] | None:
        if not job.fields.logprobs or answer.logprobs is None:
            return None
        names = TokenNames(job.context.engine.tokenizer, as_ids=False)
        return chat_logprobs(answer.logprobs, names)

    @contextmanager
    def _running(self, key: str) -> Iterator[Run]:
        run = Run(key)
        self._runs.append(run)
        try:
            yield run
        finally:
            self._runs.remove(run)


@dataclass(frozen=True, slots=True)
class _Job:
    """What was read of a request."""

    context: ModelContext
    generation: Generation
    fields: KoboldFields
    warnings: list[str]
    headers: tuple[tuple[bytes, bytes], ...]


def default_length(context_length: int) -> int:
    """Tokens of an answer where the request does not say."""
    return max(1, min(DEFAULT_LENGTH, context_length // 2))


def _base(fields: KoboldFields, length: int, context: ModelContext) -> SamplingParams:
    """What the protocol's own fields mean, before the sampling parameters."""
    defaults = context.engine.model.sampling_defaults
    return msgspec.structs.replace(
        defaults,
        max_tokens=length,
        include_stop_str_in_output=not fields.trim_stop,
        ignore_eos=fields.bypass_eos,
        skip_special_tokens=not fields.render_special,
        ban_eos_token=fields.use_default_badwordsids,
        logprobs=min(_TOP_LOGPROBS, context.engine.model.max_logprobs) if fields.logprobs else None,
    )


async def _prompt(fields: KoboldFields, room: int, context: ModelContext) -> list[int]:
    """Memory and prompt in at most `room` tokens; the prompt's beginning gives way."""
    memory: list[int] = []
    if fields.memory:
        memory = await encode(fields.memory, context, field="memory", special=True, bounded=False)
    prompt = await encode(fields.prompt, context, field="prompt", special=not memory, bounded=False)
    token_ids = fitted(memory, prompt, room, context.engine.tokenizer.bos_token_id)
    if not token_ids:
        raise invalid("prompt", "is empty, and this model has no token that starts a document")
    return token_ids


def fitted(memory: list[int], prompt: list[int], room: int, bos: int | None) -> list[int]:
    """`memory` and `prompt` in at most `room` tokens: the prompt loses its beginning, then the memory loses its.

    A leading `bos` stays where it is; an empty text is one.
    """
    whole = memory + prompt
    if not whole:
        return [] if bos is None else [bos]
    start = whole[:1] if bos is not None and whole[0] == bos else []
    memory = memory[len(start) :] if memory else []
    prompt = prompt if memory or whole[: len(start)] != prompt[: len(start)] else prompt[len(start) :]
    room -= len(start)
    kept = memory[-room:] if room > 0 else []
    left = room - len(kept)
    return start + kept + (prompt[-left:] if left > 0 else [])


class FactEndpoints:
    """What clients ask about the server, the model and texts."""

    def __init__(self, context: ServerContext, generate: GenerateEndpoints) -> None:
        self._context = context
        self._generate = generate

    async def model(self, request: Request) -> Response:
        """The model's name."""
        return json_response({"result": f"aphrodite/{self._context.models.find(None).name}"})

    async def api_version(self, request: Request) -> Response:
        """The version of KoboldAI's API."""
        return json_response({"result": API_VERSION})

    async def version(self, request: Request) -> Response:
        """The version of koboldcpp whose additions there are, and what of it there is."""
        missing = dict.fromkeys(
            ("txt2img", "vision", "audio", "transcribe", "multiplayer", "websearch", "tts", "embeddings", "savedata"),
            False,
        )
        protected = bool(self._context.config.api_keys)
        return json_response(
            {
                "result": "KoboldCpp",
                "version": KOBOLDCPP_VERSION,
                "protected": protected,
                "llm": True,
                **missing,
                "admin": 2 if self._context.config.admin_keys and self._context.models.loads else 0,
            }
        )

    async def max_length(self, request: Request) -> Response:
        """How long answers are where a request says nothing."""
        context = await self._context.resolve(request, None)
        return json_response({"value": default_length(context.engine.model.max_model_len)})

    async def max_context_length(self, request: Request) -> Response:
        """The model's context."""
        context = await self._context.resolve(request, None)
        return json_response({"value": context.engine.model.max_model_len})

    async def soft_prompt(self, request: Request) -> Response:
        """The soft prompt in use: none."""
        return json_response({"value": ""})

    async def soft_prompts(self, request: Request) -> Response:
        """The soft prompts: none."""
        return json_response({"values": []})

    async def story(self, request: Request) -> Response:
        """The preloaded story: none."""
        return json_response({})

    async def performance(self, request: Request) -> Response:
        """How the latest run went, and what waits."""
        loaded = self._context.current()
        seen, stats = self._generate.performance, EngineStats() if loaded is None else loaded.engine.stats()
        now = time.monotonic()
        running = stats.num_running + stats.num_waiting
        return json_response(
            {
                "last_process": seen.process,
                "last_eval": seen.generation,
                "last_token_count": seen.tokens,
                "last_seed": -1,
                "total_gens": seen.runs,
                "stop_reason": seen.stop_reason,
                "total_img_gens": 0,
                "queue": stats.num_waiting,
                "idle": int(running == 0),
                "hordeexitcounter": 0,
                "uptime": now - seen.began,
                "idletime": now - seen.latest if running == 0 else 0.0,
                "quiet": True,
            }
        )

    async def token_count(self, request: Request) -> Response:
        """Token ids of a text, and how many."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(KoboldTextFields, body)
        context = await self._context.resolve(request, None)
        ids = await encode(fields.prompt, context, field="prompt", special=fields.special, bounded=False)
        return json_response({"value": len(ids), "ids": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        ids = parse(KoboldTokensFields, body).ids
        context = await self._context.resolve(request, None)
        check_ids(ids, context, field="ids")
        tokenizer = context.engine.tokenizer
        text = await off_loop(BYTES_PER_TOKEN * len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))
        return json_response({"result": text, "success": True})
