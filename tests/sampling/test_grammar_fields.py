"""Every spelling of what an answer has to be becomes the same value, and what is no spelling is refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.fields import from_mapping, to_mapping, validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.table import Grammar

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
TEXT = '{"type":"object","properties":{"é":{"type":"integer"}}}'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
         Grammar("json_schema", TEXT)),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, Grammar("json_schema", TEXT)),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Grammar("json_schema", TEXT)),
        ({"response_format": {"type": "text"}}, None),
        *[({name: value}, Grammar("json_schema", TEXT)) for name in ("guided_json", "json_schema")
          for value in (SCHEMA, json.dumps(SCHEMA))],
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Grammar("json_schema", TEXT)),
        ({"structured_outputs": {"json": {}}}, Grammar("json_schema", "{}")),
        ({"structured_outputs": {"json": True, "disable_any_whitespace": True}},
         Grammar("json_schema", '{"x-guidance":{"whitespace_flexible":false,"whitespace_pattern":null}}')),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "")),
        ({"structured_outputs": {"choice": ["a", "b", "a"]}}, Grammar("choice", '["a", "b"]')),
        ({"guided_choice": ["a"]}, Grammar("choice", '["a"]')),
        *[({name: "a+"}, Grammar("regex", "a+")) for name in ("guided_regex", "regex_pattern")],
        *[({name: 'root ::= "a"'}, Grammar("gbnf", 'root ::= "a"'))
          for name in ("grammar", "grammar_string", "guided_grammar")],
        ({"grammar": '# says root ::= x\nstart: "a"'}, Grammar("lark", '# says root ::= x\nstart: "a"')),
        ({"grammar": {"kind": "regex", "text": "a"}}, Grammar("regex", "a")),
        ({"guided_json_object": True}, Grammar("json_object", "")),
        # What clients send that have the field and do not use it.
        *[({name: value}, None) for name in ("grammar", "json_schema") for value in ("", {}, [], None)],
        ({"guided_json_object": False}, None),
        # Two ways to say one thing.
        ({"guided_json": SCHEMA, "json_schema": SCHEMA, "grammar": ""}, Grammar("json_schema", TEXT)),
    ],
)  # fmt: skip
def test_spellings(fields: dict[str, Any], expected: Grammar | None) -> None:
    params = from_mapping(fields)
    assert params.grammar == expected
    validate(params, vocab_size=10, max_model_len=10, max_logprobs=1)
    assert from_mapping(json.loads(json.dumps(to_mapping(params)))) == params
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": "json_object"}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_json": False, "json_schema": [1]}, "json_schema"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"guided_choice": [str(number) for number in range(5000)]}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"grammar": {"kind": "pascal", "text": "a"}}, "grammar"),
        ({"grammar": "x" * 300_000}, "grammar"),
        ({"guided_json_object": 1}, "guided_json_object"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        from_mapping(fields)
    assert caught.value.param == param


@pytest.mark.parametrize("grammar", [Grammar("regex", ""), Grammar("x", "a"), "a", Grammar("regex", "a" * 300_000)])
def test_values_made_in_python_are_checked_too(grammar: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate(SamplingParams(grammar=grammar), vocab_size=10, max_model_len=10, max_logprobs=1)
    assert caught.value.param == "grammar"
