"""Anthropic's messages, tools and thinking as a chat completion's, which is what the rest of the server knows.

A tool's result is a message of its own; what a model thinks, says and calls is one. Thinking that came back goes to the
template as reasoning. Source: Anthropic's Messages API.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from aphrodite.server.errors import invalid, unsupported
from aphrodite.server.openai.tools import MAX_TOOLS, read_function

_CARRIED: Final = "aphrodite.thinking:"  # before the text, in the signature of a block that leaves it out
_SIGNED: Final = "aphrodite.digest:"
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_ON: Final = ("enabled", "adaptive", "between_tools")


class Thinking(NamedTuple):
    """What a request says of thinking.

    Attributes:
        on: the model may think; else it is kept from it, and what it thinks all the same is left out.
        budget: most tokens of it.
        shown: its text is told; else a block has its signature alone.
    """

    on: bool = False
    budget: int | None = None
    shown: bool = True


class ToolChoice(NamedTuple):
    """`tool_choice` as OpenAI's."""

    choice: str | dict[str, Any] = "auto"
    parallel: bool = True


def read_thinking(value: Any) -> Thinking:
    """`thinking`; left out, or an empty object, it is off.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if not value:
        return Thinking()
    kind = value.get("type")
    if kind == "disabled":
        return Thinking()
    if kind not in _ON:
        raise invalid("thinking.type", f"must be disabled or one of {', '.join(_ON)}")
    budget = value.get("budget_tokens")
    if kind != "enabled" and budget is not None:
        raise invalid("thinking.budget_tokens", f"has no place in {kind} thinking; leave it out")
    if kind == "enabled" and (not isinstance(budget, int) or isinstance(budget, bool)):
        raise invalid("thinking.budget_tokens", "must be a number of tokens", code="invalid_type")
    if budget is not None and not 0 <= budget < 2**31:
        raise invalid("thinking.budget_tokens", "must be at least 0 and less than 2^31")
    display = value.get("display")
    if display not in (None, "summarized", "omitted"):
        raise invalid("thinking.display", "must be summarized or omitted")
    return Thinking(True, budget, display != "omitted")


def read_tools(values: Sequence[Any]) -> list[dict[str, Any]]:
    """`tools` as OpenAI's.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if len(values) > MAX_TOOLS:
        raise invalid("tools", f"has {len(values)} tools, more than the {MAX_TOOLS} allowed")
    return [_tool(value, f"tools[{index}]") for index, value in enumerate(values)]


def read_tool_choice(value: Any) -> ToolChoice:
    """`tool_choice`.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if not value:
        return ToolChoice()
    kind, alone = value.get("type"), value.get("disable_parallel_tool_use", False)
    if not isinstance(alone, bool):
        raise invalid("tool_choice.disable_parallel_tool_use", "must be true or false", code="invalid_type")
    if isinstance(kind, str) and kind in _CHOICES:
        return ToolChoice(_CHOICES[kind], not alone)
    if kind != "tool":
        raise invalid("tool_choice.type", f"must be {', '.join(_CHOICES)} or tool")
    if not isinstance(value.get("name"), str):
        raise invalid("tool_choice.name", "must be the name of a tool", code="invalid_type")
    return ToolChoice({"type": "function", "function": {"name": value["name"]}}, not alone)


def read_conversation(messages: Any, system: Any) -> list[dict[str, Any]]:
    """`messages` and `system` as the messages of a chat.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message", code="invalid_type")
    chat: list[dict[str, Any]] = []
    if system is not None:
        chat.append({"role": "system", "content": _texts(system, "system")})
    calls: set[str] = set()
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if not isinstance(message, dict):
            raise invalid(path, "must be an object with role and content", code="invalid_type")
        role, content = message.get("role"), message.get("content")
        if role == "user":
            chat += _heard(content, f"{path}.content", calls)
        elif role == "assistant":
            chat.append(_said(content, f"{path}.content", calls))
        elif role == "system":
            chat.append({"role": "system", "content": _texts(content, f"{path}.content")})
        else:
            raise invalid(f"{path}.role", "must be user, assistant or system")
    if chat[-1]["role"] == "assistant" and "tool_calls" in chat[-1]:
        raise invalid(f"messages[{len(messages) - 1}]", "has tool_use without a tool_result in a message behind it")
    return chat


def signature_of(thinking: str, *, carried: bool) -> str:
    """What a block of thinking comes with, and is sent back with: a digest, or the text where the block has none."""
    if carried:
        return _CARRIED + base64.b64encode(thinking.encode("utf-8", "surrogatepass")).decode()
    return _SIGNED + hashlib.sha256(thinking.encode("utf-8", "surrogatepass")).hexdigest()


def _tool(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(path, "must be an object with name and input_schema", code="invalid_type")
    kind = value.get("type")
    if kind not in (None, "custom"):
        raise unsupported(f"{path}.type", f"tools of your own only, not {str(kind)[:40]!r}")
    schema = value.get("input_schema")
    if not isinstance(schema, dict):
        raise invalid(f"{path}.input_schema", "must be a JSON schema (an object)", code="invalid_type")
    told = {"name": value.get("name"), "description": value.get("description"), "parameters": schema}
    return {"type": "function", "function": read_function(told, path)}


def _heard(content: Any, path: str, calls: set[str]) -> list[dict[str, Any]]:
    """A user's message: what was said, and the results of calls, in their order."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    chat: list[dict[str, Any]] = []
    for block, where in _blocks(content, path):
        if _kind(block, where) == "tool_result":
            chat.append(_result(block, where, calls))
            continue
        part = _text_block(block, where)
        if chat and chat[-1]["role"] == "user":
            chat[-1]["content"].append(part)
        else:
            chat.append({"role": "user", "content": [part]})
    return chat or [{"role": "user", "content": ""}]


def _result(block: dict[str, Any], path: str, calls: set[str]) -> dict[str, Any]:
    call = _text(block, "tool_use_id", path)
    if call not in calls:
        raise invalid(f"{path}.tool_use_id", f"no tool_use before it has the id {call[:128]!r}")
    content, failed = block.get("content"), block.get("is_error", False)
    if not isinstance(failed, bool | None):
        raise invalid(f"{path}.is_error", "must be true or false", code="invalid_type")
    texts = [""]
    if isinstance(content, str):
        texts = [content]
    elif content is not None:
        texts = [_text_block(part, where)["text"] for part, where in _blocks(content, f"{path}.content")]
    if failed and not "".join(texts).lower().startswith("error"):
        texts = [f"Error: {texts[0] if texts else ''}".rstrip(), *texts[1:]]  # templates have no other way to say it
    return {"role": "tool", "tool_call_id": call, "content": "\n".join(texts)}


def _said(content: Any, path: str, calls: set[str]) -> dict[str, Any]:
    """An assistant's message: what it thought, said and called."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    parts: list[dict[str, str]] = []
    thoughts: list[str] = []
    called: list[dict[str, Any]] = []
    for block, where in _blocks(content, path):
        match _kind(block, where):
            case "thinking":
                thoughts.append(_thought(block, where))
            case "redacted_thinking":  # another server's, which nobody else can read
                _text(block, "data", where)
            case "tool_use":
                called.append(_call(block, where))
                calls.add(called[-1]["id"])
            case _:
                parts.append(_text_block(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": parts or (None if called else "")}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(filter(None, thoughts))
    if called:
        message["tool_calls"] = called
    return message


def _thought(block: dict[str, Any], path: str) -> str:
    """The text of a block of thinking, which its signature may hold. Signatures of other servers say nothing here."""
    thinking = _text(block, "thinking", path)
    signature = "" if block.get("signature") is None else _text(block, "signature", path)
    if thinking or not signature.startswith(_CARRIED):
        return thinking
    try:
        return base64.b64decode(signature.removeprefix(_CARRIED), validate=True).decode()
    except (binascii.Error, ValueError):
        raise invalid(f"{path}.signature", "is damaged; send the block back as it came, or leave it out") from None


def _call(block: dict[str, Any], path: str) -> dict[str, Any]:
    name, call = _text(block, "name", path), _text(block, "id", path)
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid(f"{path}.input", "must be an object", code="invalid_type")
    return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}


def _blocks(value: Any, path: str) -> list[tuple[dict[str, Any], str]]:
    """Blocks with their paths; a text is one block."""
    if isinstance(value, str):
        return [({"type": "text", "text": value}, path)]
    if not isinstance(value, list):
        raise invalid(path, "must be text or a list of blocks", code="invalid_type")
    return [(block, f"{path}[{index}]") for index, block in enumerate(value)]


def _texts(value: Any, path: str) -> str | list[dict[str, str]]:
    """A text, or blocks of text."""
    return value if isinstance(value, str) else [_text_block(block, where) for block, where in _blocks(value, path)]


def _text_block(block: Any, path: str) -> dict[str, str]:
    kind = _kind(block, path)
    if kind != "text":
        raise unsupported(path, f"blocks of text, not {kind[:40]!r}")
    return {"type": "text", "text": _text(block, "text", path)}


def _kind(block: Any, path: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise invalid(path, 'must be an object such as {"type": "text", "text": …}', code="invalid_type")
    return kind


def _text(block: dict[str, Any], key: str, path: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise invalid(f"{path}.{key}", "must be text", code="invalid_type")
    return value
