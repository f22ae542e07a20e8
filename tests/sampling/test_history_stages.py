"""Stages that look at a row's history, beside the reference's plain definitions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import reference
import torch

from aphrodite.kernels.cpu import history as native_history
from aphrodite.sampling.breakers import compile_breakers
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.plan import compile_plan
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, StageContext
from aphrodite.sampling.stages.matches import suffix_lengths
from aphrodite.sampling.vocabulary import Vocabulary

PIECES = [*b"abcdefgh:", *(b"ab", b"bc", b"abc", b"a:", b"cab", b"::", b"da", b"ha", b" \xe2", b"\x80\xa6", b"\xa6")]
TEXTS = [bytes([piece]) if isinstance(piece, int) else piece for piece in PIECES]
VOCAB = len(TEXTS) + 4  # logits without a token
BREAKERS = [(), (":",), ("abc",), ("ab", "ca", "hh"), ("bcabd",), ("\u2026",), ("aa", ":"), ("abab", "ba")]
WIDTH = 64


class Pieces:
    """Cuts texts from the left into the longest pieces, what none fits into unknown tokens.

    Like SentencePiece it puts a space before every text.
    """

    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [VOCAB - 1, *cut(text.removeprefix("\n").encode())]

    def token_bytes(self, token_id: int) -> bytes:
        return text_of(token_id)


def text_of(token_id: int) -> bytes:
    return TEXTS[token_id] if token_id < len(TEXTS) else b" " if token_id == VOCAB - 1 else b""


def cut(text: bytes) -> list[int]:
    found = []
    while text:
        piece = max((piece for piece in TEXTS if text.startswith(piece)), key=len, default=b"")
        found.append(TEXTS.index(piece) if piece else VOCAB - 2)
        text = text[max(len(piece), 1) :]
    return found


VOCABULARY = Vocabulary(VOCAB, Pieces())
INFO = RowInfo(VOCAB, frozenset(), 0, torch.device("cpu"), VOCABULARY)


class Rows:
    """Histories that a stage is applied to."""

    def __init__(self, name: str, params: Sequence[SamplingParams], *, native: bool) -> None:
        if native and native_history.load() is None:
            pytest.skip("the native library is not built")
        steps = [compile_plan(one, INFO).steps[name] for one in params]
        self.stage = steps[0].stage
        self.prepared = [step.prepared for step in steps]
        self.values = torch.tensor([step.values for step in steps])
        self.token_ids = torch.zeros(len(params), WIDTH, dtype=torch.int32)
        num_prompt = torch.zeros(len(params), dtype=torch.int32)
        info = SamplerInfo(len(params), VOCAB, torch.device("cpu"), self.token_ids, num_prompt, native)
        self.state = self.stage.new_state(info)
        for row in range(len(params)):
            if self.state is not None:
                self.state.start(row, [])

    def write(self, row: int, tokens: Sequence[int]) -> None:
        self.token_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)

    def apply(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        index = torch.tensor(rows)
        context = StageContext(
            rows=rows,
            index=index,
            positions=positions,
            prepared=[self.prepared[row] for row in rows],
            state=self.state,
            seeds=torch.zeros(len(rows), dtype=torch.int64),
            token_ids=self.token_ids,
            num_prompt=torch.zeros(len(rows), dtype=torch.int32),
        )
        return self.stage.apply(logits.clone(), self.values[index], context).numpy()


def expected(name: str, params: SamplingParams, history: list[int], logits: torch.Tensor) -> np.ndarray:
    row = reference.Row([], list(history), 0, params, text=text_of, encode=cut)
    return reference.STAGES[name](logits.double().numpy().copy(), row)


def repetitive(rng: random.Random, length: int) -> list[int]:
    """Few tokens, with pieces of the past coming back."""
    alphabet = rng.sample(range(len(TEXTS)), rng.randint(1, 8))
    tokens: list[int] = []
    while len(tokens) < length:
        if tokens and rng.random() < 0.4:
            start = rng.randrange(len(tokens))
            tokens += tokens[start : start + rng.randint(1, 9)]
        tokens.append(rng.choice(alphabet))
    return tokens[:length]


def random_dry(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        dry_multiplier=rng.choice([0.3, 0.8, 4.0]),
        dry_base=rng.choice([1.0, 1.0000001, 1.75, 3.0, 90.0]),
        dry_allowed_length=rng.choice([0, 1, 2, 2, 3, 5]),
        dry_range=rng.choice([-1, 0, 0, 1, 2, 7, 20, 1000]),
        dry_sequence_breakers=rng.choice(BREAKERS),
    )


@pytest.mark.parametrize("native", [True, False])
def test_dry_equals_the_quadratic_definition(native: bool) -> None:
    rng = random.Random(7)
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(1))
    for _ in range(100):
        params = [random_dry(rng) for _ in range(100)]
        rows = Rows("dry", params, native=native)
        histories = [repetitive(rng, rng.randint(1, 40)) for _ in params]
        for row, history in enumerate(histories):
            rows.write(row, history)
        result = rows.apply(logits, range(100), [len(history) for history in histories])
        for row, history in enumerate(histories):
            wanted = expected("dry", params[row], history, logits[row])
            np.testing.assert_allclose(result[row], wanted, rtol=1e-5, atol=1e-5, err_msg=f"{params[row]} {history}")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["dry", "no_repeat_ngram"])
def test_growing_and_going_back_equals_a_fresh_start(name: str, native: bool) -> None:
    rng = random.Random(3)
    params = [
        SamplingParams(
            dry_multiplier=1.0,
            dry_allowed_length=rng.randint(0, 2),
            dry_sequence_breakers=rng.choice(BREAKERS),
            no_repeat_ngram_size=rng.randint(1, 5),
        )
        for _ in range(6)
    ]
    rows = Rows(name, params, native=native)
    histories = [repetitive(rng, rng.randint(1, 9)) for _ in params]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    for _ in range(150):
        active = sorted(rng.sample(range(6), rng.randint(1, 6)))
        for row in active:
            if len(histories[row]) > WIDTH - 2 or rng.random() < 0.1:
                histories[row] = histories[row][: rng.randint(1, len(histories[row]))]
                if rows.state is not None:
                    rows.state.rewind(row, len(histories[row]))
            histories[row].append(repetitive(rng, 1)[0] if rng.random() < 0.5 else histories[row][0])
            rows.write(row, histories[row])
        result = rows.apply(logits[active], active, [len(histories[row]) for row in active])
        for entry, row in enumerate(active):
            wanted = expected(name, params[row], histories[row], logits[row])
            if np.isfinite(result[entry]).any():  # the pipeline undoes a ban of everything
                np.testing.assert_allclose(result[entry], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_long_loops_take_the_linear_way_to_the_same_result(native: bool) -> None:
    params = [SamplingParams(dry_multiplier=0.5, dry_base=1.01, dry_sequence_breakers=())] * 3
    rows = Rows("dry", params, native=native)
    rows.token_ids = torch.zeros(3, 1500, dtype=torch.int32)
    if rows.state is not None:
        rows.state = rows.stage.new_state(
            SamplerInfo(3, VOCAB, torch.device("cpu"), rows.token_ids, torch.zeros(3, dtype=torch.int32), False)
        )
        for row in range(3):
            rows.state.start(row, [])
    histories = [[1] * 1500, [1, 2] * 750, [3] + [1] * 700 + [2] + [1] * 798]
    for row, history in enumerate(histories):
        rows.write(row, history)
    logits = torch.zeros(3, VOCAB)
    result = rows.apply(logits, range(3), [1500] * 3)
    for row, history in enumerate(histories):
        np.testing.assert_allclose(result[row], expected("dry", params[row], history, logits[row]), rtol=1e-4)


@pytest.mark.parametrize("native", [True, False])
def test_ngrams_that_come_back_are_masked(native: bool) -> None:
    rng = random.Random(5)
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        params = [SamplingParams(no_repeat_ngram_size=rng.choice([1, 2, 2, 3, 3, 4, 9, 2**31 - 1])) for _ in range(50)]
        rows = Rows("no_repeat_ngram", params, native=native)
        histories = [repetitive(rng, rng.randint(1, WIDTH)) for _ in params]
        for row, history in enumerate(histories):
            rows.write(row, history)
        result = rows.apply(logits, range(50), [len(history) for history in histories])
        for row, history in enumerate(histories):
            np.testing.assert_allclose(result[row], expected("no_repeat_ngram", params[row], history, logits[row]))


def test_ranged_penalties_equal_the_definition() -> None:
    rng = random.Random(9)
    logits = 4 * torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        params = [
            SamplingParams(
                repetition_penalty=rng.choice([0.5, 1.1, 1.5]),
                frequency_penalty=rng.choice([0.0, 0.3, -0.5]),
                presence_penalty=rng.choice([0.0, 0.7]),
                repetition_penalty_range=rng.choice([1, 2, 5, 12, 13, 1000]),
                repetition_penalty_slope=rng.choice([0.0, 0.4, 1.0, 2.0]),
                repetition_decay=rng.choice([0, 1, 6, 100]),
            )
            for _ in range(100)
        ]
        rows = Rows("ranged_penalties", params, native=False)
        histories = [repetitive(rng, rng.randint(1, 40)) for _ in params]
        for row, history in enumerate(histories):
            rows.write(row, history)
        result = rows.apply(logits, range(100), [len(history) for history in histories])
        for row, history in enumerate(histories):
            wanted = expected("penalties", params[row], history, logits[row])
            np.testing.assert_allclose(result[row], wanted, rtol=1e-5, atol=1e-5, err_msg=f"{params[row]} {history}")


def test_suffix_lengths_of_a_known_text() -> None:
    assert suffix_lengths([1, 2, 1, 2, 1]) == [1, 0, 3, 0, 5]
    assert suffix_lengths([7]) == [1]


def test_breakers_are_compiled_once_for_all_requests() -> None:
    assert compile_breakers((":", "abc"), VOCABULARY) is compile_breakers((":", "abc"), VOCABULARY)


def test_a_breaker_that_cannot_be_spelled_has_no_heads() -> None:
    breakers = compile_breakers(("a\ud800",), VOCABULARY)  # half of a surrogate pair
    assert not breakers.arrays.flags.any()


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"dry_sequence_breakers": '["\\n", "x"]'}, "dry_sequence_breakers", ("\n", "x")),
        ({"dry_sequence_breakers": []}, "dry_sequence_breakers", ()),
        ({}, "dry_sequence_breakers", ("\n", ":", '"', "*")),
        ({"dry_penalty_last_n": -1}, "dry_range", 0),
        ({"dry_base": 0}, "dry_base", 1.75),
        ({"rep_pen_range": 512}, "repetition_penalty_range", 512),
        ({"repeat_last_n": -1}, "repetition_penalty_range", 0),
        ({"rep_pen_slope": 0.7}, "repetition_penalty_slope", 0.7),
        ({"mirostat": 2}, "mirostat_mode", 2),
        ({"adaptive_target": -0.01}, "adaptive_target", -0.01),
    ],
)
def test_spellings_that_clients_send(fields: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(from_mapping(fields), name) == value


@pytest.mark.parametrize("make_params", [lambda: SamplingParams(dry_multiplier=1.0)])
def test_breakers_without_a_vocabulary_are_refused(make_params: Callable[[], SamplingParams]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        compile_plan(make_params(), INFO._replace(vocabulary=None))
