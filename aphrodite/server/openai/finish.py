"""Why an answer ended, in the words that OpenAI's clients accept, and what we say of an answer beyond them."""

from __future__ import annotations

from typing import Any

from aphrodite.outputs import CompletionOutput
from aphrodite.server.openai.logprobs import TokenNames
from aphrodite.server.openai.trace import sampler_trace


def openai_finish_reason(answer: CompletionOutput) -> str | None:
    """`finish_reason`: clients that check it know no reason for a loop that was ended, so it is a stop."""
    return "stop" if answer.finish_reason == "repetition" else answer.finish_reason


def stop_reason(answer: CompletionOutput) -> str | int | None:
    """`stop_reason`: the stop string, stop regex or stop token id that ended it, or `repetition_detected`."""
    return "repetition_detected" if answer.finish_reason == "repetition" else answer.stop_reason


def answer_extras(answer: CompletionOutput, names: TokenNames, *, token_ids: bool) -> dict[str, Any]:
    """The keys of a choice that OpenAI does not have, the same on every endpoint; absent where there is nothing."""
    extra: dict[str, Any] = {}
    if answer.finish_reason is not None:
        extra["stop_reason"] = stop_reason(answer)
    if answer.warnings:
        extra["warnings"] = answer.warnings
    if token_ids:
        extra["token_ids"] = answer.token_ids
    if answer.sampler_trace is not None:
        extra["sampler_trace"] = sampler_trace(answer.sampler_trace, names)
    return extra
