"""Grammars on the device's data plane: with steps launched ahead, the tokens are those of the reference mode."""

from __future__ import annotations

import msgspec
import pytest
from test_interpreted_device_runner import GREEDY, PROMPTS, SEEDED, SPEC, device_runner, host_runner, tokens, updates

from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.runner.device_runner import DeviceRunner
from aphrodite.runner.runner import Runner
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.vocabulary import Vocabulary

pytest.importorskip("llguidance")


class Letters:
    """Tokens 3 to 28 are letters, token 29 a space, 30 and up pairs of letters; 0 to 2 are special."""

    special_ids = frozenset({0, 1, 2})

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [29 if char == " " else 3 + ord(char) - ord("a") for char in text]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 3:
            return b"<%d>" % token_id
        if token_id == 29:
            return b" "
        if token_id < 29:
            return bytes([ord("a") + token_id - 3])
        return bytes([ord("a") + token_id % 26, ord("a") + token_id // 26])


@pytest.fixture(autouse=True)
def _accept_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonAttention, "decline", staticmethod(lambda shape: None))


def with_letters(runner: Runner | DeviceRunner) -> Runner | DeviceRunner:
    runner.sampler._vocabulary = Vocabulary(SPEC.vocab_size, Letters())
    return runner


def answers(runner: Runner | DeviceRunner, num_blocks: int, params: SamplingParams, budget: int) -> dict[str, str]:
    found = tokens(updates(with_letters(runner), num_blocks, params, budget))
    return {name: b"".join(map(Letters().token_bytes, ids)).decode() for name, ids in found.items()}


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        ({"guided_regex": "[a-f]{3} [x-z]+"}, 1),
        ({"guided_regex": "[a-f]{3} [x-z]+", "logprobs": 2}, 1),
        ({"guided_choice": ["ab cd", "ab", "xyz"]}, 0),
        ({"guided_choice": ["ab cd", "ab", "xyz"], "tfs": 0.9}, 1),
        ({"grammar": 'root ::= "(" root ")" | [a-m]{6}'.replace('"("', '"a"').replace('")"', '"b"')}, 1),
    ],
)
def test_answers_are_those_of_the_reference(fields: dict[str, object], depth: int) -> None:
    for base in (GREEDY, SEEDED):
        params = from_mapping(fields, base=msgspec.structs.replace(base, max_tokens=6))
        expected = answers(host_runner(), 64, params, 512)
        assert answers(device_runner(64, depth), 64, params, 40) == expected
        if "guided_choice" in fields:
            assert set(expected.values()) <= {"ab cd", "ab", "xyz"}
        assert len(expected) == len(PROMPTS)
