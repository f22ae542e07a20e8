"""The parameter table: validation, aliases, the wire, and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.fields import canonical_names, from_mapping, parameter_table, validate
from aphrodite.sampling.params import SamplingParams, parameter
from aphrodite.sampling.table import TokenBanRange, bounds_text

VOCAB = 1000


def check(params: SamplingParams) -> None:
    validate(params, vocab_size=VOCAB, max_model_len=4096, max_logprobs=20)


def test_defaults_are_valid_and_neutral() -> None:
    check(SamplingParams())
    for row in parameter_table():
        if row.param.neutral is not None:
            assert row.default == row.param.neutral


def test_table_covers_every_field_and_alias_once() -> None:
    assert [*(row.name for row in parameter_table()), "extensions", "reasoning"] == list(
        SamplingParams.__struct_fields__
    )
    names = [name for row in parameter_table() for name in (row.name, *row.param.aliases)]
    assert len(names) == len(set(names)) == len(canonical_names())
    assert all(row.param.doc.endswith(".") for row in parameter_table())
    assert bounds_text(parameter("top_p")) == "at least 0 and at most 1"


def test_wire_round_trip() -> None:
    params = from_mapping(
        {"temperature": 0.7, "logit_bias": {"5": -3}, "stop": ["a", "b"], "stop_token_ids": [3], "seed": -5}
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rep_pen": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repetition_penalty": 1.3, "rep_pen": 1.1}, {"repetition_penalty": 1.3}),
        ({"max_new_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 8, "max_length": 9}, {"max_tokens": 8}),
        ({"min_length": 3}, {"min_tokens": 3}),
        ({"sampler_seed": 4}, {"seed": 4}),
        ({"thinking_budget_tokens": 4}, {"thinking_token_budget": 4}),
        ({"thinking_token_budget": -1, "thinking_budget": 7}, {"thinking_token_budget": None}),
        ({"seed": -1}, {"seed": None}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"temperature": 5.0}, {"temperature": 5.0}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["a", "b"], "stopping_strings": ["b", "c"]}, {"stop": ("a", "b", "c")}),
        ({"stop": []}, {"stop": ()}),
        ({"logit_bias": {"5": 3, 6: -1.5}}, {"logit_bias": {5: 3.0, 6: -1.5}}),
        ({"logit_bias": {}}, {"logit_bias": {}}),
        ({"temperature": None, "stop": None, "logit_bias": None, "n": None}, {}),
    ],
)
def test_clients_spellings(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = from_mapping(fields)
    assert params == msgspec.structs.replace(SamplingParams(), **expected)
    check(params)


def test_base_supplies_what_is_not_given() -> None:
    base = SamplingParams(temperature=0.3, top_k=20)
    assert from_mapping({"top_k": 5}, base=base) == SamplingParams(temperature=0.3, top_k=5)


def test_unknown_name_suggests_the_right_one() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean `temperature`") as raised:
        from_mapping({"tempreture": 1})
    assert raised.value.param == "tempreture"


NUMBERS = ["1", [], {}, True, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 1e308, "x" * 100_000]
BAD: list[tuple[str, Any]] = [
    *[(row.name, value) for row in parameter_table() if row.kind in ("int", "float") for value in NUMBERS],
    *[(name, 0.5) for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")],
    *[("n", value) for value in (0, -1, 129, 2**63)],
    *[("max_tokens", value) for value in (-1, 4097, 2**63)],
    *[("min_tokens", value) for value in (-1, 4097, 2**63)],
    *[("thinking_token_budget", value) for value in (-2, 0.5, 2**31)],
    *[("temperature", value) for value in (-1, -0.001, 100.5, 2**63)],
    *[("top_p", value) for value in (-1, 1.001)],
    *[("min_p", value) for value in (-1, 1.001)],
    *[("top_k", value) for value in (-2, 2**31, 2**63)],
    *[("repetition_penalty", value) for value in (-1, 0, 101)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("seed", value) for value in (2**63, -(2**63) - 1)],
    *[("logprobs", value) for value in (-1, 21)],
    *[("prompt_logprobs", value) for value in (-1, 21)],
    *[
        ("logit_bias", value)
        for value in (
            [5],
            [[5]],
            [[5, 1, 1]],
            [[5, True]],
            [["x", 1]],
            "1",
            {"x": 1},
            {"-1": 1},
            {str(VOCAB): 1},
            {"1": 101},
            {"1": None},
        )
    ],
    *[("logit_bias", value) for value in ({"1": True}, {"1": float("nan")}, {"9" * 5000: 1}, {1.5: 1}, {True: 1})],
    ("logit_bias", {str(token): 1 for token in range(1025)}),
    *[("stop", value) for value in (5, {}, [5], [""], "", ["a"] * 65, ["x" * 513], [None], True)],
    *[("stop_token_ids", value) for value in (5, "5", ["5"], [VOCAB], [-1], [True], [1.5], list(range(257)))],
    *[(row.name, value) for row in parameter_table() if row.kind == "bool" for value in (0, 1, "true", [], {})],
    *[("logprobs_mode", value) for value in ("cooked", "", 1, [], True)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:40])
def test_bad_values_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check(from_mapping({name: value}))
    assert raised.value.param == name
    assert f"`{name}" in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(top_k=True), "top_k"),
        (SamplingParams(top_p="0.5"), "top_p"),  # type: ignore[arg-type]
        (SamplingParams(n=None), "n"),  # type: ignore[arg-type]
        (SamplingParams(logit_bias={"5": 1.0}), "logit_bias"),  # type: ignore[dict-item]
        (SamplingParams(stop="abc"), "stop"),  # type: ignore[arg-type]
        (SamplingParams(stop_token_ids=(VOCAB,)), "stop_token_ids"),
        (SamplingParams(min_tokens=6, max_tokens=5), "min_tokens"),
    ],
)
def test_structs_made_by_hand_are_checked_too(params: SamplingParams, name: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check(params)
    assert raised.value.param == name


def test_alias_is_named_as_the_client_spelled_it() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        from_mapping({"rep_pen": 0})
    assert raised.value.param == "rep_pen"


def test_parameters_need_no_torch() -> None:
    program = "import sys, aphrodite.sampling.fields as f; f.parameter_table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


KOBOLD = ("penalties", "top_k", "top_a", "tfs", "typical_p", "top_p", "min_p", "temperature")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"typical": 0.5, "nsigma": 1.5, "tfs_z": 0.9}, {"typical_p": 0.5, "top_nsigma": 1.5, "tfs": 0.9}),
        ({"typ_p": 0.5, "top_n_sigma": -1}, {"typical_p": 0.5}),
        (
            {"dynatemp_low": 0.5, "max_temp": 2, "temp_exponent": 1.5},
            {"dynatemp_min": 0.5, "dynatemp_max": 2.0, "dynatemp_exponent": 1.5},
        ),
        ({"eps_cutoff": 3}, {"epsilon_cutoff": 3.0}),
        ({"custom_token_bans": [3, 4, 3]}, {"custom_token_bans": (3, 4)}),
        ({"custom_token_bans": "3, 4"}, {"custom_token_bans": (3, 4)}),
        ({"custom_token_bans": "[3, 4]"}, {"custom_token_bans": (3, 4)}),
        ({"custom_token_bans": ""}, {}),
        ({"banned_tokens": [5]}, {"custom_token_bans": (5,)}),
        ({"banned_tokens": ["a b", "c"]}, {"banned_strings": ("a b", "c")}),
        ({"banned_tokens": ["c"], "banned_strings": ["a"]}, {"banned_strings": ("a", "c")}),
        ({"allowed_token_ids": [1, 2]}, {"allowed_token_ids": (1, 2)}),
        ({"bad_words": '["a", "b"]'}, {"bad_words": ("a", "b")}),
        ({"bad_words": "[draft"}, {"bad_words": ("[draft",)}),
        ({"bad_words_ids": [[1, 2], [3]]}, {"bad_words_ids": ((1, 2), (3,))}),
        ({"token_ban_ranges": [[[1, 2], 0, 5]]}, {"token_ban_ranges": (TokenBanRange((1, 2), 0, 5),)}),
        ({"sampler_priority": ["Top_P", "temperature"]}, {"sampler_priority": ("top_p", "temperature")}),
        ({"logit_bias": [[5, -1.5], ["9", 3], [7, False]]}, {"logit_bias": {5: -1.5, 9: 3.0, 7: -100.0}}),
        ({"logit_bias": []}, {"logit_bias": {}}),
        ({"samplers": ["min_p", "infill", "top_k"]}, {"sampler_priority": ("min_p", "top_k")}),
        ({"sampler_priority": '["min_p", "typ_p"]'}, {"sampler_priority": ("min_p", "typical_p")}),
        (
            {"samplers": ["top_k", "top-n-sigma", "temperature"]},
            {"sampler_priority": ("top_k", "top_nsigma", "temperature")},
        ),
        ({"sampler_priority": [0, 2, 7]}, {"sampler_priority": ("top_k", "top_p", "min_p", "dry")}),
        ({"sampler_order": [6, 0, 1, 3, 4, 2, 5]}, {"sampler_priority": KOBOLD}),
        ({"sampler_priority": ["top_p_top_k", "top_p"]}, {"sampler_priority": ("top_k", "top_p")}),
        ({"sampler_priority": []}, {}),
    ],
)
def test_spellings_of_sampler_fields(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = from_mapping(fields)
    assert params == msgspec.structs.replace(SamplingParams(), **expected)
    check(params)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("sampler_priority", value) for value in ("temprature", ["x"], [14], [-1], [True], [None], {}, 5, ["seed"])],
        ("sampler_priority", list(range(14)) * 5),
        ("sampler_order", ["logit_bias"]),
        *[("custom_token_bans", value) for value in ("1,x", "1;2", "-1", [VOCAB], "9" * 30, "[" * 100_000, {})],
        *[("allowed_token_ids", value) for value in ([], "", [VOCAB], [1.5])],
        *[("bad_words", value) for value in ([""], ["x" * 257], ["a"] * 1025, 5, [5])],
        *[("bad_words_ids", value) for value in ([[]], [1], [[VOCAB]], "x", [["a"]])],
        *[
            ("token_ban_ranges", value)
            for value in ([[1, 0, 5]], [[[1], 0]], [[[1], -1, 5]], [[[], 0, 5]], [[[VOCAB], 0, 1]])
        ],
        *[("token_ban_ranges", value) for value in ("x", [[[1], 0.5, 1]], [[[1], 0, True]], [[[1], 0, 2**40]])],
        *[("xtc_probability", value) for value in (-0.1, 1.1)],
        *[("smoothing_curve", value) for value in (0.5, 101)],
        ("dynatemp_min", 1.0),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_sampler_fields_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check(from_mapping({name: value}))
    assert raised.value.param == name or canonical_names()[name] == raised.value.param
    assert len(str(raised.value)) < 1000


def test_params_made_by_hand_are_checked_too() -> None:
    check(SamplingParams(sampler_priority=("temperature", "min_p"), token_ban_ranges=(TokenBanRange((1,), 0, 1),)))
    for params in (
        SamplingParams(sampler_priority=("no_such",)),
        SamplingParams(token_ban_ranges=(TokenBanRange((VOCAB,), 0, 1),)),
        SamplingParams(bad_words_ids=((1, VOCAB),)),
        SamplingParams(allowed_token_ids=()),
    ):
        with pytest.raises(InvalidRequestError):
            check(params)
