"""From token updates to text: detokenization, stop strings, log-probabilities, per answer and per request.

A token leaves together with its text: while a stop string or a character is still incomplete, the tokens
behind the held text wait too, so text, token ids and log-probabilities of a stream always belong together.

Where nobody waits for pieces and no stop has to be searched for, an answer's tokens are only collected, and become
text at its end: a token then costs a list's append.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from aphrodite.core.finish import GRAMMAR_COMPLETE
from aphrodite.core.plan import TokenLogprobs, TokenTrace
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.stops import StopMatcher
from aphrodite.outputs import CompletionOutput, FinishReason, RequestOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.detokenizer import IncrementalDetokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer


class HeldToken(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs | None
    start: int  # characters of text before this token's
    end: int  # characters that must be released before the token is
    trace: TokenTrace | None


class Answer(Protocol):
    """One answer's way from updates to what is released of it."""

    @property
    def index(self) -> int: ...

    @property
    def finished(self) -> bool: ...

    def push(self, update: RequestUpdate) -> CompletionOutput | None:
        """Take an update; returns what may be released now, None if nothing."""


class WholeAnswer:
    """An answer without stops that is released in one piece, at its end."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams, *, index: int
    ) -> None:
        self.index = index
        self.finished = False
        self._params = params
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._traces: list[TokenTrace] | None = [] if params.sampler_trace else None
        self._warning: str | None = None

    def push(self, update: RequestUpdate) -> CompletionOutput | None:
        self._token_ids += update.token_ids
        if self._logprobs is not None:
            self._logprobs += update.logprobs or ()
        if self._traces is not None:
            self._traces += update.traces or ()
        if update.warning is not None:
            self._warning = update.warning
        if update.finish_reason is None:
            return None
        self.finished = True
        return CompletionOutput(
            index=self.index,
            text=self._text(last_is_silent=_ends_silently(update, self._params) and bool(update.token_ids)),
            token_ids=self._token_ids,
            num_tokens=len(self._token_ids),
            logprobs=self._logprobs,
            finish_reason=update.finish_reason,
            stop_reason=update.stop_reason,
            error=update.error,
            warnings=[] if self._warning is None else [self._warning],
            sampler_trace=self._traces,
        )

    def _text(self, *, last_is_silent: bool) -> str:
        detokenizer = IncrementalDetokenizer(
            self._tokenizer, self._prompt_token_ids, skip_special_tokens=self._params.skip_special_tokens
        )
        text = detokenizer.push_all(self._token_ids[:-1] if last_is_silent else self._token_ids)
        return text + detokenizer.flush()


class AnswerStream:
    """An answer that is released piece by piece."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams, *, index: int
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finished = False
        self._params = params
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._stops = (
            StopMatcher(params.stop, regexes=params.stop_regex, include=params.include_stop_str_in_output)
            if params.stop or params.stop_regex
            else None
        )
        self._held: deque[HeldToken] = deque()
        self._text_length = 0  # characters detokenized
        self._released_length = 0  # of those, released
        self._stop_string: str | None = None  # the stop string or regex that matched
        self._warning: str | None = None

    def push(self, update: RequestUpdate) -> CompletionOutput | None:
        """Take an update; returns what may be released now, None if nothing.

        After a stop string has matched, the answer is `finished` although the engine does not know yet:
        the caller aborts it there.
        """
        if self.finished:
            return None
        if update.warning is not None:
            self._warning = update.warning
        if self._stops is None and not self._held and update.finish_reason is None and len(update.token_ids) == 1:
            return self._pass_on(update)
        silent_last = _ends_silently(update, self._params)
        text = ""
        for position, token_id in enumerate(update.token_ids):
            silent = silent_last and position == len(update.token_ids) - 1
            logprobs = update.logprobs[position] if update.logprobs else None
            trace = update.traces[position] if update.traces else None
            text += self._push_token(token_id, logprobs, trace, silent)
            if self._stop_string is not None:
                return self._finish(text, "stop", self._stop_string)
        if update.finish_reason is None:
            tokens = self._release_tokens()
            return self._piece(text, tokens) if text or tokens else None
        text += self._flush()
        if self._stop_string is not None:
            return self._finish(text, "stop", self._stop_string)
        return self._finish(text, update.finish_reason, update.stop_reason, update.error)

    def _pass_on(self, update: RequestUpdate) -> CompletionOutput | None:
        """Take one token that only a character which it leaves incomplete can hold back."""
        token_id = update.token_ids[0]
        text = self._detokenizer.push(token_id)
        self.num_tokens += 1
        start = self._text_length
        self._text_length = self._released_length = start + len(text)
        logprobs, traces = update.logprobs, update.traces
        if self._detokenizer.pending:
            self._held.append(
                HeldToken(
                    token_id,
                    logprobs[0] if logprobs else None,
                    start,
                    self._text_length + 1,
                    traces[0] if traces else None,
                )
            )
            return self._piece(text, []) if text else None
        return CompletionOutput(
            self.index,
            text,
            update.token_ids,
            self.num_tokens,
            None if self._params.logprobs is None else logprobs or [],
            sampler_trace=traces or [] if self._params.sampler_trace else None,
        )

    def _push_token(self, token_id: int, logprobs: TokenLogprobs | None, trace: TokenTrace | None, silent: bool) -> str:
        start = self._text_length
        text = "" if silent else self._detokenizer.push(token_id)
        self.num_tokens += 1
        self._text_length += len(text)
        # A token that ends inside a character waits for the rest of it.
        end = self._text_length + (1 if self._detokenizer.pending else 0)
        self._held.append(HeldToken(token_id, logprobs, start, end, trace))
        return self._release(text)

    def _release(self, text: str) -> str:
        """Pass `text` through the stop strings, which count only once `min_tokens` are out."""
        if self._stops is not None and text and self.num_tokens > self._params.min_tokens:
            text, self._stop_string = self._stops.push(text)
        self._released_length += len(text)
        return text

    def _flush(self) -> str:
        """The answer has ended: release what was held for a character or a stop string."""
        text = self._release(self._detokenizer.flush())
        if self._stops is not None and self._stop_string is None:
            rest, self._stop_string = self._stops.finish()
            self._released_length += len(rest)
            text += rest
        return text

    def _release_tokens(self) -> list[HeldToken]:
        tokens = []
        while self._held and self._held[0].end <= self._released_length:
            tokens.append(self._held.popleft())
        return tokens

    def _piece(self, text: str, tokens: list[HeldToken]) -> CompletionOutput:
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = [token.logprobs for token in tokens if token.logprobs is not None]
        traces = None
        if self._params.sampler_trace:
            traces = [token.trace for token in tokens if token.trace is not None]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=[token.token_id for token in tokens],
            num_tokens=self.num_tokens,
            logprobs=logprobs,
            sampler_trace=traces,
        )

    def _finish(
        self, text: str, reason: FinishReason, stop_reason: str | int | None, error: str | None = None
    ) -> CompletionOutput:
        self.finished = True
        tokens = list(self._held)
        if self._stop_string is not None:  # tokens whose text was cut away are not part of the answer
            tokens = [token for token in tokens if token.start < self._released_length]
        self._held.clear()
        piece = self._piece(text, tokens)
        piece.finish_reason = reason
        piece.stop_reason = stop_reason
        piece.error = error
        if self._warning is not None:
            piece.warnings.append(self._warning)
        if self._stops is not None and self._stops.exhausted:
            piece.warnings.append(
                "Searching for `stop_regex` took too much work and was given up: the answer may run past a match."
            )
        return piece


def _ends_silently(update: RequestUpdate, params: SamplingParams) -> bool:
    """Whether the update's last token ended the answer, so that its text is not part of it (unless asked for)."""
    ended_by_token = update.finish_reason == "stop" and update.stop_reason != GRAMMAR_COMPLETE
    return ended_by_token and not params.include_stop_str_in_output


class RequestStream:
    """A request's `n` answers on their way out.

    Args:
        whole: nobody waits for an answer's pieces; where there is nothing to search for in its text, it comes as one.

    Attributes:
        answer_ids: the engine's request id of each answer, in the order of `CompletionOutput.index`.
        aborts: answers that ended here (by a stop string) and not yet in the engine; the caller takes
            and clears them.
    """

    def __init__(
        self,
        request_id: str,
        answer_ids: list[str],
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        whole: bool = False,
    ) -> None:
        self.request_id = request_id
        self.answer_ids = answer_ids
        self.prompt_token_ids = prompt_token_ids
        self.aborts: list[str] = []
        kind = WholeAnswer if whole and not (params.stop or params.stop_regex) else AnswerStream
        self._answers: dict[str, Answer] = {
            answer_id: kind(tokenizer, prompt_token_ids, params, index=index)
            for index, answer_id in enumerate(answer_ids)
        }
        self._unfinished = len(answer_ids)
        self._num_cached_tokens = 0
        # The first prompt token has no log-probability. Only the first answer's prompt is reported.
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            [None] if params.prompt_logprobs is not None else None
        )
        self._prompt_logprobs_sent = False
        self._queue_seconds: float | None = None

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    def push(self, update: RequestUpdate) -> RequestOutput | None:
        """Take one answer's update; returns the request's next piece, None if nothing may leave yet."""
        answer = self._answers[update.request_id]
        if update.prompt_logprobs and self._prompt_logprobs is not None and answer.index == 0:
            self._prompt_logprobs.extend(update.prompt_logprobs)
        ended_before = answer.finished
        if ended_before:
            return None
        # Further answers find what the first has computed, which the request did not find there.
        if answer.index == 0 and update.num_cached_tokens > self._num_cached_tokens:
            self._num_cached_tokens = update.num_cached_tokens
        if self._queue_seconds is None:
            self._queue_seconds = update.queue_seconds
        piece = answer.push(update)
        if answer.finished:
            self._unfinished -= 1
            if update.finish_reason is None:
                self.aborts.append(update.request_id)
        if piece is None and not update.num_computed:
            return None
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[] if piece is None else [piece],
            finished=self._unfinished == 0,
            num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=None if self._prompt_logprobs is None else self._take_prompt_logprobs(),
            queue_seconds=self._queue_seconds,
            embedding=update.embedding,
            num_computed=update.num_computed,
        )

    def _take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        complete = self._prompt_logprobs is not None and len(self._prompt_logprobs) == len(self.prompt_token_ids)
        if not complete or self._prompt_logprobs_sent:
            return None
        self._prompt_logprobs_sent = True
        return self._prompt_logprobs


def merge_outputs(pieces: list[RequestOutput]) -> RequestOutput:
    """All pieces of a request's stream as one whole result.

    Raises:
        ValueError: there is no piece.
    """
    if not pieces:
        raise ValueError("a request's stream had no pieces")
    answers: dict[int, CompletionOutput] = {}
    whole = pieces[-1]
    merged = RequestOutput(
        request_id=whole.request_id,
        prompt_token_ids=whole.prompt_token_ids,
        outputs=[],
        finished=whole.finished,
        num_cached_tokens=whole.num_cached_tokens,
        queue_seconds=whole.queue_seconds,
        embedding=whole.embedding,
    )
    texts: dict[int, list[str]] = {}
    for piece in pieces:
        merged.prompt_logprobs = merged.prompt_logprobs or piece.prompt_logprobs
        for part in piece.outputs:
            answer = answers.setdefault(part.index, CompletionOutput(index=part.index))
            texts.setdefault(part.index, []).append(part.text)
            answer.token_ids.extend(part.token_ids)
            if part.logprobs is not None:
                answer.logprobs = (answer.logprobs or []) + part.logprobs
            if part.sampler_trace is not None:
                answer.sampler_trace = (answer.sampler_trace or []) + part.sampler_trace
            answer.num_tokens = part.num_tokens
            answer.finish_reason = part.finish_reason
            answer.stop_reason = part.stop_reason
            answer.error = part.error
            answer.warnings.extend(part.warnings)
    for index in sorted(answers):
        answers[index].text = "".join(texts[index])
        merged.outputs.append(answers[index])
    return merged
