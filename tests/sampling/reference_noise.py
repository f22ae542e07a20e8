"""The definition of the sampler's random numbers (Salmon et al., 2011, doi 10.1145/2063384.2063405)."""

from __future__ import annotations

from typing import Any

import numpy as np

_WORDS = 2**32


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 in Python integers or arrays of uint64, written from the paper's description."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right // _WORDS) ^ b ^ k, right % _WORDS, (left // _WORDS) ^ d ^ m, left % _WORDS
        k, m = (k + 0x9E3779B9) % _WORDS, (m + 0xBB67AE85) % _WORDS
    return a, b, c, d


def uniform(seed: int, position: int, use: int, indices: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) of indices such as token ids."""
    groups, place = np.unique(indices // 4, return_inverse=True)
    words = np.stack(
        np.broadcast_arrays(*philox((position, use, groups.astype(np.uint64), 0), divmod(seed, _WORDS)[::-1]))
    )
    return ((words[indices % 4, place] >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23


def gumbel(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """float64 noise of token ids."""
    return -np.log(-np.log(uniform(seed, position, 0, tokens)))
