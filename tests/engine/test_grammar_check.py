"""Grammars are tried where they can do no harm: what takes too long or crashes is refused, and the next one is fine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aphrodite.engine import grammar_check
from aphrodite.engine.grammar_check import GrammarChecker
from aphrodite.errors import InvalidRequestError, QueueFullError, RequestFailedError
from aphrodite.sampling.table import Grammar

FINE = Grammar("regex", "a+")
# Thousands of properties that may each be left out: seconds of work for llguidance.
HEAVY = Grammar(
    "json_schema", json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(12_000)}})
)


@pytest.fixture(scope="module")
def checker(smollm2_path: Path) -> Iterator[GrammarChecker]:
    checker = GrammarChecker(smollm2_path, 49152, seconds=2.0)
    yield checker
    checker.close()


def workers(checker: GrammarChecker) -> list[int]:
    return [worker._process.pid for worker in checker._idle]


def test_good_and_bad_grammars_by_one_process(checker: GrammarChecker) -> None:
    checker.check(FINE)
    first = workers(checker)
    for grammar in (Grammar("json_object", ""), Grammar("choice", '["a","b"]'), FINE):
        checker.check(grammar)
    for grammar in (Grammar("regex", "("), Grammar("json_schema", '{"not":{}}'), Grammar("regex", "(")):
        with pytest.raises(InvalidRequestError, match="cannot be used") as caught:
            checker.check(grammar)
        assert caught.value.param == "grammar"
    assert workers(checker) == first


def test_what_takes_too_long_is_refused_and_its_process_ended(checker: GrammarChecker) -> None:
    checker.check(FINE)
    (before,) = workers(checker)
    with pytest.raises(InvalidRequestError, match="takes longer than 2 seconds"):
        checker.check(HEAVY)
    assert workers(checker) == []
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    checker.check(Grammar("regex", "another"))
    assert workers(checker) != [before]


def test_what_ends_the_process_is_refused(checker: GrammarChecker) -> None:
    checker.check(Grammar("regex", "x"))
    os.kill(workers(checker)[0], signal.SIGKILL)
    with pytest.raises(InvalidRequestError, match="too much memory"):
        checker.check(Grammar("regex", "y"))
    checker.check(Grammar("regex", "z"))


async def test_no_more_grammars_wait_than_may(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_WAITING", 1)
    first = asyncio.ensure_future(checker.check_async(Grammar("regex", "q")))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await checker.check_async(FINE)
    await first
    await checker.check_async(FINE)


def test_a_process_that_cannot_start_is_no_fault_of_the_grammar(tmp_path: Path) -> None:
    checker = GrammarChecker(tmp_path / "missing.gguf", 10)
    with pytest.raises(RequestFailedError):
        checker.check(FINE)
    checker.close()
