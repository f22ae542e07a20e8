"""Chat messages: what a request may send. The chat template brings contents to the form it takes."""

from __future__ import annotations

from typing import Any

from aphrodite.server.errors import ApiError, invalid, unsupported

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")

_LEGACY_ID = "function0"  # of a call that has none, in the form that Mistral's templates demand


def read_messages(value: Any, *, max_messages: int) -> list[dict[str, Any]]:
    """The conversation, each content a text or a list of text parts (None: an assistant's tool call without words).

    The role `developer` becomes `system`, its name in open models' templates; `function` and `function_call` become
    `tool` and `tool_calls`.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if not isinstance(value, list):
        raise invalid("messages", "must be a list of messages", code="invalid_type")
    if not value:
        raise invalid("messages", "must have at least one message")
    if len(value) > max_messages:
        raise invalid("messages", f"has {len(value)} messages, more than the {max_messages} allowed")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def text_size(messages: list[dict[str, Any]]) -> int:
    """Characters of all contents."""
    contents = [message["content"] or "" for message in messages]
    return sum(
        len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content) for content in contents
    )


def _message(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(path, "must be an object with role and content", code="invalid_type")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _content(value, role, path),
    }
    for key in _TEXT_KEYS:
        if value.get(key) is not None:
            message[key] = _text(value[key], f"{path}.{key}")
    calls = value.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise invalid(f"{path}.tool_calls", "must be a list of objects", code="invalid_type")
        message["tool_calls"] = calls
    elif role == "assistant" and isinstance(value.get("function_call"), dict):
        message["tool_calls"] = [{"id": _LEGACY_ID, "type": "function", "function": value["function_call"]}]
    if role == "function":
        message |= {"role": "tool", "tool_call_id": _LEGACY_ID}
    if value.get("audio") is not None:
        raise unsupported(f"{path}.audio", "this model reads text only")
    return message


def _content(message: dict[str, Any], role: str, path: str) -> str | list[dict[str, str]] | None:
    content = message.get("content")
    path = f"{path}.content"
    if content is None:
        if role != "assistant":
            raise invalid(path, "must be text or a list of parts", code="invalid_type")
        if message.get("refusal") is not None:
            return _text(message["refusal"], path.replace(".content", ".refusal"))
        return None if message.get("tool_calls") or message.get("function_call") else ""
    if isinstance(content, list):
        return [{"type": "text", "text": _part(part, f"{path}[{index}]")} for index, part in enumerate(content)]
    return _text(content, path)


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise invalid(path, 'must be an object such as {"type": "text", "text": …}', code="invalid_type")
    kind = part.get("type")
    if kind in ("text", "refusal"):
        return _text(part.get(kind), f"{path}.{kind}")
    if not isinstance(kind, str):
        raise invalid(f"{path}.type", 'must be text, such as "text"', code="invalid_type")
    raise unsupported(path, f"this model reads text only, not {kind[:40]!r}")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _not_text(path)
    return value


def _not_text(path: str) -> ApiError:
    return invalid(path, "must be text", code="invalid_type")
