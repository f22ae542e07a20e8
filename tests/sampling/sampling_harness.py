"""Drives the sampler as the runner does: starts rows, samples, appends tokens to the history."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
import numpy as np
import reference
import torch

from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampled, Sampler
from aphrodite.sampling.table import ReasoningMarks
from aphrodite.sampling.vocabulary import Vocabulary

EOS = 2


class FakeTokenizer:
    """Tokens 0 to 2 are special, 5 and 6 hold newlines, token n > 6 is spelled `tn `."""

    special_ids = frozenset({0, 1, EOS})
    newlines = frozenset({5, 6})

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def token_bytes(self, token_id: int) -> bytes:
        return text_of(token_id)


# The prompts of these tests end inside reasoning, which `t4 t3 ` closes.
MARKS = ReasoningMarks("t3 t3 ", "t4 t3 ", is_open=True)


def with_marks(params: SamplingParams) -> SamplingParams:
    """`params` as who makes a prompt completes them."""
    return msgspec.structs.replace(params, reasoning=MARKS)


def text_of(token_id: int) -> bytes:
    return b"\n" * (token_id - 4) if token_id in FakeTokenizer.newlines else f"t{token_id} ".encode()


@functools.cache
def vocabulary_of(size: int) -> Vocabulary:
    """Made once, for grammars take a second to set up on a large one."""
    return Vocabulary(size, FakeTokenizer())


class Harness:
    """A sampler with its runner's history, and the reference's view of every row."""

    def __init__(self, num_rows: int, vocab_size: int, *, native: bool) -> None:
        self.token_ids = torch.zeros(num_rows, 512, dtype=torch.int32)
        self.num_prompt = torch.zeros(num_rows, dtype=torch.int32)
        self.sampler = Sampler(
            num_rows,
            vocab_size,
            frozenset({EOS}),
            self.token_ids,
            self.num_prompt,
            torch.device("cpu"),
            native=native,
            vocabulary=vocabulary_of(vocab_size),
        )
        self.vocab_size = vocab_size
        self.rows: dict[int, reference.Row] = {}

    def start(self, row: int, params: SamplingParams, seed: int, prompt: Sequence[int]) -> None:
        self.token_ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.num_prompt[row] = len(prompt)
        params = with_marks(params)
        self.sampler.start(row, params, seed, prompt)
        self.rows[row] = reference.Row(
            list(prompt),
            [],
            seed,
            params,
            frozenset({EOS}),
            FakeTokenizer.special_ids | FakeTokenizer.newlines,
            text_of,
        )

    def end(self, row: int) -> None:
        self.sampler.end(row)
        del self.rows[row]

    def expect(self, logits: np.ndarray, rows: Sequence[int]) -> list[reference.Outcome]:
        """What the reference says about the rows as they are; asking twice changes nothing."""
        return [reference.sample(raw, self.rows[row]) for raw, row in zip(logits, rows, strict=True)]

    def sample(self, logits: np.ndarray, rows: Sequence[int]) -> Sampled:
        """Sample and append the chosen tokens; `logits` [len(rows), vocab] is left alone."""
        states = [self.rows[row] for row in rows]
        positions = [len(state.prompt) + len(state.output) for state in states]
        sampled = self.sampler.sample(torch.from_numpy(logits.copy()), rows, positions)
        for row, state, position, token in zip(rows, states, positions, sampled.token_ids.tolist(), strict=True):
            self.token_ids[row, position] = token
            state.output.append(token)
        self.sampler.tell(rows, positions, sampled.token_ids.tolist())
        return sampled
