"""DRY's sequence breakers: texts, compiled to the tokens that contain, begin and complete them.

The definition is llama.cpp's: a token that contains the breaker is a breaker by itself. A token that ends with a
beginning of the breaker is a head; its tail is the rest of the breaker as the tokenizer cuts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aphrodite.kernels.cpu.history import BREAKER, HEAD, BreakerArrays
from aphrodite.sampling.vocabulary import Vocabulary


class TailTable(NamedTuple):
    """Breakers by their tails, on a device.

    Attributes:
        single: [vocab] bool, tokens that contain a breaker.
        tails: each tail, shortest first, with [vocab] bool of the heads that it completes.
    """

    single: torch.Tensor
    tails: list[tuple[tuple[int, ...], torch.Tensor]]


class Breakers:
    """Compiled breakers of one set of texts.

    Attributes:
        arrays: for the native library.
        descriptor: the structure that points to them.
    """

    def __init__(self, size: int, single: npt.NDArray[np.int32], tails: dict[int, set[tuple[int, ...]]]) -> None:
        self._tails = tails
        self._by_tail: dict[torch.device, TailTable] = {}
        flags = np.zeros(size, np.uint8)
        flags[single] |= BREAKER
        heads = np.array(sorted(tails), np.int32)
        flags[heads] |= HEAD
        ordered = [sorted(tails[head]) for head in heads.tolist()]
        flat = [tail for group in ordered for tail in group]
        self.arrays = BreakerArrays(
            flags,
            heads,
            _starts(len(group) for group in ordered),
            _starts(len(tail) for tail in flat),
            np.array([token for tail in flat for token in tail], np.int32),
        )
        self.descriptor = self.arrays.descriptor()

    @classmethod
    def none(cls, size: int) -> Breakers:
        """No breakers at all, for a vocabulary of `size` tokens."""
        return cls(size, np.zeros(0, np.int32), {})

    def by_tail(self, device: torch.device) -> TailTable:
        """The same for torch operations."""
        if device not in self._by_tail:
            found: dict[tuple[int, ...], list[int]] = {}
            for head, tails in self._tails.items():
                for tail in tails:
                    found.setdefault(tail, []).append(head)
            flags = torch.from_numpy(self.arrays.flags)
            completed = []
            for tail in sorted(found, key=len):
                heads = torch.zeros(len(flags), dtype=torch.bool)
                heads[found[tail]] = True
                completed.append((tail, heads.to(device)))
            self._by_tail[device] = TailTable((flags & BREAKER != 0).to(device), completed)
        return self._by_tail[device]


@lru_cache(maxsize=64)
def compile_breakers(texts: tuple[str, ...], vocabulary: Vocabulary) -> Breakers:
    """The breakers `texts`; the same object for the same texts."""
    single = [np.zeros(0, np.int32)]
    tails: dict[int, set[tuple[int, ...]]] = {}
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        containing, heads = _find(data, vocabulary)
        single.append(containing)
        for matched, tokens in heads.items():
            tail = tuple(vocabulary.encode_inside(data[matched:]))
            if tail:
                for token in tokens.tolist():
                    tails.setdefault(token, set()).add(tail)
    return Breakers(vocabulary.size, np.unique(np.concatenate(single)), tails)


def _find(breaker: bytes, vocabulary: Vocabulary) -> tuple[npt.NDArray[np.int32], dict[int, npt.NDArray[np.int32]]]:
    """Tokens that contain the breaker, and the other tokens by how much of its beginning they end with."""
    data, starts, owners = vocabulary.texts
    places = np.flatnonzero(data == breaker[0])  # where the breaker may begin
    tokens = owners[places]
    ends = starts[tokens + 1]
    heads: dict[int, npt.NDArray[np.int32]] = {}
    for matched in range(1, len(breaker)):
        at_end = places + matched == ends
        if at_end.any():
            heads[matched] = tokens[at_end]
        places, tokens, ends = places[~at_end], tokens[~at_end], ends[~at_end]
        goes_on = data[places + matched] == breaker[matched]
        places, tokens, ends = places[goes_on], tokens[goes_on], ends[goes_on]
    containing = np.unique(tokens)
    return containing, {matched: np.setdiff1d(found, containing) for matched, found in heads.items()}


def _starts(counts: Iterable[int]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(list(counts))]).astype(np.int32)
