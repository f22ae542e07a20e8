"""`input` of a request, checked and brought to items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, get_args

from aphrodite.server.errors import ApiError, invalid, unsupported
from aphrodite.server.openai.responses.items import (
    FunctionCall,
    FunctionCallOutput,
    InputText,
    Item,
    Message,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Refusal,
    Role,
    SummaryText,
    new_id,
)

_ROLES: Final = get_args(Role)
_MAX_ID: Final = 256
_SAID: Final = ("input_text", "output_text", "text")  # the same to a reader, whichever role they come with

FindItem = Callable[[str], Item | None]


def read_input(value: Any, find: FindItem) -> list[Item]:
    """The items of a request's `input`, each with an id.

    Args:
        value: a text, which is the user's, or a list of items.
        find: the stored item that an `item_reference` means.

    Raises:
        ApiError: 400 with the path of what is wrong; 404, a reference to an item that is not there.
    """
    if isinstance(value, str):
        return [Message(new_id("msg"), "user", [InputText(value)])]
    if not isinstance(value, list):
        raise invalid("input", "must be text or a list of items", code="invalid_type")
    if not value:
        raise invalid("input", "must have at least one item")
    return [_item(item, f"input[{index}]", find) for index, item in enumerate(value)]


def check_calls(known: list[Item], new: list[Item]) -> None:
    """Refuse the output of a call that the conversation does not have.

    Raises:
        ApiError: 400 with the path of the first such output.
    """
    calls = {item.call_id for item in known if isinstance(item, FunctionCall)}
    for index, item in enumerate(new):
        if isinstance(item, FunctionCall):
            calls.add(item.call_id)
        elif isinstance(item, FunctionCallOutput) and item.call_id not in calls:
            raise invalid(f"input[{index}].call_id", f"no function call before it has the id {item.call_id[:128]!r}")


def _item(value: Any, path: str, find: FindItem) -> Item:
    if not isinstance(value, dict):
        raise invalid(path, "must be an object with a type", code="invalid_type")
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value else "item_reference" if "id" in value else None
    if kind == "item_reference":
        return _referenced(value, path, find)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None and isinstance(kind, str):
        raise unsupported(f"{path}.type", f"items are {', '.join((*_READERS, 'item_reference'))}, not {kind[:40]!r}")
    if reader is None:
        raise invalid(f"{path}.type", 'must be text, such as "message"', code="invalid_type")
    return reader(value, path)


def _referenced(value: dict[str, Any], path: str, find: FindItem) -> Item:
    name = _text(value, "id", path)
    item = find(name)
    if item is None:
        why = f"Item with id {name[:_MAX_ID]!r} not found: it was never stored, or is no longer."
        raise ApiError(404, why, param=f"{path}.id", code="item_not_found")
    return item


def _message(value: dict[str, Any], path: str) -> Message:
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    spoken = OutputText if role == "assistant" else InputText
    content = value.get("content")
    path_of_content = f"{path}.content"
    parts: list[InputText | OutputText | Refusal]
    if isinstance(content, str):
        parts = [spoken(content)]
    elif isinstance(content, list):
        parts = [_part(part, f"{path_of_content}[{index}]", spoken) for index, part in enumerate(content)]
    else:
        raise invalid(path_of_content, "must be text or a list of parts", code="invalid_type")
    return Message(_id(value, "msg", path), role, parts)  # type: ignore[arg-type]  # it is one of `Role`


def _part(value: Any, path: str, spoken: type[InputText] | type[OutputText]) -> InputText | OutputText | Refusal:
    kind = _kind(value, path)
    if kind == "refusal" and spoken is OutputText:
        return Refusal(_text(value, "refusal", path))
    if kind not in _SAID:
        raise unsupported(path, f"this model reads text only, not {kind[:40]!r}")
    return spoken(_text(value, "text", path))


def _function_call(value: dict[str, Any], path: str) -> FunctionCall:
    call_id, name, arguments = (_text(value, key, path) for key in ("call_id", "name", "arguments"))
    return FunctionCall(_id(value, "fc", path), call_id, name, arguments)


def _function_call_output(value: dict[str, Any], path: str) -> FunctionCallOutput:
    call_id, output = _text(value, "call_id", path), value.get("output")
    path_of_output = f"{path}.output"
    if isinstance(output, list):
        parts = [_output_part(part, f"{path_of_output}[{index}]") for index, part in enumerate(output)]
        return FunctionCallOutput(_id(value, "fco", path), call_id, parts)
    if not isinstance(output, str):
        raise invalid(path_of_output, "must be text or a list of parts", code="invalid_type")
    return FunctionCallOutput(_id(value, "fco", path), call_id, output)


def _output_part(value: Any, path: str) -> InputText:
    kind = _kind(value, path)
    if kind not in _SAID:
        raise unsupported(path, f"this model reads text only, not {kind[:40]!r}")
    return InputText(_text(value, "text", path))


def _reasoning(value: dict[str, Any], path: str) -> ReasoningItem:
    """Of another server's encrypted reasoning nothing can be read; its summary is taken for it."""
    summary = [SummaryText(text) for text in _texts(value, "summary", "summary_text", path)]
    content = [ReasoningText(text) for text in _texts(value, "content", "reasoning_text", path)]
    return ReasoningItem(_id(value, "rs", path), summary, content)


def _texts(value: dict[str, Any], key: str, kind: str, path: str) -> list[str]:
    """The texts of a list of parts of one kind; the list may be missing."""
    parts = value.get(key)
    path = f"{path}.{key}"
    if parts is None:
        return []
    if not isinstance(parts, list):
        raise invalid(path, "must be a list of parts", code="invalid_type")
    for index, part in enumerate(parts):
        if _kind(part, f"{path}[{index}]") != kind:
            raise unsupported(f"{path}[{index}].type", f"must be {kind}")
    return [_text(part, "text", f"{path}[{index}]") for index, part in enumerate(parts)]


def _kind(part: Any, path: str) -> str:
    """A part's type."""
    if not isinstance(part, dict):
        raise invalid(path, 'must be an object such as {"type": "input_text", "text": …}', code="invalid_type")
    if not isinstance(part.get("type"), str):
        raise invalid(f"{path}.type", 'must be text, such as "input_text"', code="invalid_type")
    return str(part["type"])


def _text(value: dict[str, Any], key: str, path: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise invalid(f"{path}.{key}", "must be text", code="invalid_type")
    return text


def _id(value: dict[str, Any], prefix: str, path: str) -> str:
    """The id that the client gave an item, else a new one."""
    if value.get("id") is None:
        return new_id(prefix)
    name = _text(value, "id", path)
    if not 0 < len(name) <= _MAX_ID:
        raise invalid(f"{path}.id", f"must have 1 to {_MAX_ID} characters")
    return name


_READERS: Final[dict[str, Callable[[dict[str, Any], str], Item]]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
}
