"""What ends an answer by its tokens: end-of-sequence and stop tokens, length, and runaway loops."""

from __future__ import annotations

from array import array
from typing import Final

from aphrodite.core.request import Request
from aphrodite.outputs import FinishReason
from aphrodite.sampling.table import RepetitionDetection

GRAMMAR_COMPLETE: Final = "grammar_complete"  # the stop reason of an answer whose grammar allows no more


def finish_reason_of(
    request: Request, token: int, eos_token_ids: frozenset[int], *, complete: bool = False
) -> tuple[FinishReason | None, int | str | None]:
    """Whether the token just appended ends the request, and the stop token id that did, or another reason.

    Args:
        complete: the request's grammar allows nothing behind the token.
    """
    params = request.params
    # The sampler masks these tokens until `min_tokens` others are out.
    if request.num_output_tokens > params.min_tokens:
        if token in eos_token_ids and not params.ignore_eos:
            return "stop", None
        if token in params.stop_token_ids:
            return "stop", token
    if complete:
        return "stop", GRAMMAR_COMPLETE
    if len(request.tokens) >= request.max_total:
        return "length", None
    detection = params.repetition_detection
    if detection is not None and repeats(request.tokens, request.num_prompt_tokens, detection):
        return "repetition", None
    return None, None


def repeats(tokens: array[int], first: int, detection: RepetitionDetection) -> bool:
    """Whether `tokens[first:]` ends with `min_count` copies of a pattern of an allowed size.

    A size costs one comparison as long as the last token does not repeat at its distance.
    """
    total = len(tokens)
    longest = min(detection.max_pattern_size, (total - first) // detection.min_count)
    last = tokens[-1]
    for size in range(detection.min_pattern_size, longest + 1):
        if tokens[-1 - size] == last:
            span = size * (detection.min_count - 1)
            if tokens[total - span :] == tokens[total - span - size : total - size]:
                return True
    return False
