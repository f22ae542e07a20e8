"""Ollama's messages and `think` as a chat completion's, which is what the rest of the server knows."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from aphrodite.chat.reasoning import reasoning_marks
from aphrodite.chat.template import ChatTemplate
from aphrodite.server.config import ServerConfig
from aphrodite.server.context import ModelContext
from aphrodite.server.errors import invalid, unsupported

_LEVELS: Final = ("low", "medium", "high")


def capabilities(template: ChatTemplate, config: ServerConfig) -> list[str]:
    """What a model can do: call tools, if its template is made for them or the server was told how it calls them, and
    think, if it marks what it thinks."""
    traits, chosen = template.traits, config.tool_parser
    tools = chosen != "none" and (chosen or traits.tool_format) is not None
    thinks = reasoning_marks(traits, config.reasoning_parser) is not None
    return ["completion", *(["tools"] if tools else []), *(["thinking"] if thinks else [])]


def read_think(value: Any, context: ModelContext) -> dict[str, Any]:
    """`think` (true, false or a level) as fields of a chat completion. Left out, a model that can think does.

    Raises:
        ApiError: 400: it is none of these, or asks for what the model cannot do.
    """
    if value is False:
        return {"reasoning_effort": "none", "include_reasoning": False}
    if value not in (None, True, *_LEVELS):
        raise invalid("think", f"must be true, false or one of {', '.join(_LEVELS)}", code="invalid_type")
    if "thinking" not in capabilities(context.engine.chat_template, context.config):
        if value is None:
            return {}
        raise unsupported("think", f'"{context.name}" does not support thinking; leave it out')
    if value in _LEVELS:
        return {"reasoning_effort": value}
    return {"chat_template_kwargs": {"enable_thinking": True}}


def read_messages(value: Any) -> Any:
    """Messages as OpenAI's, whose checks are still to come. Calls get ids, and the tools' messages those of the calls.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if not isinstance(value, list):
        return value
    open_calls: deque[tuple[str, str]] = deque()  # ids and names of those that have no result yet
    return [_message(message, f"messages[{index}]", open_calls) for index, message in enumerate(value)]


def _message(value: Any, path: str, open_calls: deque[tuple[str, str]]) -> Any:
    if not isinstance(value, dict):
        return value
    if value.get("images"):
        raise unsupported(f"{path}.images", "this model reads text only; leave it out")
    message = {key: item for key, item in value.items() if key not in ("thinking", "tool_name", "images")}
    if value.get("thinking"):
        message["reasoning_content"] = value["thinking"]
    calls = value.get("tool_calls")
    if isinstance(calls, list):
        open_calls.clear()
        message["tool_calls"] = [_call(call, f"{path}.tool_calls[{i}]", i, open_calls) for i, call in enumerate(calls)]
    if value.get("role") == "tool":
        message |= _answered(value, open_calls)
    return message


def _call(value: Any, path: str, number: int, open_calls: deque[tuple[str, str]]) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(path, "must be an object with a function that has a name", code="invalid_type")
    if not isinstance(function.get("arguments", {}), dict):
        raise invalid(f"{path}.function.arguments", "must be an object", code="invalid_type")
    # Nine letters and digits, which Mistral's templates demand.
    call = value["id"] if isinstance(value.get("id"), str) and value["id"] else f"call{number:05d}"
    open_calls.append((call, function["name"]))
    told = {"name": function["name"], "arguments": function.get("arguments", {})}
    return {"id": call, "type": "function", "function": told}


def _answered(value: dict[str, Any], open_calls: deque[tuple[str, str]]) -> dict[str, Any]:
    """Whose result a tool's message is: of the call that it names, else of the first of its tool, else of the first."""
    name, told = value.get("tool_name"), dict[str, Any]()
    call = value.get("tool_call_id")
    if call is None and open_calls:
        call = next((one for one, of in open_calls if of == name), open_calls[0][0])
    found = next((pair for pair in open_calls if pair[0] == call), None)
    if found is not None:
        open_calls.remove(found)
        name = name or found[1]
    if call is not None:
        told["tool_call_id"] = call
    if name is not None:
        told["name"] = name
    return told
