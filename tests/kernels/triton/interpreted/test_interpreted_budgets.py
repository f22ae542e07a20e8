"""Budgets of reasoning on the device's data plane: the reference's tokens, and no waiting but where one is spent."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from test_interpreted_device_runner import GREEDY, PROMPTS, SEEDED, SPEC, device_runner, host_runner, tokens, updates
from test_interpreted_grammars import Letters

from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.runner.device_runner import DeviceRunner
from aphrodite.runner.runner import Runner
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.table import ReasoningMarks
from aphrodite.sampling.vocabulary import Vocabulary

MARKS = ReasoningMarks("zz", "q v", True)  # closed by three tokens
CLOSING = Letters().encode("q v", add_special_tokens=False)


@pytest.fixture(autouse=True)
def _accept_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonAttention, "decline", staticmethod(lambda shape: None))


def answers(
    runner: Runner | DeviceRunner, params: SamplingParams, step_tokens: int
) -> tuple[dict[str, list[int]], list[bool]]:
    """Each request's tokens; and for each time that tokens were chosen, whether the host had to know those before."""
    sampler: Any = runner.sampler
    sampler._vocabulary = Vocabulary(SPEC.vocab_size, Letters())
    waits, waited = sampler.waits, list[bool]()

    def observed(*arguments: Any) -> Any:
        waited.append(waits(*arguments))
        return waited[-1]

    sampler.waits = observed
    return tokens(updates(runner, 64, params, step_tokens)), waited


@pytest.mark.parametrize(
    ("base", "budget", "fields"), [(GREEDY, 2, {}), (SEEDED, 3, {}), (SEEDED, 0, {"logprobs": 2, "tfs": 0.9})]
)
def test_answers_are_those_of_the_reference(base: SamplingParams, budget: int, fields: dict[str, object]) -> None:
    params = from_mapping(
        {**fields, "thinking_token_budget": budget}, base=msgspec.structs.replace(base, max_tokens=7, reasoning=MARKS)
    )
    expected, _ = answers(host_runner(), params, 512)
    found, waited = answers(device_runner(64, 1), params, 512)
    assert found == expected
    assert len(found) == len(PROMPTS)
    for ids in found.values():
        assert ids[budget : budget + len(CLOSING)] == CLOSING
    # The prompts are computed in one step and decode together, so these are the steps of the mark's tokens, one where
    # the host had run ahead and could not know yet that nothing had closed it, and that of a new prompt.
    assert 0 < sum(waited) <= len(CLOSING) + 2 < len(waited)
