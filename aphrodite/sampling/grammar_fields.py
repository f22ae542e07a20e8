"""How clients say what an answer has to be, and the one value that all of it becomes.

`response_format` is OpenAI's; `structured_outputs` and `guided_*` are vLLM's; `grammar`, `json_schema`,
`grammar_string` and `regex_pattern` are those of llama.cpp, KoboldCpp and TabbyAPI. A request may use one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.table import GRAMMAR_KINDS, Grammar, field_error, shown, typed

MAX_CHOICES = 4096

# llguidance's options for schemas: `oneOf` is taken for `anyOf`; between two tokens of JSON stands a space, or a line
# end and an indentation, as printers write it. Small models that may put more there put nothing else until their tokens
# are spent.
JSON_DEFAULTS: Mapping[str, Any] = {
    "coerce_one_of": True, "whitespace_pattern": r"[\x20\x09]|\x0D?\x0A[\x20\x09]{0,40}"
}  # fmt: skip

_GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)


def read_grammar(given: Sequence[tuple[str, Any]]) -> Grammar | None:
    """The grammar that a request's fields ask for, None if they ask for none.

    Args:
        given: names as the client wrote them, with their values.

    Raises:
        InvalidRequestError: a value is of no known form, or two of them ask for different things.
    """
    found: dict[str, Grammar] = {}
    for name, value in given:
        grammar = None if value is False or value in ("", {}, []) else _READERS[name](value, name)
        if grammar is not None:
            found[name] = grammar
    if len(set(found.values())) > 1:
        raise InvalidRequestError(
            f"{' and '.join(f'`{name}`' for name in found)} both say what the answer has to be. Send one of them.",
            param=next(iter(found)),
        )
    return next(iter(found.values()), None)


def grammar_of_text(text: str) -> Grammar:
    """A grammar whose notation its rules tell: `name ::= ...` is GBNF, anything else Lark."""
    return Grammar("gbnf" if _GBNF_RULE.search(text) else "lark", text)


def json_schema(schema: Any, name: str, options: Mapping[str, Any] | None = None) -> Grammar:
    """Of a JSON schema, be it an object, true, or the text of one.

    Args:
        options: llguidance's for this schema, kept with it as `x-guidance`.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise field_error(name, schema, "is not JSON", "Send a JSON schema.", verb="contains") from None
    if schema is True:
        schema = {}
    typed(schema, dict, name, "a JSON schema (an object)")
    if options:
        schema = {**schema, "x-guidance": {**schema.get("x-guidance", {}), **options}}
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def _canonical(value: Any, name: str) -> Grammar:
    """`grammar`: text, or kind and text as `to_mapping` writes them."""
    if isinstance(value, Grammar):
        return value
    if isinstance(value, list | tuple) and len(value) == 2:
        value = dict(zip(Grammar._fields, value, strict=True))
    if isinstance(value, dict) and value.keys() == {"kind", "text"}:
        kind, text = value["kind"], value["text"]
        if kind not in GRAMMAR_KINDS:
            raise field_error(name, kind, "is no kind of grammar", f"There are {', '.join(GRAMMAR_KINDS)}.",
                              verb="contains")  # fmt: skip
        return Grammar(kind, typed(text, str, name, "made of a kind and a text"))
    return _text(value, name)


def _text(value: Any, name: str) -> Grammar:
    return grammar_of_text(typed(value, str, name, "a grammar in GBNF or Lark, as text"))


def _regex(value: Any, name: str) -> Grammar:
    return Grammar("regex", typed(value, str, name, "a regular expression, as text"))


def _choice(value: Any, name: str) -> Grammar:
    typed(value, (list, tuple), name, "a list of texts to choose from")
    if len(value) > MAX_CHOICES:
        raise field_error(name, value, f"is more than the {MAX_CHOICES} choices allowed", "Shorten it.")
    for item in value:
        if not typed(item, str, name, "a list of texts to choose from"):
            raise InvalidRequestError(f"`{name}` contains an empty text. Leave it out.", param=name)
    return Grammar("choice", json.dumps(list(dict.fromkeys(value)), ensure_ascii=False))


def _json_object(value: Any, name: str) -> Grammar:
    typed(value, bool, name, "true or false")
    return Grammar("json_object", "")


def _response_format(value: Any, name: str) -> Grammar | None:
    typed(value, dict, name, "an object with a type")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_schema(value["schema"], name) if value.get("schema") else Grammar("json_object", "")
    if kind == "json_schema":
        inner = value.get("json_schema", value)  # llama.cpp's clients leave the inner object out
        typed(inner, dict, name, "an object with a schema")
        if inner.get("schema") is None:
            raise InvalidRequestError(
                f"`{name}` has no schema. Send it as {name}.json_schema.schema.", param=f"{name}.json_schema.schema"
            )
        return json_schema(inner["schema"], name)
    raise field_error(name, kind, "is no type of it that is supported", "There are text, json_object and json_schema.",
                      verb="has the type")  # fmt: skip


def _structured_outputs(value: Any, name: str) -> Grammar | None:
    typed(value, dict, name, "an object with one of json, regex, choice, grammar and json_object")
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    options: dict[str, Any] = {}
    if given.pop("disable_any_whitespace", False):
        options |= {"whitespace_flexible": False, "whitespace_pattern": None}
    if (pattern := given.pop("whitespace_pattern", None)) is not None:
        options["whitespace_pattern"] = typed(pattern, str, name, "an object whose whitespace_pattern is text")
    given.pop("disable_fallback", None)  # there is one implementation, so none is fallen back to
    for key in given:
        if key not in _STRUCTURED:
            advice = f"Its constraints are {', '.join(_STRUCTURED)}."
            raise field_error(name, key, "is not supported", advice, verb="contains")
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError(f"`{name}` has {' and '.join(given)}. Send one of them.", param=name)
    ((key, item),) = given.items()
    if key == "json_object" and options:
        return json_schema({"type": "object"}, name, options)
    if key == "json":
        return json_schema(item, name, options)
    if options:
        raise InvalidRequestError(f"`{name}` has settings for white space in JSON, and no JSON. Leave them out.",
                                  param=name)  # fmt: skip
    return _STRUCTURED[key](item, name)


_Reader = Callable[[Any, str], Grammar | None]
_STRUCTURED: dict[str, _Reader] = {
    "json": json_schema, "regex": _regex, "choice": _choice, "grammar": _text, "json_object": _json_object,
}  # fmt: skip
_READERS: dict[str, _Reader] = {
    "grammar": _canonical,
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": json_schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _text,
    "guided_json_object": _json_object,
    "json_schema": json_schema,
    "grammar_string": _text,
    "regex_pattern": _regex,
}
GRAMMAR_ALIASES = tuple(name for name in _READERS if name != "grammar")


def describe(grammar: Grammar) -> str:
    """A short picture of a grammar, for messages."""
    return f"{grammar.kind} {shown(grammar.text)}" if grammar.text else grammar.kind


# What each field may hold, for the API's description.
_TEXT_SCHEMA = {"type": "string"}
_OBJECT_OR_TEXT = {"anyOf": [{"type": "object"}, _TEXT_SCHEMA, {"type": "boolean"}]}
_CHOICES = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_CHOICES}
FIELD_SCHEMAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("grammar_string", "regex_pattern", "guided_regex", "guided_grammar"), _TEXT_SCHEMA),
    **dict.fromkeys(("json_schema", "guided_json"), _OBJECT_OR_TEXT),
    "grammar": {
        "anyOf": [
            _TEXT_SCHEMA,
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["kind", "text"],
                "properties": {"kind": {"enum": list(GRAMMAR_KINDS)}, "text": _TEXT_SCHEMA},
            },
        ]
    },
    "guided_choice": _CHOICES,
    "guided_json_object": {"type": "boolean"},
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": {"type": "object"}}},
        },
    },
    "structured_outputs": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "json": _OBJECT_OR_TEXT,
            "regex": _TEXT_SCHEMA,
            "choice": _CHOICES,
            "grammar": _TEXT_SCHEMA,
            "json_object": {"type": "boolean"},
            "whitespace_pattern": _TEXT_SCHEMA,
            "disable_any_whitespace": {"type": "boolean"},
            "disable_fallback": {"type": "boolean"},
        },
    },
}
