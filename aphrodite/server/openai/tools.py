"""`tools` and `tool_choice` of a chat request, and the older `functions` and `function_call`.

A call that the request demands is written under a grammar, as a JSON list, whatever the template's own format is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from aphrodite.chat.tools.readers import TOOL_NAME
from aphrodite.chat.traits import Reasoning
from aphrodite.sampling.grammar_fields import JSON_DEFAULTS
from aphrodite.sampling.table import Grammar
from aphrodite.server.errors import invalid, unsupported
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.tokenizer.tokenizer import Tokenizer

MAX_TOOLS: Final = 512
# As templates write JSON. Models that may put white space anywhere put a lot of it.
_SPACING: Final = {
    "whitespace_flexible": False, "whitespace_pattern": None, "item_separator": ", ", "key_separator": ": ",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says of tools.

    Attributes:
        tools: as chat templates take them: OpenAI's objects; empty if the model is not to be told of any.
        required: the answer has to be calls.
        parallel: it may be several.
        legacy: the client knows one call an answer, as `function_call`.
    """

    tools: tuple[dict[str, Any], ...] = ()
    required: bool = False
    parallel: bool = True
    legacy: bool = False

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """The JSON schemas of the tools' parameters, by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.tools}

    def grammar(self) -> Grammar:
        """Of an answer that is calls and nothing else."""
        return Grammar("json_schema", self._list_schema())

    def rules_beside(self, answer: str, tokenizer: Tokenizer) -> str:
        """Lark rules of an answer that is calls, as a list or in Hermes' tags, or what the rules of `answer` say."""
        open_tag, close_tag = _mark("<tool_call>", tokenizer), _mark("</tool_call>", tokenizer)
        more = ' ("\\n" one)*' if self.parallel else ""
        return (
            f"answer: listed | tagged | data\nlisted: %json {self._list_schema()}\ntagged: one{more}\n"
            f'one: {open_tag} "\\n" call "\\n" {close_tag}\ncall: %json {self._call_schema()}\n'
            f"{answer.replace('answer:', 'data:', 1)}"
        )

    def _list_schema(self) -> str:
        calls, definitions = self._calls()
        schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "x-guidance": _SPACING}
        if not self.parallel:
            schema["maxItems"] = 1
        return _text(schema | definitions)

    def _call_schema(self) -> str:
        calls, definitions = self._calls()
        return _text({"anyOf": calls, "x-guidance": _SPACING, **definitions})

    def _calls(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The schemas of a call of each tool, and the definitions that they share."""
        definitions: dict[str, Any] = {}
        schemas = enumerate(self.schemas.items())
        calls = [_call_schema(name, schema, f"{number}.", definitions) for number, (name, schema) in schemas]
        return calls, {"$defs": definitions} if definitions else {}


def read_tool_use(fields: ChatFields) -> ToolUse:
    """What a request says of tools, checked.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    legacy = bool(fields.functions)
    if legacy and fields.tools:
        raise invalid("functions", "is the older name of tools; send one of them")
    if legacy:
        listed = _list(fields, "functions")
        tools = [_tool({"type": "function", "function": item}, f"functions[{i}]", "") for i, item in listed]
    else:
        tools = [_tool(item, f"tools[{i}]", ".function") for i, item in _list(fields, "tools")]
    counts = Counter(tool["function"]["name"] for tool in tools)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise invalid("functions" if legacy else "tools", f"has two tools with the name {twice!r}")
    use = ToolUse(tuple(tools), parallel=fields.parallel_tool_calls and not legacy, legacy=legacy)
    other, value = ("tool_choice", fields.tool_choice) if legacy else ("function_call", fields.function_call)
    if value not in (None, "none", "auto"):
        raise invalid(other, f"needs {'tools' if legacy else 'functions'} to choose from")
    return _chosen(use, fields.function_call if legacy else fields.tool_choice, legacy)


def _list(fields: ChatFields, name: str) -> list[tuple[int, Any]]:
    value = getattr(fields, name) or []
    if len(value) > MAX_TOOLS:
        raise invalid(name, f"has {len(value)} tools, more than the {MAX_TOOLS} allowed")
    return list(enumerate(value))


def _tool(value: dict[str, Any], path: str, inner: str) -> dict[str, Any]:
    kind = value.get("type", "function")
    if kind != "function":
        raise unsupported(f"{path}.type", f"functions only, not {str(kind)[:40]!r}")
    return {"type": "function", "function": read_function(value.get("function"), path + inner)}


def read_function(function: Any, path: str) -> dict[str, Any]:
    """A function as chat templates take it: with its name, description and parameters.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if not isinstance(function, dict):
        raise invalid(path, "must be an object with a name", code="invalid_type")
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise invalid(f"{path}.name", "must be 1 to 128 letters, digits, and _ . : / - behind the first")
    if not isinstance(function.get("description", ""), str | None):
        raise invalid(f"{path}.description", "must be text", code="invalid_type")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise invalid(f"{path}.parameters", "must be a JSON schema (an object)", code="invalid_type")
    described = {"description": "", "parameters": {"type": "object", "properties": {}}}  # templates read both
    given = {key: item for key, item in function.items() if item is not None and key != "strict"}
    return {"name": name, **described, **given}


def _chosen(use: ToolUse, choice: Any, legacy: bool) -> ToolUse:
    """`use` by `tool_choice`."""
    param = "function_call" if legacy else "tool_choice"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(use, choice)
    if choice is None or choice == "auto":
        return use
    if choice == "none":
        return replace(use, tools=())
    if not use.tools:
        raise invalid(param, "needs tools to choose from")
    if choice == "required" and not legacy:
        return replace(use, required=True)
    name = _named(choice, legacy)
    if name is None:
        words = "none, auto" if legacy else "none, auto, required"
        raise invalid(param, f"must be {words}, or name a function")
    return replace(_only(use, [name], param), required=True, parallel=False)


def _named(choice: Any, legacy: bool) -> str | None:
    """The function that a choice names, if that is what it does."""
    function = choice if legacy else choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _allowed(use: ToolUse, choice: dict[str, Any]) -> ToolUse:
    allowed = choice.get("allowed_tools", choice)
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
    names = [_named(tool, False) for tool in tools] if isinstance(tools, list) else [None]
    if mode not in ("auto", "required") or not names or None in names:
        raise invalid("tool_choice", "must have allowed_tools with a mode (auto or required) and tools")
    only = _only(use, [name for name in names if name is not None], "tool_choice")
    return replace(only, required=mode == "required")


def _only(use: ToolUse, names: list[str], param: str) -> ToolUse:
    known = use.schemas
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise invalid(param, f"names {missing[:128]!r}, which is none of the tools")
    wanted = set(names)
    return replace(use, tools=tuple(tool for tool in use.tools if tool["function"]["name"] in wanted))


def _call_schema(name: str, parameters: Mapping[str, Any], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """A call of one tool; what its schema defines goes into `definitions` behind `prefix`, which is its own."""
    places = {f"#/{key}/": f"#/$defs/{prefix}" for key in ("$defs", "definitions")}
    inner = {key: value for key, value in parameters.items() if f"#/{key}/" not in places}
    for key in ("$defs", "definitions"):
        defined = parameters.get(key)
        for own, schema in defined.items() if isinstance(defined, dict) else ():
            definitions[f"{prefix}{own}"] = _moved(schema, places)
    arguments = _moved(inner, places)
    if arguments.get("properties") == {}:  # nothing can be said to the tool
        arguments = {"additionalProperties": False, **arguments}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, places: Mapping[str, str]) -> Any:
    """A schema with its references following the definitions that were moved."""
    if isinstance(schema, list):
        return [_moved(item, places) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, places) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        for old, new in places.items():
            if reference.startswith(old):
                moved["$ref"] = new + reference.removeprefix(old)
    return moved


def json_rules(grammar: Grammar) -> str | None:
    """The Lark rule of an `answer` that is what a grammar of JSON says; None for any other grammar."""
    if grammar.kind not in ("json_schema", "json_object"):
        return None
    schema = json.loads(grammar.text or '{"type":"object"}')
    own = schema.get("x-guidance", {})
    if isinstance(own, dict):  # anything else is refused where the grammar is tried
        schema["x-guidance"] = {**JSON_DEFAULTS, **own}
    return f"answer: %json {_text(schema)}"


def alone(rules: str) -> Grammar:
    """The grammar of an answer and nothing else."""
    return Grammar("lark", f"start: answer\n{rules}")


def behind_reasoning(rules: str, reasoning: Reasoning, tokenizer: Tokenizer) -> Grammar:
    """The grammar of an answer that begins inside reasoning, which stays free."""
    token_id = tokenizer.token_to_id(reasoning.end)
    if token_id is not None and token_id in tokenizer.special_ids:
        thought = f"start: THOUGHT <[{token_id}]> SPACE answer\nTHOUGHT: /(.|\\n)*/\n"
    else:
        thought = f"start: thought SPACE answer\nthought[suffix={_text(reasoning.end)}]: /(.|\\n)*/\n"
    return Grammar("lark", f"{thought}SPACE: /[ \\n]{{0,4}}/\n{rules}")


def _mark(text: str, tokenizer: Tokenizer) -> str:
    """A mark in Lark: the special token that it is, else its text."""
    token_id = tokenizer.token_to_id(text)
    return f"<[{token_id}]>" if token_id is not None and token_id in tokenizer.special_ids else _text(text)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
