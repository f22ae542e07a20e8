"""A small tokenizer, whole engines that a test drives, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from aphrodite.config import EngineConfig
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.engine.output import RequestStream, merge_outputs
from aphrodite.outputs import CompletionOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

MakeCore = Callable[..., EngineCore]


@contextmanager
def fresh_cores(model: Path, tokenizer: Tokenizer | None = None, **defaults: Any) -> Iterator[MakeCore]:
    """Makes an engine of `model` with each call, whose settings replace `defaults`; all are closed in the end."""
    cores: list[EngineCore] = []

    def make(**settings: Any) -> EngineCore:
        config = EngineConfig(
            model=str(model),
            **{"device": "cpu", "threads": 1, "max_num_seqs": 8, "kv_cache_memory": 4 << 20, **defaults, **settings},
        )
        cores.append(build_engine(config, (), tokenizer=tokenizer).core)
        return cores[-1]

    try:
        yield make
    finally:
        for core in cores:
            core.close()


def drain(core: EngineCore) -> list[RequestUpdate]:
    """All that becomes known until nothing is left to do."""
    updates = []
    for _ in range(20_000):
        if not core.has_work():
            return updates
        updates += core.step()
        core.scheduler.check()
    raise AssertionError("the engine makes no progress")


def tokens_of(updates: list[RequestUpdate]) -> dict[str, list[int]]:
    """Each request's tokens; none may have failed."""
    tokens: dict[str, list[int]] = {}
    for update in updates:
        assert update.error is None, update.error
        tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens


def small_tokenizer(special: Sequence[str] = ()) -> Tokenizer:
    """320 tokens: the bytes, pairs of frequent letters, and the special ones, of which the last ends an answer."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "etaoinsh" for b in "etaoinsh"][: 64 - len(special)]
    vocab = {piece: index for index, piece in enumerate([*pieces, *(a + b for a, b in pairs), *special])}
    backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, SpecialTokens(eos_ids=tuple(vocab[name] for name in special[-1:])), "test")


def answers_to(
    prompts: list[list[int]], core: EngineCore, tokenizer: Tokenizer, requests: list[SamplingParams]
) -> list[list[CompletionOutput]]:
    """Each request's answers, all served at once; prompts go round where there are fewer."""
    streams: dict[str, RequestStream] = {}
    pieces: dict[str, list[Any]] = {}
    for number, params in enumerate(requests):
        ids = [f"{number}.{index}" for index in range(params.n)]
        prompt = prompts[number % len(prompts)]
        stream = RequestStream(str(number), ids, prompt, params, tokenizer)
        streams.update(dict.fromkeys(ids, stream))
        pieces[str(number)] = []
        seeds = [(params.seed or 0) + index for index in range(params.n)]
        core.add(AddRequest(ids, seeds, prompt, params, 0, None))
    for update in drain(core):
        stream = streams[update.request_id]
        piece = stream.push(update)
        if piece is not None:
            pieces[stream.request_id].append(piece)
    return [merge_outputs(pieces[str(number)]).outputs for number in range(len(requests))]
