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
from aphrodite.sampling.params import SamplingParams, from_mapping
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


@pytest.mark.parametrize(("fields", "depth"), [({}, 1), ({"logprobs": 2, "tfs": 0.9}, 1), ({}, 0)])
def test_answers_are_those_of_the_reference(fields: dict[str, object], depth: int) -> None:
    for base, budget in ((GREEDY, 2), (SEEDED, 0)):
        fields = {**fields, "thinking_token_budget": budget}
        params = from_mapping(fields, base=msgspec.structs.replace(base, max_tokens=9, reasoning=MARKS))
        free = answers(host_runner(), msgspec.structs.replace(params, thinking_token_budget=None), 512)[0]
        expected = answers(host_runner(), params, 512)[0]
        found, waited = answers(device_runner(64, depth), params, 512)
        assert found == expected
        for name, ids in found.items():
            assert ids[: budget + len(CLOSING)] == [*free[name][:budget], *CLOSING]
        assert len(found) == len(PROMPTS)
        # The prompts are computed in one step and decode together, so these are the steps of the mark's tokens, one
        # where the host had run ahead and could not know yet that nothing had closed it, and that of a new prompt.
        assert 0 < sum(waited) <= len(CLOSING) + 2 < len(waited)
