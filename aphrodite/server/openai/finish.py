"""Why an answer ended, in the words that OpenAI's clients accept."""

from __future__ import annotations

from aphrodite.outputs import CompletionOutput


def openai_finish_reason(answer: CompletionOutput) -> str | None:
    """`finish_reason`: clients that check it know no reason for a loop that was ended, so it is a stop."""
    return "stop" if answer.finish_reason == "repetition" else answer.finish_reason


def stop_reason(answer: CompletionOutput) -> str | int | None:
    """`stop_reason`: the stop string, stop regex or stop token id that ended it, or `repetition_detected`."""
    return "repetition_detected" if answer.finish_reason == "repetition" else answer.stop_reason
