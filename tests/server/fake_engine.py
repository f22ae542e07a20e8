"""An engine without a model: it tells the same story for the same prompt and seed, and fails when told to.

Text, stop strings and log-probabilities go through the real output processing, so that only the
scheduler and the model are missing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from aphrodite.chat.template import ChatTemplate
from aphrodite.core.plan import StageTrace, TokenLogprobs, TokenTrace
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.embedding import PROMPT_ONLY, EmbeddingOutput, EmbeddingParams, check_embedding, embedding_of
from aphrodite.engine.loaded_adapters import LoadedAdapter, LoadedAdapters
from aphrodite.engine.messages import AdapterInfo, AdapterNews, EmbeddingInfo, EngineStats
from aphrodite.engine.output import RequestStream
from aphrodite.engine.preparation import check_prompt
from aphrodite.errors import EngineDeadError, QueueFullError
from aphrodite.outputs import RequestOutput
from aphrodite.sampling.fields import validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

STORY = "Once upon a time, a café 🏰 stood in 東京; nobody knew why. The end came slowly, and then all at once. "
BOS, EOS = 256, 257


@cache
def byte_tokenizer() -> Tokenizer:
    """One token a byte, `<s>` (256, put before a text) and `</s>` (257)."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_level_vocab(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(backend, SpecialTokens(bos_id=BOS, eos_ids=(EOS,)), "test tokenizer")


def _byte_level_vocab() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, each with its byte as token id."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = itertools.count(256)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


EMBEDDING = EmbeddingInfo(size=4, pooling="last", normalize=True, declined=None)


def raw_state(token: int) -> np.ndarray:
    """The hidden state of a token, whatever stands before it."""
    return np.array([1 + token % 7, token % 3 - 1, token / 100, 0.5])


@dataclass(frozen=True)
class FakeModel:
    name: str = "fake/story"
    aliases: tuple[str, ...] = ("story-alias",)
    root: str = "story.gguf"
    max_model_len: int = 512
    max_num_seqs: int = 4
    num_cache_tokens: int = 2048
    vocab_size: int = 258
    max_logprobs: int = 20
    created: int = 1_700_000_000
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    embedding: EmbeddingInfo = EMBEDDING


TEMPLATE = """\
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}{% if not loop.last %}{{ "\\n" }}{% endif %}
{%- endfor -%}
{%- if mood %}{{ "\\n[mood=" + mood + "]" }}{% endif -%}
{%- if add_generation_prompt %}{{ "\\nassistant:" }}{% endif -%}
"""


@dataclass
class FakeEngine:
    """Attributes that tests set:

    gate: a token leaves only while it is set. hold_after: or after so many tokens of an answer.
    refuse: raised by the next requests. fail_after: answers end with an error after so many tokens.
    """

    model: FakeModel = field(default_factory=FakeModel)
    tokenizer: Tokenizer = field(default_factory=byte_tokenizer)
    chat_template: ChatTemplate = field(default_factory=lambda: ChatTemplate(TEMPLATE))
    max_running: int = 10_000
    hold_after: int | None = None
    fail_after: int | None = None
    refuse: Exception | None = None
    hung: bool = False

    def __post_init__(self) -> None:
        self.dead = asyncio.Event()
        self.adapters = LoadedAdapters((), [])
        self.wanted: list[str | None] = []  # adapters of the requests
        self.gate = asyncio.Event()
        self.running: set[str] = set()
        self.seen: list[tuple[list[int], SamplingParams, int, str | None]] = []
        self.idle = asyncio.Event()
        self.idle.set()
        self.started = asyncio.Event()
        self._changed = asyncio.Event()
        self.holding = asyncio.Event()  # a request waits at the gate

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        progress: bool = False,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        self._admit(prompt_token_ids, params)
        self.wanted.append(adapter)
        self.seen.append((prompt_token_ids, params, priority, cache_salt))
        self.running.add(request_id)
        self.idle.clear()
        self.started.set()
        self._changed.set()
        try:
            ids = [str(index) for index in range(params.n)]
            stream = RequestStream(request_id, ids, prompt_token_ids, params, self.tokenizer)
            for computed in range(8, len(prompt_token_ids) if progress else 0, 8):
                piece = stream.push(RequestUpdate(ids[0], [], num_cached_tokens=4, num_computed=computed))
                assert piece is not None
                yield piece
            for step in itertools.count():
                await self._wait(step)
                for index, answer_id in enumerate(ids):
                    piece = stream.push(self._update(prompt_token_ids, params, step, index, answer_id))
                    if piece is not None:
                        yield piece
                if stream.finished:
                    return
        finally:
            self.running.discard(request_id)
            self._changed.set()
            if not self.running:
                self.idle.set()

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
        """Of the hidden states `raw_state`."""
        check_embedding(params, self.model.embedding)
        pooling = params.pooling or self.model.embedding.pooling
        states = [raw_state(token) for token in prompt_token_ids]
        pooled = {"mean": np.mean(states, axis=0), "last": states[-1], "cls": states[0]}[pooling]
        outputs = self.generate(
            prompt_token_ids, PROMPT_ONLY, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        (output,) = [piece async for piece in outputs]
        output.embedding = None if output.outputs[0].error else pooled.astype(np.float32).tobytes()
        return embedding_of(output, params, self.model.embedding)

    async def until_running(self, count: int) -> None:
        """Return when so many requests run."""
        while len(self.running) != count:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 20)

    def _admit(self, prompt: list[int], params: SamplingParams) -> None:
        if self.dead.is_set():
            raise EngineDeadError("dead")
        if self.refuse is not None:
            raise self.refuse
        model = self.model
        validate(
            params, vocab_size=model.vocab_size, max_model_len=model.max_model_len, max_logprobs=model.max_logprobs
        )
        check_prompt(prompt, params, vocab_size=model.vocab_size, max_model_len=model.max_model_len)
        if len(self.running) + 1 > self.max_running:
            raise QueueFullError("too many requests wait; try again in a moment", retry_after=2.0)

    async def _wait(self, step: int) -> None:
        if self.hold_after is not None and step >= self.hold_after:
            self.holding.set()
            gate = asyncio.ensure_future(self.gate.wait())
            died = asyncio.ensure_future(self.dead.wait())
            try:
                await asyncio.wait((gate, died), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gate.cancel()
                died.cancel()
        else:
            await asyncio.sleep(0)
        if self.dead.is_set():
            raise EngineDeadError("the engine process has ended")

    def _update(
        self, prompt: list[int], params: SamplingParams, step: int, index: int, answer_id: str
    ) -> RequestUpdate:
        prompt_logprobs = None
        if step == 0 and params.prompt_logprobs is not None:
            prompt_logprobs = [self._logprobs(token, params.prompt_logprobs) for token in prompt[1:]]
        common = {"num_cached_tokens": len(prompt) // 16 * 16, "prompt_logprobs": prompt_logprobs}
        if self.fail_after is not None and step >= self.fail_after:
            return RequestUpdate(answer_id, [], finish_reason="error", error="/secret/path: 0xdeadbeef", **common)
        if params.max_tokens == 0:
            return RequestUpdate(answer_id, [], finish_reason="length", **common)
        story = STORY.encode()
        shift = 0 if params.seed is None else (params.seed + index) % len(story)
        ended = step >= len(story) and not params.ignore_eos
        token = EOS if ended else story[(step + shift) % len(story)]
        logprobs = None if params.logprobs is None else [self._logprobs(token, params.logprobs)]
        if params.sampler_trace:
            stages = [
                StageTrace("model", 258, 2, 0.25, [0, token], [0.5, 0.25]),
                StageTrace("xtc", 1, 1, 1.0, [token], [1.0]),
            ]
            common["traces"] = [TokenTrace(token, True, stages)]
        reason = None
        if ended or (token in params.stop_token_ids and step >= params.min_tokens):
            reason = "stop"
        elif step + 1 == params.max_tokens or len(prompt) + step + 1 >= self.model.max_model_len:
            reason = "length"
        stop_reason = token if reason == "stop" and not ended else None
        return RequestUpdate(answer_id, [token], logprobs, finish_reason=reason, stop_reason=stop_reason, **common)

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        """The token is the most likely one; alternatives follow it in the vocabulary."""
        ids = [(token + offset) % self.model.vocab_size for offset in range(count)]
        return TokenLogprobs(token, -0.25, 1, ids, [-0.25 - offset for offset in range(count)])

    async def check_health(self) -> None:
        if self.hung:
            await asyncio.Event().wait()
        if self.dead.is_set():
            raise EngineDeadError("dead")

    async def load_adapter(self, name: str, path: str) -> LoadedAdapter:
        number = self.adapters.begin(name, path)
        known = path.endswith("good")
        news = AdapterNews(number, AdapterInfo(8, 7, 100)) if known else AdapterNews(number, error=f"no {path}")
        adapter = self.adapters.arrived(news)
        assert adapter is not None
        return adapter

    async def unload_adapter(self, name: str) -> None:
        self.adapters.leave(name)

    async def close(self) -> None:
        self.dead.set()

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.running), prefix_queries=100, prefix_hits=40)
