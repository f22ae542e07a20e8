"""Tools for templates that know none: told in words, with calls and results as texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aphrodite.chat.content import part_texts
from aphrodite.chat.formats import ToolFormat

Message = Mapping[str, Any]

_RESULTS: Final = ("tool", "function")


def with_instruction(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the tools described in its system message, which is made if there is none.

    Earlier calls become texts in the form that is asked for, and their results become the user's.
    """
    return _with_system(without_calls(messages), _instruction(tools))


def with_deepseek_instruction(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, fenced: bool
) -> list[dict[str, Any]]:
    """The conversation with the tools described in its system message, to be called as DeepSeek's models do.

    Their templates show earlier calls and results, but no tools; the model card of DeepSeek V3.1 has them there.

    Args:
        fenced: V3's and R1's way, with arguments in a fence; else V3.1's.
    """
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    call = "function<｜tool▁sep｜>NAME\n```json\n{...}\n```" if fenced else "NAME<｜tool▁sep｜>{...}"
    instruction = (
        f"## Tools\n\nYou can call tools. Each line describes one:\n{described}\n\nTo call tools, end your answer with "
        "their names and their arguments as JSON that fits their parameters, exactly in this form, the inner marks "
        f"once for each call:\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>\n"
        "Where no tool helps, just answer."
    )
    return _with_system(messages, instruction)


def _with_system(messages: Sequence[Message], instruction: str) -> list[dict[str, Any]]:
    """The conversation with an instruction in its system message, which is made if there is none."""
    spoken = [dict(message) for message in messages]
    if spoken and spoken[0].get("role") == "system":
        first = spoken[0]
        return [{**first, "content": _joined(first.get("content"), instruction)}, *spoken[1:]]
    return [{"role": "system", "content": instruction}, *spoken]


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether a conversation has calls or results."""
    return any(message.get("tool_calls") or message.get("role") in _RESULTS for message in messages)


def without_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation with calls as the assistant's texts and results as the user's."""
    return [_spoken(message) for message in messages]


def with_spoken_calls(messages: Sequence[Message], tool_format: ToolFormat | None) -> list[dict[str, Any]]:
    """The conversation with calls as the assistant's texts, as the model writes them where that is not Hermes' way."""
    return [_with_spoken_calls(message, tool_format) for message in messages]


def _instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call tools. Each line describes one:\n<tools>\n{described}\n</tools>\n\n"
        "To call a tool, write a JSON object with its name and arguments in this form, once for each call, and end "
        'your answer there:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "You get the results in <tool_response></tool_response>. Where no tool helps, just answer."
    )


def _spoken(message: Message) -> dict[str, Any]:
    """A message without calls, in a role that every template has."""
    if message.get("role") in _RESULTS:
        result = _joined("<tool_response>", message.get("content"), "</tool_response>", between="\n")
        return {"role": "user", "content": result}
    return _with_spoken_calls(message, None)


def _with_spoken_calls(message: Message, tool_format: ToolFormat | None) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return dict(message)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": _joined(message.get("content"), _written(calls, tool_format), between="\n")}


def _written(calls: list[Any], tool_format: ToolFormat | None) -> str:
    """Calls as the model writes them."""
    objects = ", ".join(map(_call_object, calls))
    match tool_format:
        case "granite":
            return f"<|tool_call|>[{objects}]"
        case "phi4_mini":
            return f"<|tool_call|>[{objects}]<|/tool_call|>"
        case "lfm2":
            return f"<|tool_call_start|>[{', '.join(map(_python_call, calls))}]<|tool_call_end|>"
        case "olmo3":
            lines = "\n".join(map(_python_call, calls))
            return f"<function_calls>{lines}</function_calls>"
        case "kimi_k2":
            return f"<|tool_calls_section_begin|>{''.join(map(_kimi_call, calls))}<|tool_calls_section_end|>"
    return "\n".join(f"<tool_call>\n{_call_object(call)}\n</tool_call>" for call in calls)


def _kimi_call(call: Any) -> str:
    call_id = call.get("id") if isinstance(call, Mapping) else None
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{_name_and_arguments(call)[1]}<|tool_call_end|>"


def _python_call(call: Any) -> str:
    """A call in Python's way, its literals in JSON's; as JSON where the arguments are no object."""
    name, text = _name_and_arguments(call)
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return _call_object(call)
    pairs = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    return f"{name}({', '.join(pairs)})"


def _call_object(call: Any) -> str:
    """A call as JSON text."""
    name, arguments = _name_and_arguments(call)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


def _name_and_arguments(call: Any) -> tuple[Any, str]:
    """A call's name, and its arguments as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return function.get("name"), text


def _joined(*contents: Any, between: str = "\n\n") -> str:
    """Contents, each a text or a list of text parts, as one text."""
    return between.join(text for content in contents for text in part_texts(content) if text)
