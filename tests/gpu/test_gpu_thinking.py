"""Budgets of reasoning and grammars on a GPU: the CPU's tokens, and steps without the host where nothing is forced."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from gpu_engines import REFERENCE, TINY, Engines, write_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.table import ReasoningMarks
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

PROMPTS = [[3 + (7 * i + 13 * j) % 240 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 300))]
FREE = SamplingParams(max_tokens=48, temperature=1.2, top_p=0.95, ignore_eos=True, seed=5)
MARKS = ReasoningMarks("<think>", "</think>", True)
CLOSING = len(MARKS.end)  # tokens: one a byte


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, SpecialTokens(eos_ids=()), "test")


@pytest.fixture(scope="module")
def make_core(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Engines]:
    model = write_model(tmp_path_factory.mktemp("thinking"), {**TINY, "vocab_size": 256})
    engines = Engines(model, tokenizer)
    yield engines
    engines.close()


def thinking(budget: int, **fields: Any) -> SamplingParams:
    params = from_mapping({"thinking_token_budget": budget, **fields}, base=FREE)
    return msgspec.structs.replace(params, reasoning=MARKS)


def answers(core: EngineCore, requests: Sequence[SamplingParams]) -> dict[str, list[int]]:
    for number, params in enumerate(requests):
        core.add(AddRequest([str(number)], [params.seed or 0], PROMPTS[number % len(PROMPTS)], params, 0, None))
    tokens: dict[str, list[int]] = {}
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
        core.scheduler.check()
    return tokens


REQUESTS = [
    FREE, thinking(10), thinking(0), thinking(20, banned_strings=["a", "e"]), thinking(13, logprobs=3), thinking(600),
    thinking(7, tfs=0.9), thinking(9, guidance_scale=1.5), thinking(30, temperature=0.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"async_depth": 0, "enable_graphs": False}], ids=str)
def test_tokens_are_those_of_the_cpu(make_core: Engines, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    expected = answers(make_core(**REFERENCE), REQUESTS)
    found = answers(make_core(**settings), REQUESTS)
    assert found == expected
    for number, budget in ((1, 10), (2, 0), (4, 13), (6, 7), (7, 9), (8, 30)):
        closing = found[str(number)][budget : budget + CLOSING]
        assert tokenizer.decode(closing) == MARKS.end


def test_answers_of_a_grammar_are_those_of_the_cpu(make_core: Engines, tokenizer: Tokenizer) -> None:
    """With and without log-probabilities, in the sampling kernels and (tfs) on torch operations, beside free ones."""
    pytest.importorskip("llguidance")
    pattern = r"[a-m]{3,9} (\d\d )*[x-z]{4}"
    fields: list[dict[str, Any]] = [{}, {"logprobs": 3}, {"tfs": 0.9}]
    requests = [from_mapping({"guided_regex": pattern, **own}, base=FREE) for own in fields] + [FREE]
    found = answers(make_core(), requests)
    assert found == answers(make_core(**REFERENCE), requests)
    for number in range(len(fields)):
        text = tokenizer.decode(found[str(number)])
        assert re.fullmatch(pattern, text) or len(found[str(number)]) == FREE.max_tokens, text


def test_nobody_waits_where_nothing_can_be_forced(make_core: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    sampler = core.runner.sampler
    stage, alone = sampler.stage, list[bool]()

    def observed(*arguments: Any) -> Hashable | None:
        launches = stage(*arguments)
        alone.append(launches is not None)
        return launches

    monkeypatch.setattr(sampler, "stage", observed)
    free = answers(core, [FREE] * 6)
    assert all(alone)
    alone.clear()
    mixed = answers(core, [FREE, thinking(12), FREE, FREE, thinking(600), FREE])
    assert alone.count(False) <= CLOSING + 1
    assert alone.count(True) >= 30
    for number in "0235":
        assert mixed[number] == free[number]
