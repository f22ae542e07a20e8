"""Runaway loops: an answer whose last tokens are one pattern over and over."""

from __future__ import annotations

from array import array

from aphrodite.sampling.table import RepetitionDetection


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
