"""The engine for scripts: load a model in this process, generate for many prompts at once.

>>> llm = LLM()
>>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].outputs[0].text
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec

from aphrodite.chat.answer import AnswerFormat, raw_marks
from aphrodite.chat.library import load_chat_template, recognised_chat_template
from aphrodite.chat.negative import negative_messages
from aphrodite.chat.stops import with_template_stops
from aphrodite.config import make_engine_config
from aphrodite.core.plan import Pooling
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import build_engine
from aphrodite.engine.embedding import (
    PROMPT_ONLY,
    EmbeddingOutput,
    EmbeddingParams,
    check_embedding,
    embedding_of,
)
from aphrodite.engine.grammar_check import GrammarChecker
from aphrodite.engine.loaded_adapters import LoadedAdapter, LoadedAdapters
from aphrodite.engine.messages import AdapterNews, AddRequest, EngineStats
from aphrodite.engine.output import RequestStream, merge_outputs
from aphrodite.engine.preparation import (
    answer_seeds,
    check_guidance,
    check_prompt,
    resolve_model,
    tokenize_negative_prompt,
    tokenize_words,
    tokenizer_path,
    wants_negative_prompt,
    with_negative_prompt,
)
from aphrodite.errors import AphroditeError, EngineDeadError, InvalidRequestError
from aphrodite.outputs import RequestOutput
from aphrodite.progress import generation_progress
from aphrodite.sampling.fields import validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model loaded into this process. Not thread-safe.

    Args:
        model: a .gguf file, a checkpoint directory, or a name on the Hugging Face hub (ORG/NAME, ORG/NAME:Q4_K_M,
            ORG/NAME@REVISION), fetched if need be; None is the default model.
        settings: fields of `EngineConfig`, for example `max_model_len=4096`.

    Raises:
        AphroditeError: the model or a setting cannot be served; the message says what to do.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        config = make_engine_config({"model": None if model is None else str(model), **settings})
        self.config, path = resolve_model(config)
        self.tokenizer = load_tokenizer(tokenizer_path(self.config))
        template = load_chat_template(config.chat_template, self.tokenizer)  # a wrong name costs no loading
        built = build_engine(self.config, self.tokenizer.eos_token_ids, tokenizer=self.tokenizer)
        self.info = built.info
        self.chat_template = template or recognised_chat_template(
            self.tokenizer, name=f"{built.info.model} {path.name}", family=built.info.family
        )
        self.memory = built.memory
        self._grammars = GrammarChecker(tokenizer_path(self.config), built.info.vocab_size)
        self.adapters = LoadedAdapters(self.config.lora, built.info.adapters)
        self._core = built.core
        self._streams: dict[str, RequestStream] = {}  # by answer id
        self._unread: dict[RequestStream, deque[RequestOutput]] = {}  # of answers that are read piece by piece
        self._answer_numbers = itertools.count()
        self._closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt (text or token ids); results come in the order of the prompts.

        Args:
            params: one for all prompts or one each; None takes the model's own defaults.
            adapter: name of the adapter that computes all, or one each, where None is the model alone.
            progress: show a progress bar with the rate.

        Raises:
            InvalidRequestError: a prompt or parameter is out of bounds; nothing has run then.
            EngineDeadError: after `close`.
        """
        prompt_list = _prompt_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params_list = [params or self.sampling_defaults] * len(prompt_list)
        else:
            params_list = list(params)
        if len(params_list) != len(prompt_list):
            raise InvalidRequestError(
                f"{len(prompt_list)} prompts came with {len(params_list)} sampling parameters: send one, or one each",
                param="params",
            )
        adapters = [adapter] * len(prompt_list) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(prompt_list):
            raise InvalidRequestError(
                f"{len(prompt_list)} prompts came with {len(adapters)} adapters: send one, or one each", param="adapter"
            )
        numbers = [self.adapters.number(name) for name in adapters]
        checked = [self._check(*pair) for pair in zip(prompt_list, params_list, strict=True)]
        streams = [
            self._add(ids, one, str(index), whole=True, adapter=number)
            for index, ((ids, one), number) in enumerate(zip(checked, numbers, strict=True))
        ]
        outputs = self._run(streams, progress=progress)
        for prompt, output in zip(prompt_list, outputs, strict=True):
            output.prompt = prompt if isinstance(prompt, str) else None
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        progress: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once.

        Args:
            adapter: name of the adapter that computes them.
            template: passed to `ChatTemplate.render`, for example `continue_final_message=True`.

        Raises:
            InvalidRequestError: the model's chat template refuses the messages.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if one else messages)
        params = params or self.sampling_defaults
        encoded = [self._encode_chat(conversation, params, template) for conversation in conversations]
        prompts, guided = [ids for ids, _ in encoded], [params for _, params in encoded]
        return self.generate(prompts, guided, adapter=adapter, progress=progress)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **template: Any,
    ) -> Iterator[RequestOutput]:
        """Answer one prompt or conversation piece by piece. Closing the iterator aborts the answer.

        Whoever asks for the next piece computes for all answers that are under way: pieces of the others wait for their
        iterators.

        Args:
            template: for a conversation, passed to `ChatTemplate.render` as `chat` does.

        Raises:
            InvalidRequestError: the model's chat template refuses the messages, a prompt or parameter is out of bounds,
                or a prompt came with options for conversations.
            EngineDeadError: after `close`, from which on no more is computed.
        """
        params = params or self.sampling_defaults
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt, params = self._encode_chat(prompt, params, template)  # type: ignore[arg-type]
        elif template:
            raise InvalidRequestError(
                f"{', '.join(template)}: only a conversation takes options of a chat template; leave them out, or send "
                "messages",
                param=next(iter(template)),
            )
        ids, params = self._check(prompt, params)  # type: ignore[arg-type]
        stream = self._add(ids, params, "stream", whole=False, adapter=self.adapters.number(adapter))
        unread = self._unread[stream] = deque()
        try:
            while unread or not stream.finished:
                if unread:
                    yield unread.popleft()
                else:
                    self._check_open()
                    self._hold(self._push(self._core.step()))
        finally:
            del self._unread[stream]
            self._abort(stream)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], params: EmbeddingParams | None = None, *, progress: bool = True
    ) -> list[EmbeddingOutput]:
        """The embedding of every prompt (text or token ids), in their order.

        Args:
            params: None makes them as the model's authors do.

        Raises:
            InvalidRequestError: a prompt or parameter is out of bounds, or the model makes no embeddings.
        """
        params, info = params or EmbeddingParams(), self.info.embedding
        check_embedding(params, info)
        checked = [self._check(prompt, PROMPT_ONLY)[0] for prompt in _prompt_list(prompts)]
        pooling = params.pooling or info.pooling
        streams = [
            self._add(ids, PROMPT_ONLY, str(number), whole=True, pooling=pooling) for number, ids in enumerate(checked)
        ]
        return [embedding_of(output, params, info) for output in self._run(streams, progress=progress)]

    def encode_chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a rendered conversation.

        Raises:
            InvalidRequestError: the model's chat template refuses the messages.
        """
        text = self.chat_template.render([dict(message) for message in messages], **template)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def load_adapter(self, name: str, path: str | Path) -> LoadedAdapter:
        """Load an adapter, a PEFT folder or a GGUF file, by whose name `generate` computes with it from then on.

        Raises:
            InvalidRequestError: the name is taken.
            ConfigError: the adapter does not fit the model, cannot be read, or there is no room for any.
        """
        number = self.adapters.begin(name, str(path))
        try:
            news = AdapterNews(number, adapter=self._core.adapters.load_now(number, str(path)))
        except AphroditeError as error:
            news = AdapterNews(number, error=str(error))
        adapter = self.adapters.arrived(news)
        assert adapter is not None
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Compute no further answer with an adapter; it goes when those that are being computed have ended.

        Raises:
            InvalidRequestError: there is none of this name.
        """
        self._core.adapters.unload(self.adapters.leave(name))
        if not self._streams:  # otherwise the step that ends the last of them lets go of it
            self._core.step()
        self._core.adapters.take_news()  # of this one, or of those before

    def stats(self) -> EngineStats:
        return self._core.stats()

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why."""
        return dict(self.info.kernels)

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What the model's authors recommend (setting `generation_config`); used where no `params` are given."""
        return self.info.sampling_defaults

    def close(self) -> None:
        """End what still runs and stop the engine's threads; nothing can be asked afterwards."""
        self._closed = True
        self._core.abort(list(self._streams))
        self._streams.clear()
        self._grammars.close()
        self._core.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("this LLM was closed; make another one to ask it")

    def _check(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        self._check_open()
        ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        info = self.info
        validate(
            params,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_logprobs=self.config.max_logprobs,
        )
        check_prompt(ids, params, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
        if params.grammar is not None:
            self._grammars.check(params.grammar)
        params = tokenize_words(params, self.tokenizer, info.vocab_size)
        params = tokenize_negative_prompt(params, self.tokenizer, info.max_model_len)
        check_guidance(ids, params, info)
        return ids, self._with_marks(ids, params)

    def _with_marks(self, ids: list[int], params: SamplingParams) -> SamplingParams:
        """`params` with the marks that a budget of reasoning needs, where the prompt did not come with them."""
        if params.thinking_token_budget is None or params.reasoning is not None or params.grammar is not None:
            return params
        prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
        return msgspec.structs.replace(params, reasoning=raw_marks(self.chat_template.traits.reasoning, prompt))

    def _encode_chat(
        self, messages: Sequence[Message], params: SamplingParams, template: Mapping[str, Any]
    ) -> tuple[list[int], SamplingParams]:
        """A conversation's token ids; `params` with the template's stops and the ids that guidance moves away from."""
        params = with_template_stops(params, self.chat_template, self.tokenizer, vocab_size=self.info.vocab_size)
        if wants_negative_prompt(params):
            negative = self.encode_chat(negative_messages(messages, params.negative_prompt), **template)
            params = with_negative_prompt(params, negative)
        text = self.chat_template.render([dict(message) for message in messages], **template)
        budgeted = params.thinking_token_budget is not None and params.grammar is None
        if budgeted and not template.get("continue_final_message"):
            reasoning = self.chat_template.traits.reasoning
            answers = AnswerFormat(reasoning, is_open=reasoning is not None and reasoning.is_open(text))
            params = msgspec.structs.replace(params, reasoning=answers.marks_of_reasoning)
        return self.tokenizer.encode(text, add_special_tokens=False), params

    def _add(
        self,
        ids: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        whole: bool,
        pooling: Pooling | None = None,
        adapter: int | None = None,
    ) -> RequestStream:
        answer_ids = [str(next(self._answer_numbers)) for _ in range(params.n)]
        stream = RequestStream(request_id, answer_ids, ids, params, self.tokenizer, whole=whole)
        self._streams.update(dict.fromkeys(answer_ids, stream))
        seeds = answer_seeds(params, secrets.randbits(64))
        self._core.add(AddRequest(answer_ids, seeds, ids, params, 0, None, pooling, adapter=adapter))
        return stream

    def _push(self, updates: list[RequestUpdate]) -> list[tuple[RequestStream, RequestOutput]]:
        """Hand a step's updates to their streams; returns what comes out."""
        pieces = []
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is None:
                continue
            if update.finish_reason is not None:
                del self._streams[update.request_id]
            piece = stream.push(update)
            if stream.aborts:
                self._core.abort(stream.aborts)
                for answer_id in stream.aborts:
                    self._streams.pop(answer_id, None)
                stream.aborts = []
            if piece is not None:
                pieces.append((stream, piece))
        return pieces

    def _run(self, streams: list[RequestStream], *, progress: bool) -> list[RequestOutput]:
        collected: dict[RequestStream, list[RequestOutput]] = {stream: [] for stream in streams}
        try:
            with generation_progress(len(streams), show=progress) as advance:
                unfinished = len(streams)
                while unfinished:
                    updates = self._core.step()
                    pieces = self._push(updates)
                    own = [(stream, piece) for stream, piece in pieces if stream in collected]
                    for stream, piece in own:
                        collected[stream].append(piece)
                    self._hold(piece for piece in pieces if piece[0] not in collected)
                    ended = sum(piece.finished for _, piece in own)
                    unfinished -= ended
                    advance(sum(len(update.token_ids) for update in updates), ended)
        finally:
            for stream in streams:
                self._abort(stream)
        return [merge_outputs(collected[stream]) for stream in streams]

    def _hold(self, pieces: Iterable[tuple[RequestStream, RequestOutput]]) -> None:
        """Keep pieces for the iterators that they belong to."""
        for stream, piece in pieces:
            if stream in self._unread:
                self._unread[stream].append(piece)

    def _abort(self, stream: RequestStream) -> None:
        running = [answer_id for answer_id in stream.answer_ids if self._streams.pop(answer_id, None) is not None]
        if running:
            self._core.abort(running)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; a sequence of numbers is one prompt of token ids."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))
