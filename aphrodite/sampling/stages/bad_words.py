"""bad_words: bars the last token of a word where the answer's tokens before it are the word's others.

It works on token ids, as vLLM's field of this name does: the front end has turned words into
`bad_words_ids` (`engine/preparation.py`). A word spelled with other tokens gets through; phrase bans do not
have that gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext

_ANY = -1


class Words(NamedTuple):
    """The W words of a row; M is one less than the tokens of the longest."""

    first_position: int  # of the answer: words do not reach into the prompt
    openings: torch.Tensor  # [W, M] int32: all tokens but the last, at the right edge, _ANY before them
    opening_lengths: torch.Tensor  # [W] int64
    last: torch.Tensor  # [W] int64


class BadWords(Stage):
    name = "bad_words"
    rank = 60
    parameters = ("bad_words", "bad_words_ids")
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return not params.bad_words_ids

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> Words:
        words = params.bad_words_ids
        width = max(len(word) for word in words) - 1
        openings = [[_ANY] * (width + 1 - len(word)) + list(word[:-1]) for word in words]
        return Words(
            info.num_prompt,
            torch.tensor(openings, dtype=torch.int32, device=info.device),
            torch.tensor([len(word) - 1 for word in words], dtype=torch.int64, device=info.device),
            torch.tensor([word[-1] for word in words], dtype=torch.int64, device=info.device),
        )

    def native_steps(self, values: Sequence[float], prepared: Words) -> Sequence[NativeStep]:
        flat: list[int] = []
        for opening, last in zip(prepared.openings.tolist(), prepared.last.tolist(), strict=True):
            word = [token for token in opening if token != _ANY] + [last]
            flat += [len(word), *word]
        return (NativeStep(NativeOp.BAD_WORDS, token_ids=flat),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, number, position, words in zip(logits, context.rows, context.positions, context.prepared, strict=True):
            width = min(words.openings.shape[-1], position - words.first_position)
            openings = words.openings[:, words.openings.shape[-1] - width :]
            written = context.token_ids[number, position - width : position]
            complete = ((openings == written) | (openings == _ANY)).all(-1) & (words.opening_lengths <= width)
            barred = torch.where(complete, -torch.inf, torch.inf)
            row.scatter_reduce_(0, words.last, barred, "amin")
        return logits


STAGE = BadWords()
