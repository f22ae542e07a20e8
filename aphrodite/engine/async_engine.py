"""The engine for asyncio programs: requests in, streams of text out, the model in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aphrodite.chat.library import load_chat_template, recognised_chat_template
from aphrodite.chat.template import ChatTemplate
from aphrodite.config import EngineConfig
from aphrodite.core.plan import Pooling
from aphrodite.engine.client import EngineProcess, ProgressCallback
from aphrodite.engine.embedding import (
    PROMPT_ONLY,
    EmbeddingOutput,
    EmbeddingParams,
    check_embedding,
    embedding_of,
)
from aphrodite.engine.grammar_check import GrammarChecker
from aphrodite.engine.loaded_adapters import LoadedAdapter, LoadedAdapters
from aphrodite.engine.messages import (
    AbortRequests,
    AdapterNews,
    AddRequest,
    EmbeddingInfo,
    EngineInfo,
    EngineStats,
    Fatal,
    LoadAdapter,
    Ping,
    Pong,
    ResetPrefixCache,
    StepOutputs,
    UnloadAdapter,
)
from aphrodite.engine.output import RequestStream
from aphrodite.engine.preparation import (
    answer_seeds,
    check_guidance,
    check_prompt,
    model_root,
    resolve_model,
    tokenize_negative_prompt,
    tokenize_words,
    tokenizer_path,
    wants_negative_prompt,
)
from aphrodite.errors import AphroditeError, EngineDeadError, QueueFullError
from aphrodite.outputs import RequestOutput
from aphrodite.sampling.fields import validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model as clients see it."""

    name: str
    aliases: tuple[str, ...]
    root: str
    max_model_len: int
    max_num_seqs: int  # answers that can run at once
    num_cache_tokens: int  # that the KV cache holds
    vocab_size: int
    max_logprobs: int
    created: int  # Unix seconds
    sampling_defaults: SamplingParams  # of requests that name no values
    embedding: EmbeddingInfo


class _Consumer:
    """One request's queue of pieces and the signal that one has come."""

    __slots__ = ("error", "event", "pieces", "stream")

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.pieces: list[RequestOutput] = []
        self.event = asyncio.Event()
        self.error: Exception | None = None


class AsyncEngine:
    """Serves many requests at once. Make one with `await AsyncEngine.start(config)`.

    Attributes:
        model: what is served.
        tokenizer, chat_template: the model's, or a template of the library that suits it.
        info: what the engine process said of itself.
        adapters: those that requests may name.
        dead: set when the engine process is gone; every request then fails with `EngineDeadError`.
    """

    def __init__(
        self,
        process: EngineProcess,
        info: EngineInfo,
        config: EngineConfig,
        path: Path,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
    ) -> None:
        names = config.served_model_name or (info.model,)
        self.info = info
        self.tokenizer = tokenizer
        self.chat_template = chat_template or recognised_chat_template(
            tokenizer, name=f"{info.model} {path.name}", family=info.family
        )
        self.model = ModelInfo(
            name=names[0],
            aliases=tuple(names[1:]),
            root=model_root(path),
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            num_cache_tokens=info.num_blocks * info.block_size,
            vocab_size=info.vocab_size,
            max_logprobs=config.max_logprobs,
            created=int(time.time()),
            sampling_defaults=info.sampling_defaults,
            embedding=info.embedding,
        )
        self.adapters = LoadedAdapters(config.lora, info.adapters)
        self.dead = asyncio.Event()
        self._config = config
        self._process = process
        self._grammars = GrammarChecker(tokenizer_path(config), info.vocab_size)
        self._stats = EngineStats()
        self._consumers: dict[str, _Consumer] = {}  # by answer id
        self._answer_numbers = itertools.count()
        self._ping_numbers = itertools.count()
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._adapter_news: dict[int, asyncio.Future[LoadedAdapter | None]] = {}
        self._reader = asyncio.create_task(self._read(), name="engine-reader")

    @classmethod
    async def start(cls, config: EngineConfig, progress: ProgressCallback | None = None) -> AsyncEngine:
        """Start the engine process and wait until the model is loaded.

        Raises:
            AphroditeError: the model cannot be found, read or fitted; the message says what to do.
        """
        config, path = await asyncio.to_thread(resolve_model, config)
        process = EngineProcess(config)
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, tokenizer_path(config))
            template = load_chat_template(config.chat_template, tokenizer)  # a wrong name costs no loading
            info = await process.wait_ready(progress)
            return cls(process, info, config, path, tokenizer, template)
        except BaseException:
            process.kill()
            raise

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | None = None,
        progress: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        """Stream a request's answers piece by piece. Closing the iterator aborts the request.

        Args:
            request_id: a label that comes back in the pieces; it identifies nothing inside the engine.
            adapter: name of the adapter that computes them, None for the model alone.
            progress: pieces without answers tell how far a prompt of several steps is.

        Raises:
            InvalidRequestError: a parameter or the prompt is out of bounds, or the grammar cannot be used.
            QueueFullError: too many requests wait already.
            EngineDeadError: the engine process is gone.
        """
        self._check_alive()
        self._check(prompt_token_ids, params)
        if params.grammar is not None:
            await self._grammars.check_async(params.grammar)
        if params.bad_words:  # in a thread, for many long words would keep the others' streams waiting
            params = await asyncio.to_thread(tokenize_words, params, self.tokenizer, self.info.vocab_size)
        if wants_negative_prompt(params):
            limit = self.info.max_model_len
            params = await asyncio.to_thread(tokenize_negative_prompt, params, self.tokenizer, limit)
        check_guidance(prompt_token_ids, params, self.info)
        number = self.adapters.number(adapter)
        consumer = self._submit(
            prompt_token_ids, params, request_id, priority, cache_salt, progress=progress, adapter=number
        )
        stream = consumer.stream
        try:
            while True:
                await consumer.event.wait()
                consumer.event.clear()
                pieces, consumer.pieces = consumer.pieces, []
                for piece in pieces:
                    yield piece
                    if piece.finished:
                        return
                if consumer.error is not None:
                    raise consumer.error
        finally:
            self._forget(stream)

    async def embed(
        self,
        prompt_token_ids: list[int],
        params: EmbeddingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> EmbeddingOutput:
        """One prompt's embedding, by the adapter of that name if one is given. Cancelling it aborts the request.

        Raises:
            InvalidRequestError: a parameter or the prompt is out of bounds, or the model makes no embeddings.
            QueueFullError: too many requests wait already.
            EngineDeadError: the engine process is gone.
            RequestFailedError: the engine could not finish it.
        """
        self._check_alive()
        info = self.info.embedding
        check_embedding(params, info)
        self._check(prompt_token_ids, PROMPT_ONLY)
        pooling = params.pooling or info.pooling
        number = self.adapters.number(adapter)
        consumer = self._submit(
            prompt_token_ids, PROMPT_ONLY, request_id, priority, cache_salt, pooling=pooling, adapter=number
        )
        try:
            await consumer.event.wait()
        finally:
            self._forget(consumer.stream)
        if consumer.error is not None:
            raise consumer.error
        (end,) = consumer.pieces
        return embedding_of(end, params, info)

    def stats(self) -> EngineStats:
        """Counters and gauges as of the engine's latest step."""
        return self._stats

    async def check_health(self) -> None:
        """Go once through the engine loop, however long that takes: the caller sets the limit.

        Raises:
            EngineDeadError: the engine is gone.
        """
        self._check_alive()
        number = next(self._ping_numbers)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs[number] = answered
        self._process.send(Ping(number))
        try:
            await answered
        finally:
            self._pongs.pop(number, None)

    async def load_adapter(self, name: str, path: str) -> LoadedAdapter:
        """Load an adapter, a PEFT folder or a GGUF file, that requests may name from then on.

        Raises:
            InvalidRequestError: the name is taken.
            ConfigError: the adapter does not fit the model, cannot be read, or there is no room for any.
            EngineDeadError: the engine is gone.
        """
        self._check_alive()
        number = self.adapters.begin(name, path)
        adapter = await self._hear_of(number, LoadAdapter(number, path))
        assert adapter is not None
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """Offer an adapter to no further request, and wait until those that use it have ended and it is gone.

        Raises:
            InvalidRequestError: there is none of this name.
            EngineDeadError: the engine is gone.
        """
        self._check_alive()
        number = self.adapters.leave(name)
        await self._hear_of(number, UnloadAdapter(number))

    async def _hear_of(self, number: int, message: LoadAdapter | UnloadAdapter) -> LoadedAdapter | None:
        heard: asyncio.Future[LoadedAdapter | None] = asyncio.get_running_loop().create_future()
        self._adapter_news[number] = heard
        self._process.send(message)
        return await heard

    async def reset_prefix_cache(self) -> None:
        self._check_alive()
        self._process.send(ResetPrefixCache())

    async def close(self) -> None:
        """End the engine process; requests that still run fail with EngineDeadError."""
        self._reader.cancel()
        self._grammars.close()
        await self._process.close()
        self._die(EngineDeadError("the engine was shut down"))

    def _submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        priority: int,
        cache_salt: str | None,
        *,
        pooling: Pooling | None = None,
        progress: bool = False,
        adapter: int | None = None,
    ) -> _Consumer:
        self._check_alive()
        self._check_queue(params.n)
        answer_ids = [str(next(self._answer_numbers)) for _ in range(params.n)]
        consumer = _Consumer(RequestStream(request_id, answer_ids, prompt, params, self.tokenizer))
        for answer_id in answer_ids:
            self._consumers[answer_id] = consumer
        seeds = answer_seeds(params, secrets.randbits(64))
        self._process.send(
            AddRequest(answer_ids, seeds, prompt, params, priority, cache_salt, pooling, progress, adapter)
        )
        return consumer

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        validate(
            params,
            vocab_size=self.info.vocab_size,
            max_model_len=self.info.max_model_len,
            max_logprobs=self._config.max_logprobs,
        )
        check_prompt(prompt, params, vocab_size=self.info.vocab_size, max_model_len=self.info.max_model_len)

    def _check_queue(self, count: int) -> None:
        waiting = len(self._consumers) + count - self.info.max_num_seqs
        if waiting > self._config.max_queued_requests:
            raise QueueFullError(
                f"{len(self._consumers)} answers are running or waiting, and no more than"
                f" {self._config.max_queued_requests} may wait; try again in a moment",
                retry_after=1.0,
            )

    def _check_alive(self) -> None:
        if self.dead.is_set():
            raise EngineDeadError("the engine process has ended")

    def _forget(self, stream: RequestStream) -> None:
        """The consumer is gone: abort what still runs in the engine."""
        running = [answer_id for answer_id in stream.answer_ids if self._consumers.pop(answer_id, None) is not None]
        if running and not self.dead.is_set():
            self._process.send(AbortRequests(running))

    async def _read(self) -> None:
        """Take the engine's messages for as long as it lives."""
        try:
            while True:
                message = await self._process.receive()
                match message:
                    case StepOutputs():
                        self._deliver(message)
                    case AdapterNews():
                        self._note_adapter(message)
                    case Pong():
                        if (answered := self._pongs.get(message.number)) and not answered.done():
                            answered.set_result(None)
                    case Fatal():
                        raise EngineDeadError(message.message)
        except EngineDeadError as error:
            logger.error("%s", error)
            self._die(error)
        except Exception as error:
            logger.exception("reading from the engine failed")
            self._die(EngineDeadError(f"reading from the engine failed: {type(error).__name__}"))

    def _deliver(self, outputs: StepOutputs) -> None:
        self._stats = outputs.stats
        for update in outputs.updates:
            # Late news of an answer that was aborted meanwhile has no consumer any more.
            consumer = self._consumers.get(update.request_id)
            if consumer is None:
                continue
            if update.finish_reason is not None:
                del self._consumers[update.request_id]
            piece = consumer.stream.push(update)
            if consumer.stream.aborts:
                for answer_id in consumer.stream.aborts:
                    self._consumers.pop(answer_id, None)
                self._process.send(AbortRequests(consumer.stream.aborts))
                consumer.stream.aborts = []
            if piece is not None:
                consumer.pieces.append(piece)
                consumer.event.set()

    def _note_adapter(self, news: AdapterNews) -> None:
        heard = self._adapter_news.pop(news.number, None)
        waiting = heard is not None and not heard.done()  # whoever asked may be gone
        try:
            adapter = self.adapters.arrived(news)
        except AphroditeError as error:
            if heard is not None and waiting:
                heard.set_exception(error)
            return
        if heard is not None and waiting:
            heard.set_result(adapter)

    def _die(self, error: EngineDeadError) -> None:
        self.dead.set()
        for consumer in set(self._consumers.values()):
            consumer.error = error
            consumer.event.set()
        self._consumers.clear()
        waiting: list[asyncio.Future[Any]] = [*self._pongs.values(), *self._adapter_news.values()]
        for answered in waiting:
            if not answered.done():
                answered.set_exception(error)
