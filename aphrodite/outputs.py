"""What a generation gives back, piece by piece or whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aphrodite.core.plan import TokenLogprobs, TokenTrace

FinishReason = Literal["stop", "length", "repetition", "abort", "error"]


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` answers.

    In a stream `text`, `token_ids`, `logprobs` and `sampler_trace` hold what is new since the last piece; in a whole
    result they hold everything. `stop_reason` is the stop string, stop regex or stop token id that
    ended it. Text may lag behind tokens while a stop or a character is still incomplete.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0  # generated so far, held and cut ones included: what usage counts
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None  # with finish_reason "error"
    warnings: list[str] = field(default_factory=list)  # with the end: what could not be done as asked
    sampler_trace: list[TokenTrace] | None = None  # one a token of `token_ids`, if asked for


@dataclass(slots=True)
class RequestOutput:
    """A request's answers so far, or the next piece of them.

    `num_cached_tokens` counts the prompt tokens that were in the prefix cache when the first answer began.
    `prompt_logprobs` has one entry a prompt token, the first None, and comes with the first piece.
    `queue_seconds` is how long the request waited for its first step. `embedding` is the prompt's, if that was asked
    for in place of answers: `[hidden_size]` float32 as they lie in memory, neither cut nor normalised. Where progress
    was asked for, pieces without answers come first; they tell `num_computed`, the prompt tokens computed or cached.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    queue_seconds: float | None = None
    embedding: bytes | None = None
    num_computed: int = 0
