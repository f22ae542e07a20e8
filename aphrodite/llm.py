"""The engine for scripts: load a model in this process, generate for many prompts at once.

>>> llm = LLM()
>>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].outputs[0].text
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from aphrodite.chat.library import load_chat_template
from aphrodite.config import make_engine_config
from aphrodite.engine.builder import build_engine
from aphrodite.engine.messages import AddRequest, EngineStats
from aphrodite.engine.output import RequestStream, merge_outputs
from aphrodite.engine.preparation import answer_seeds, check_prompt, resolve_model, tokenize_words
from aphrodite.errors import InvalidRequestError
from aphrodite.outputs import RequestOutput
from aphrodite.progress import generation_progress
from aphrodite.sampling.params import SamplingParams, validate
from aphrodite.tokenizer.loader import load_tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model loaded into this process. Not thread-safe.

    Args:
        model: a .gguf file or a checkpoint directory; None is the default model.
        settings: fields of `EngineConfig`, for example `max_model_len=4096`.

    Raises:
        AphroditeError: the model or a setting cannot be served; the message says what to do.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        config = make_engine_config({"model": None if model is None else str(model), **settings})
        self.config, path = resolve_model(config)
        self.tokenizer = load_tokenizer(Path(config.tokenizer) if config.tokenizer else path)
        self.chat_template = load_chat_template(config.chat_template, self.tokenizer)
        built = build_engine(self.config, self.tokenizer.eos_token_ids, tokenizer=self.tokenizer)
        self.info = built.info
        self.memory = built.memory
        self._core = built.core
        self._streams: dict[str, RequestStream] = {}  # by answer id
        self._answer_numbers = itertools.count()

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
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt (text or token ids); results come in the order of the prompts.

        Args:
            params: one for all prompts or one each.
            progress: show a progress bar with the rate.

        Raises:
            InvalidRequestError: a prompt or parameter is out of bounds; nothing has run then.
        """
        prompt_list = _prompt_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params_list = [params or SamplingParams()] * len(prompt_list)
        else:
            params_list = list(params)
        if len(params_list) != len(prompt_list):
            raise InvalidRequestError(
                f"{len(prompt_list)} prompts came with {len(params_list)} sampling parameters: send one, or one each",
                param="params",
            )
        checked = [self._check(*pair) for pair in zip(prompt_list, params_list, strict=True)]
        streams = [self._add(ids, one, str(number)) for number, (ids, one) in enumerate(checked)]
        outputs = self._run(streams, progress=progress)
        for prompt, output in zip(prompt_list, outputs, strict=True):
            output.prompt = prompt if isinstance(prompt, str) else None
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        progress: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once.

        Args:
            template: passed to `ChatTemplate.render`, for example `continue_final_message=True`.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.encode_chat(conversation, **template) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, params, progress=progress)

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one prompt or conversation piece by piece. Closing the iterator aborts the answer."""
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.encode_chat(prompt)  # type: ignore[arg-type]
        ids, params = self._check(prompt, params or SamplingParams())  # type: ignore[arg-type]
        stream = self._add(ids, params, "stream")
        try:
            while not stream.finished:
                yield from (piece for owner, piece in self._step() if owner is stream)
        finally:
            self._abort(stream)

    def encode_chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a rendered conversation.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template: name one with chat_template=, for example 'chatml'", param="messages"
            )
        text = self.chat_template.render([dict(message) for message in messages], **template)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stats(self) -> EngineStats:
        return self._core.stats()

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why."""
        return dict(self.info.kernels)

    def close(self) -> None:
        """End what still runs and stop the engine's threads."""
        self._core.abort(list(self._streams))
        self._streams.clear()
        self._core.close()

    def _check(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        info = self.info
        validate(
            params,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_logprobs=self.config.max_logprobs,
        )
        check_prompt(ids, params, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
        return ids, tokenize_words(params, self.tokenizer, info.vocab_size)

    def _add(self, ids: list[int], params: SamplingParams, request_id: str) -> RequestStream:
        answer_ids = [str(next(self._answer_numbers)) for _ in range(params.n)]
        stream = RequestStream(request_id, answer_ids, ids, params, self.tokenizer)
        self._streams.update(dict.fromkeys(answer_ids, stream))
        seeds = answer_seeds(params, secrets.randbits(64))
        self._core.add(AddRequest(answer_ids, seeds, ids, params, priority=0, cache_salt=None))
        return stream

    def _step(self) -> list[tuple[RequestStream, RequestOutput]]:
        pieces = []
        for update in self._core.step():
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
        collected: dict[int, list[RequestOutput]] = {id(stream): [] for stream in streams}
        try:
            with generation_progress(len(streams), show=progress) as advance:
                while not all(stream.finished for stream in streams):
                    for stream, piece in self._step():
                        collected[id(stream)].append(piece)
                        advance(sum(len(part.token_ids) for part in piece.outputs), piece.finished)
        finally:
            for stream in streams:
                self._abort(stream)
        return [merge_outputs(collected[id(stream)]) for stream in streams]

    def _abort(self, stream: RequestStream) -> None:
        running = [answer_id for answer_id in stream.answer_ids if self._streams.pop(answer_id, None) is not None]
        if running:
            self._core.abort(running)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; a sequence of numbers is one prompt of token ids."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))
